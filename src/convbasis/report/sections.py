"""The sections of a page: for each a name, a title, and what makes it of a report."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from .content import Chart, Report
from .maps import map_html
from .tables import details, table_html
from .words import cell_html, number_text


def _summary(report: Report) -> str:
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{cell_html(value)}</dd></div>" for name, value in report.summary
    )
    return f'<dl class="cards">{cards}</dl>' if cards else ""


def _notes(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f'<ul class="notes">{notes}</ul>' if notes else ""


def _heads(report: Report) -> str:
    if not report.maps and not report.heads:
        return ""
    viewed = {(view.layer, view.head) for view in report.heads}
    maps = "".join(map_html(one, index, viewed) for index, one in enumerate(report.maps))
    mark = " Heads with a dot have pictures." if viewed and maps else ""
    help_text = (
        f'<p class="muted">Choose a head by a click, or with the arrow keys.{mark}</p>' if maps else ""
    )
    chooser = (
        '<label>Heads with pictures <select id="chooser"></select></label>' if report.heads else ""
    )
    pictures = _HEAD_PICTURES if report.heads else ""
    layout = "pair" if maps else "single"
    left = f'<div class="maps">{maps}</div>' if maps else ""
    return (
        f'{help_text}<div class="{layout}">{left}<section class="view" aria-labelledby="view-title">'
        f'<div class="viewbar"><h3 id="view-title">No head chosen</h3>{chooser}</div>'
        f'<div aria-live="polite"><dl id="view-values"></dl><p id="view-caption"></p></div>{pictures}'
        "</section></div>"
    )


_HEAD_PICTURES = """<div id="view-pictures" hidden><div class="plots">
<figure><figcaption>Exact attention</figcaption><div class="plot square" id="view-exact" role="img"></div></figure>
<figure><figcaption>Approximation</figcaption><div class="plot square" id="view-approximate" role="img"></div></figure>
<figure><figcaption>Approximation − exact</figcaption><div class="plot square" id="view-difference" role="img"></div></figure>
<figure><figcaption>Mean weight by lag</figcaption><div class="plot square" id="view-lags" role="img"></div></figure>
</div><div class="legends">
<div class="legend" id="legend-weight"><div class="ramp" aria-hidden="true"></div><div class="ticks"></div><p class="muted">attention weight, logarithmic</p></div>
<div class="legend" id="legend-difference"><div class="ramp both" aria-hidden="true"></div><div class="ticks"></div><p class="muted">difference of weights</p></div>
</div><details id="view-figures"><summary>Figures as a table</summary><div></div></details></div>"""


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
        ("Model", escape(where.model) if where.model is not None else "–"),
        ("Made", escape(where.created)),
        ("Machine", escape(where.machine)),
        ("Threads", number_text(where.threads)),
        ("Versions", escape(", ".join(f"{name} {number}" for name, number in where.versions.items()))),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    sources = [(source.name, source.tokens, source.sha256) for source in where.sources]
    texts = (
        f'<h3>Texts</h3>{table_html("Texts", ("name", "tokens", "SHA-256"), sources)}' if sources else ""
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
