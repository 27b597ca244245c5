"""Tables of a page, and the folded ones behind a picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .content import Cell
from .words import cell_html


def table_html(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table in a box of its own that scrolls; a column of numbers stands to the right."""
    numeric = [
        any(not isinstance(row[at], str | None) for row in rows)
        and not any(isinstance(row[at], str) for row in rows)
        for at in range(len(columns))
    ]
    kinds = [' class="number"' if right else "" for right in numeric]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(column)}</th>'
        for kind, column in zip(kinds, columns, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{cell_html(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(content: str) -> str:
    """Return content folded behind a line that names it."""
    return f"<details><summary>Figures as a table</summary>{content}</details>"
