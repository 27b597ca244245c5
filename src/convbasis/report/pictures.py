"""What the page's script draws from: charts and heads as compact plain data, numbers rounded."""

from __future__ import annotations

import json
from typing import Any

from .content import Chart, HeadView, Report
from .words import rounded


def pictures_json(report: Report) -> str:
    """Return the data as JSON that can stand inside a script element: it holds no markup at all."""
    content = {
        "charts": [_chart(chart) for chart in report.charts],
        "heads": [_view(view) for view in report.heads],
    }
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _chart(chart: Chart) -> dict[str, Any]:
    return {
        "title": chart.title,
        "x": {"title": chart.x_title, "log": chart.x_log},
        "y": {"title": chart.y_title, "log": chart.y_log},
        "lines": [
            {
                "name": line.name,
                "x": [rounded(x) for x in line.x],
                "y": [rounded(y) for y in line.y],
                "labels": line.labels,
                "joined": line.joined,
            }
            for line in chart.lines
        ],
        "marked": chart.marked,
        "level": chart.level,
        "crossings": chart.crossings,
    }


def _view(view: HeadView) -> dict[str, Any]:
    return {
        "layer": view.layer,
        "head": view.head,
        "caption": view.caption,
        "first": view.first,
        "tile": view.tile,
        "size": 0 if view.exact is None else len(view.exact),
        "exact": _triangle(view.exact),
        "approximate": _triangle(view.approximate),
        "lags": view.lags,
        "weights": [rounded(weight) for weight in view.lag_weights],
    }


def _triangle(matrix: tuple[tuple[float, ...], ...] | None) -> list[float | int] | None:
    """Return the lower triangle, row after row."""
    if matrix is None:
        return None
    return [rounded(entry, 3) for index, row in enumerate(matrix) for entry in row[: index + 1]]
