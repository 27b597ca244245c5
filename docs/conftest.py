"""Doctests of the pages write into a folder of their own; what builds the site holds none."""

import pytest

collect_ignore_glob = ["site/*.py", "figures/*.py"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
