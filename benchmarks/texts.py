"""The texts that pretrained models are measured on; they come with Python and PyTorch."""

from __future__ import annotations

import ast
import importlib.metadata
import sysconfig
from pathlib import Path

from convbasis.integrations.smollm2 import sample_text

ROOT = Path(__file__).parent.parent


def texts(extra: list[Path], prose: bool = False) -> dict[str, str]:
    """Texts of other kinds than the one of the calibration; with that one if asked."""
    library = Path(sysconfig.get_path("stdlib"))

    def read(*names: str) -> list[str]:
        return [(library / name).read_text(encoding="utf-8") for name in names]

    licences = sorted(
        path for path in importlib.metadata.files("torch") or () if "LICENSE" in path.name.upper()
    )
    found = {
        "source code": "\n".join(read("argparse.py", "ast.py", "inspect.py", "typing.py")),
        "docstrings": "\n\n".join(
            text
            for source in read("statistics.py", "_pydecimal.py", "difflib.py", "doctest.py")
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and (text := ast.get_docstring(node))
        ),
        "change history": read("idlelib/NEWS.txt")[0],
        "licences": "\n\n".join(
            [
                (ROOT / "LICENSE").read_text(encoding="utf-8"),
                *(path.locate().read_text(encoding="utf-8") for path in licences),
            ]
        ),
    }
    if prose:
        found["prose"] = sample_text()
    return {**found, **{path.name: path.read_text(encoding="utf-8") for path in extra}}
