"""`convbasis report`: a page from the data that another command wrote with --json."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..report.content import Report
from ..report.file import read_report
from .results import check_outputs, deliver, provenance, write_page


def run_report(source: Path, output: Path, json_output: Path | None, console: Console) -> None:
    """Read a report's data, write its page, and tell what is on it."""
    check_outputs(json_output, page=output, inputs=[source])
    shown = read_report(source)
    write_page(shown, output)
    size = output.stat().st_size
    told = Report(
        title=f"Page of {source.name}",
        provenance=provenance(model=shown.provenance.model, sources=shown.provenance.sources),
        summary=(
            ("title", shown.title),
            ("maps", len(shown.maps)),
            ("heads", len(shown.heads)),
            ("charts", len(shown.charts)),
            ("tables", len(shown.tables)),
            ("bytes of the page", size),
        ),
        notes=(f"written to {output} ({size / 1e6:.1f} MB); open it in a browser",),
    )
    deliver(told, console, json_output, None)
