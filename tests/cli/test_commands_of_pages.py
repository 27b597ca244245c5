"""The commands of the readme, the tutorial and two how-to pages run in their order, on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convbasis.cli.app import app

DOCS = Path(__file__).parent.parent.parent / "docs"
# Less of everything; the tiny model knows one letter a token.
SMALLER = {"2048": "256", "4096": "256", "8192": "256", "24": "4"}


@pytest.mark.parametrize(
    ("page", "files"),
    [
        ("../README.md", ["plan.json", "plan.html"]),
        ("start.md", ["plan.json", "plan.html", "compare.html"]),
        ("own-model.md", ["heads.html", "plan.json", "compare.html"]),
        ("settings.md", ["plan.json"]),
    ],
)
def test_they_run(page, files, folder, text, tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    letters = text.read_text()
    for name, part in (("mine", letters[:900]), ("other", letters[600:]), ("long", letters[:300])):
        Path(f"{name}.txt").write_text(part)
    for prompt in ("prompt.txt", "README.md"):
        Path(prompt).write_text(letters[:300])
    content = (DOCS / page).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", content, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"^    (convbasis .+)$", content, re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("convbasis ")]
    ran = 0
    for line in lines:
        words = [SMALLER.get(word, word) for word in shlex.split(line)[1:]]
        if words[0] == "tune":  # takes minutes; it is parsed in tests/test_docs.py
            continue
        words = [str(folder) if word == "smollm2" else word for word in words]
        if words[0] == "compare":
            words += ["--scored", "64"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        ran += 1
    assert ran >= 2
    assert all(Path(name).stat().st_size > 100 for name in files)
