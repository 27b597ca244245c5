"""The sections of a page: for each a name, a title, and what makes it of a report."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from .content import Cell, Chart, Report
from .maps import map_html
from .tables import details, table_html
from .words import cell_html, number_text

_BESIDE = 24
"""Heads that a map may be wide to stand beside the chosen head and not above it."""

_SHORT_TITLE = 24
"""Letters that stand in one line above a map of few heads; beyond, every title gets two lines."""


def _summary(report: Report) -> str:
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd{_small(value)}>{cell_html(value)}</dd></div>"
        for name, value in report.summary
    )
    return f'<dl class="cards">{cards}</dl>' if cards else ""


def _small(value: Cell) -> str:
    return ' class="words"' if isinstance(value, str) and len(value) > 12 else ""


def _notes(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f'<ul class="notes">{notes}</ul>' if notes else ""


def _heads(report: Report) -> str:
    if not report.maps and not report.heads:
        return ""
    viewed = {(view.layer, view.head) for view in report.heads if view.exact is not None}
    maps = "".join(map_html(one, index, viewed) for index, one in enumerate(report.maps))
    mark = " A dark corner marks heads with pictures." if viewed and maps else ""
    help_text = (
        '<p class="muted">Layers down, heads across. Choose a head by a click, or with the arrow keys.'
        f"{mark}</p>"
        if maps
        else ""
    )
    chooser = '<label>Heads with pictures <select id="chooser"></select></label>' if viewed else ""
    pictures = _HEAD_PICTURES if report.heads else ""
    wide = any(len(one.values[0]) > _BESIDE for one in report.maps)
    layout = "pair" if maps and not wide else "stack"
    jump = '<a class="jump" href="#view-title" hidden></a>'
    titles = " long-titles" if any(len(one.title) > _SHORT_TITLE for one in report.maps) else ""
    left = f'<div class="maps{titles}">{maps}{jump}</div>' if maps else ""
    return (
        f'{help_text}<div class="{layout}">{left}<section class="view" aria-labelledby="view-title">'
        f'<div class="viewbar"><h3 id="view-title">No head chosen</h3>{chooser}</div>'
        f'<div aria-live="polite"><dl id="view-values"></dl><p id="view-caption"></p></div>{pictures}'
        "</section></div>"
    )


def _picture(name: str, title: str, legend: str = "") -> str:
    plot = f'<div class="plot square" id="view-{name}" role="img"></div>'
    kind = "" if name == "lags" else ' class="matrix"'
    return f"<figure{kind}><figcaption>{title}</figcaption>{plot}{legend}</figure>"


def _legend(name: str, title: str, kind: str) -> str:
    return (
        f'<div class="legend matrix" id="legend-{name}"><div class="{kind}" aria-hidden="true"></div>'
        f'<div class="ticks"></div><p class="muted">{title}</p></div>'
    )


_HEAD_PICTURES = (
    '<div id="view-pictures" hidden><div class="groups"><div class="plots">'
    + _picture("exact", "Exact attention")
    + _picture("approximate", "Approximation")
    + _legend("weight", "attention weight, logarithmic", "ramp")
    + '</div><div class="plots">'
    + _picture(
        "difference",
        "Approximation minus exact",
        _legend("difference", "difference of weights", "ramp both"),
    )
    + _picture("lags", "Mean weight by lag")
    + '</div></div><details id="view-figures"><summary>Figures as a table</summary><div></div>'
    + "</details></div>"
)


def _charts(report: Report) -> str:
    return "".join(_chart(chart, index) for index, chart in enumerate(report.charts))


def _chart(chart: Chart, index: int) -> str:
    title = escape(chart.title)
    label = escape(f"{chart.title}: {chart.y_title} over {chart.x_title}; figures in the table below")
    labelled = any(line.labels for line in chart.lines)
    rows = [
        (line.name, x, y, *((line.labels[at] if line.labels else None,) if labelled else ()))
        for line in chart.lines
        for at, (x, y) in enumerate(zip(line.x, line.y, strict=True))
    ]
    marks = (*((chart.marked,) if chart.marked else ()), *chart.crossings)
    rows += [(name, x, y, *((None,) if labelled else ())) for x, y, name in marks]
    columns = ("line", chart.x_title, chart.y_title, *(("point",) if labelled else ()))
    beneath = _not_drawn(chart)
    return (
        f'<figure class="chart"><figcaption><h3>{title}</h3></figcaption>'
        f'<div class="plot" data-chart="{index}" role="img" aria-label="{label}"></div>{beneath}'
        f"{details(table_html(f'{chart.title}: figures', columns, rows))}</figure>"
    )


def _not_drawn(chart: Chart) -> str:
    """Return a sentence about points that have no place on a logarithmic axis."""
    lost = sum(
        (chart.x_log and x <= 0) or (chart.y_log and y <= 0)
        for line in chart.lines
        for x, y in zip(line.x, line.y, strict=True)
    )
    if not lost:
        return ""
    points = "1 point is" if lost == 1 else f"{number_text(lost)} points are"
    return (
        f'<p class="muted">{points} not drawn: 0 or less has no place on a logarithmic axis. '
        "The table has all.</p>"
    )


def _tables(report: Report) -> str:
    return "".join(
        f'<div class="table"><h3>{escape(table.title)}</h3>'
        f"{table_html(table.title, table.columns, table.rows)}</div>"
        for table in report.tables
    )


def _provenance(report: Report) -> str:
    where = report.provenance
    facts = [
        ("Command", f"<code>{escape(where.command)}</code>"),
        ("Model", escape(where.model) if where.model is not None else "—"),
        ("Made", escape(where.created)),
        ("Machine", escape(where.machine)),
        ("Threads", number_text(where.threads)),
        ("Versions", escape(", ".join(f"{name} {number}" for name, number in where.versions.items()))),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    sources = [(source.name, source.tokens, source.sha256) for source in where.sources]
    texts = (
        f"<h3>Texts</h3>{table_html('Texts', ('name', 'tokens', 'SHA-256'), sources)}"
        if sources
        else ""
    )
    return f'<dl class="facts-list">{listed}</dl>{texts}'


SECTIONS: tuple[tuple[str, str, Callable[[Report], str]], ...] = (
    ("summary", "Summary", _summary),
    ("notes", "Notes", _notes),
    ("heads", "Heads", _heads),
    ("charts", "Charts", _charts),
    ("tables", "Tables", _tables),
    ("provenance", "Provenance", _provenance),
)
