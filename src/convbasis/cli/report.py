"""`convbasis report`: a page from the data that another command wrote with --json."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..report.file import read_report
from ..report.html import write_report
from .results import check_outputs


def run_report(source: Path, output: Path, console: Console) -> None:
    """Read a report's data and write its page."""
    check_outputs(None, page=output, inputs=[source])
    write_report(read_report(source), output)
    size = output.stat().st_size / 1e6
    console.print(f"written to {escape(str(output))} ({size:.1f} MB); open it in a browser")
