"""Whether the parts of a report agree: lengths, shapes, and numbers that are numbers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import InputError
from .content import Chart, HeadMap, HeadView, Report, Table


def check_report(report: Report) -> None:
    """Check what the types of a report leave open.

    Raises:
        InputError: a table with short rows, a map with numbers beside words, a line with more x than y,
            a matrix that is not square, a number that is not finite; the message names the place.
    """
    for place, number in _numbers("", report):
        if not abs(number) <= sys.float_info.max:
            raise InputError(f"{place} is {number!r}; every number must be finite, None for nothing")
    for index, one in enumerate(report.maps):
        _check_map(f"maps[{index}] {one.title!r}", one)
    for index, view in enumerate(report.heads):
        _check_view(f"heads[{index}]", view)
    if len({(view.layer, view.head) for view in report.heads}) < len(report.heads):
        raise InputError("heads shows one head twice; one view of each head is wanted")
    for index, chart in enumerate(report.charts):
        _check_chart(f"charts[{index}] {chart.title!r}", chart)
    for index, table in enumerate(report.tables):
        _check_table(f"tables[{index}] {table.title!r}", table)


def _numbers(place: str, value: Any) -> Iterator[tuple[str, float | int]]:
    if isinstance(value, float | int):
        yield place, value
    elif isinstance(value, tuple):
        for index, entry in enumerate(value):
            yield from _numbers(f"{place}[{index}]", entry)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            name = f"{place}.{field.name}" if place else field.name
            yield from _numbers(name, getattr(value, field.name))


def _check_map(place: str, one: HeadMap) -> None:
    lengths = sorted({len(row) for row in one.values})
    if len(lengths) != 1 or lengths == [0]:
        raise InputError(f"{place} has layers of {lengths} heads; each must have the same number")
    cells = [cell for row in one.values for cell in row if cell is not None]
    words = sum(isinstance(cell, str) for cell in cells)
    if words not in (0, len(cells)):
        raise InputError(f"{place} has {words} words beside {len(cells) - words} numbers")


def _check_view(place: str, view: HeadView) -> None:
    if view.layer < 0 or view.head < 0:
        raise InputError(f"{place} is layer {view.layer}, head {view.head}; both count from 0")
    if view.first < 0 or view.tile < 1:
        raise InputError(
            f"{place} begins at token {view.first} with tiles of {view.tile}; a position from 0 on and "
            "1 token or more are wanted"
        )
    size = 0 if view.exact is None else len(view.exact)
    if size == 0 and (view.exact is not None or view.approximate is not None):
        raise InputError(f"{place}.exact has no rows; None is wanted where a kernel alone is shown")
    for name in ("exact", "approximate"):
        matrix = getattr(view, name)
        if matrix is not None and (len(matrix) != size or any(len(row) != size for row in matrix)):
            widths = sorted({len(row) for row in matrix})
            raise InputError(
                f"{place}.{name} has {len(matrix)} rows of {widths} columns; {size} by {size} is wanted"
            )
    if len(view.lags) != len(view.lag_weights):
        raise InputError(f"{place} has {len(view.lags)} lags and {len(view.lag_weights)} lag_weights")


def _check_chart(place: str, chart: Chart) -> None:
    for line in chart.lines:
        if len(line.x) != len(line.y) or len(line.labels) not in (0, len(line.x)):
            raise InputError(
                f"{place}: line {line.name!r} has {len(line.x)} x, {len(line.y)} y and "
                f"{len(line.labels)} labels; as many of each are wanted, or no label"
            )


def _check_table(place: str, table: Table) -> None:
    for index, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            raise InputError(
                f"{place}: row {index} has {len(row)} cells for {len(table.columns)} columns"
            )
