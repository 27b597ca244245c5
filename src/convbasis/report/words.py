"""Numbers and words as text of a page, escaped."""

from __future__ import annotations

import re
from html import escape

from .content import Cell


def number_text(value: float | int) -> str:
    """Return a number for readers: four digits that count, whole numbers with separators."""
    if isinstance(value, int):
        return f"{value:,}"
    if value.is_integer() and abs(value) < 1e7:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def cell_text(cell: Cell) -> str:
    """Return what stands in a cell, a dash for nothing; not escaped."""
    if cell is None:
        return "—"
    return cell if isinstance(cell, str) else number_text(cell)


def cell_html(cell: Cell) -> str:
    """Return what stands in a cell, escaped."""
    return escape(cell_text(cell))


def time_text(stamp: str) -> str:
    """Return a time in ISO 8601, UTC, to the minute for readers; anything else as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)[\d:.]*(?:Z|\+00:00)", stamp)
    return f"{found[1]} {found[2]} UTC" if found else stamp


def rounded(value: float, digits: int = 4) -> float | int:
    """Return the number to some digits, as pictures show it; whole numbers without a point."""
    short = float(f"{value:.{digits}g}") if not float(value).is_integer() else float(value)
    return int(short) if short.is_integer() and abs(short) < 2**53 else short
