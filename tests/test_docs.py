"""The documentation: links lead somewhere, code runs, commands exist. Doctests run by themselves."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", text)
    for link in links:
        if not link.startswith("https://"):
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name}: {link}"
    assert "@@" not in text


def test_the_code_of_the_readme_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert (names["out"] - names["exact"]).norm() / names["exact"].norm() < 1e-6
    assert names["basis"].k == 2
    assert (names["basis"].to_dense() - names["H"]).abs().max() == 0


def test_every_command_of_the_documentation_exists():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\bmake (demo|test|check|format|bench)\b", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        for script in re.findall(r"python (benchmarks/\w+\.py)", text):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme
