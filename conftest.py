"""Doctests of the pages write into a folder of their own; no conftest holds any."""

from pathlib import Path

import pytest

DOCS = Path(__file__).parent / "docs"
collect_ignore_glob = ["conftest.py", "tests/conftest.py", "tests/*/conftest.py", "docs/*/*.py"]


@pytest.fixture(autouse=True)
def _elsewhere(request: pytest.FixtureRequest) -> None:
    if DOCS in request.node.path.parents:
        folder = request.getfixturevalue("tmp_path")
        request.getfixturevalue("monkeypatch").chdir(folder)
