"""Docstrings as the site reads them: the project's headings, which are not all those of the style."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe


class DocstringExamples(griffe.Extension):
    """Let "Example:" be a section of doctests, and headings with text behind them notes."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of an object before it is parsed."""
        if obj.docstring is None:
            return
        text = inspect.cleandoc(obj.docstring.value)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        text = re.sub(r" *# doctest: .*", "", text)
        text = re.sub(
            r"^(Complexity|Source|Causality): (.+)$", r"\1:\n    \2", text, flags=re.MULTILINE
        )
        obj.docstring.value = text
