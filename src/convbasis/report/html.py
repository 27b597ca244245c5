"""Reports as one HTML file that needs nothing else and asks no network for anything."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from html import escape
from pathlib import Path

from ..errors import MissingExtraError
from ..storage import save_text
from .consistency import check_report
from .content import Report
from .pictures import pictures_json
from .sections import SECTIONS
from .words import time_text

_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("colours.js", "plots.js", "charts.js", "heads.js", "start.js")


def write_report(report: Report, path: Path) -> None:
    """Write a report as a page; an interruption leaves an older file as it was.

    Args:
        report: what to show.
        path: the file, usually ``*.html``; about 2 MB, most of it the library that draws.

    Raises:
        InputError: parts of the report do not agree, or the path is a folder.
        MissingPathError: there is no such folder.
        MissingExtraError: plotly is not installed.
    """
    save_text(path, report_html(report))


def report_html(report: Report) -> str:
    """Return a report as the text of a page.

    Raises:
        InputError: parts of the report do not agree; the message names the place.
        MissingExtraError: plotly is not installed.
    """
    check_report(report)
    plotly = _plotly()
    script = "\n".join((_PAGE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f'"use strict";(() => {{\n{script}}})();'
    sections = [(name, title, make(report)) for name, title, make in SECTIONS]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in shown)
    main = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{title}</h2>{body}</section>'
        for name, title, body in shown
    )
    provenance = report.provenance
    model = f"<span>{escape(provenance.model)}</span>" if provenance.model is not None else ""
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(script, plotly)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(report.title)}</title>
<link rel="icon" href="data:,">
<style>
{(_PAGE / "style.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<div class="bar"><span class="mark">convbasis</span>
<button id="theme" type="button" hidden>Dark</button></div>
<h1>{escape(report.title)}</h1>
<p class="muted facts">{model}<span>{escape(time_text(provenance.created))}</span></p>
<nav aria-label="Contents">{links}</nav>
</header>
<main id="main" tabindex="-1">
<noscript><p class="notice">Pictures need JavaScript, which this browser does not run;
all figures of maps and charts are in the tables.</p></noscript>
<p class="notice" id="failure" role="alert" hidden></p>
{main}</main>
<!-- {_banner(plotly)} -->
<script type="application/json" id="pictures">{pictures_json(report)}</script>
<script type="text/plain" id="plotly">{_packed(plotly)}</script>
<script>{script}</script>
</body>
</html>
"""
    # Half of a surrogate pair, as in names of files that are not UTF-8, has no bytes.
    return text.encode("utf-8", "replace").decode()


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("a report as HTML", "report", error) from error
    return str(get_plotlyjs())


def _policy(*scripts: str) -> str:
    """Return a policy that runs these scripts alone and connects to nothing."""
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    sources = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _packed(script: str) -> str:
    """Return the script compressed, which is less than half its size; the page unpacks it."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def _banner(script: str) -> str:
    """Return the library's own notice of its version and licence, as text of a comment."""
    found = re.match(r"\s*/\*+(.*?)\*/", script, re.DOTALL)
    lines = (line.strip(" *") for line in (found.group(1) if found else "plotly.js").splitlines())
    return "; ".join(line for line in lines if line).replace("--", "")
