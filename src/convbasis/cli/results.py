"""A command's result: on the screen, as JSON, and as a page."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as ScreenTable
from torch import Tensor

from .. import __version__
from ..errors import InputError, MissingExtraError, MissingPathError
from ..report.content import Cell, Provenance, Report, Source, Table
from ..report.file import report_json
from ..storage import save_text

STANDARD_OUTPUT = Path("-")
_TOOK_PART = ("transformers", "safetensors", "tokenizers", "gguf", "numpy", "matplotlib")


def screen(json_output: Path | None) -> Console:
    """Return where a command prints for people: standard error where standard output takes JSON."""
    return Console(stderr=json_output == STANDARD_OUTPUT)


def check_outputs(
    json_output: Path | None,
    *files: Path | None,
    page: Path | None = None,
    inputs: Iterable[str | Path | None] = (),
) -> None:
    """Check before long work that files can be written at its end, and that none is read before.

    Args:
        json_output: file for JSON, ``-`` for standard output, None for none.
        files: others to write, None for none.
        page: the same, for a page.
        inputs: files that are read and must stay, None for none; names that are no file are let pass.

    Raises:
        MissingPathError: there is no such folder.
        InputError: a path is a folder, two are the same, one is an input, or ``-`` stands for another
            file than JSON.
        MissingExtraError: what pages are made with is not installed.
        PermissionError: nothing may be written there.
    """
    if STANDARD_OUTPUT in (*files, page):
        raise InputError("'-' stands for standard output in --json alone; name a file")
    if page is not None:
        require_pages()
    paths = [
        path for path in (json_output, *files, page) if path is not None and path != STANDARD_OUTPUT
    ]
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise InputError(f"{', '.join(map(repr, map(str, paths)))}: two outputs cannot go to one file")
    read = {os.path.realpath(path) for path in inputs if path is not None and Path(path).is_file()}
    for path in paths:
        if os.path.realpath(path) in read:
            raise InputError(f"{str(path)!r} is an input; name another file to write")
        if not path.parent.is_dir():
            raise MissingPathError(
                f"there is no folder {str(path.parent)!r} to write {path.name!r} into"
            )
        if path.is_dir():
            raise InputError(f"{str(path)!r} is a folder; name a file in it")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "no permission to write into", str(path.parent))


def require_pages() -> None:
    """Raise MissingExtraError now, rather than after long work, if pages cannot be made."""
    if importlib.util.find_spec("plotly") is None:
        raise MissingExtraError("an HTML page", "report", ImportError("No module named 'plotly'"))


def provenance(
    *, model: str | None = None, sources: Iterable[Source] = (), command: str | None = None
) -> Provenance:
    """Return where figures come from: the command as typed, versions, machine, model and texts."""
    versions = {"convbasis": __version__, "torch": torch.__version__}
    versions["python"] = platform.python_version()
    for name in _TOOK_PART:
        if name in sys.modules:
            versions[name] = version_of(name)
    typed = shlex.join(["convbasis", *sys.argv[1:]]) if command is None else command
    now = datetime.datetime.now(datetime.timezone.utc)
    return Provenance(
        command=typed,
        created=now.isoformat(timespec="seconds"),
        versions=versions,
        threads=torch.get_num_threads(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        model=model,
        sources=tuple(sources),
    )


def version_of(package: str) -> str:
    """Return the version of a package that can be imported."""
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def source(name: str, ids: Tensor) -> Source:
    """Return the fingerprint of a text's tokens ``(1, n)``."""
    digest = hashlib.sha256(repr(ids.tolist()).encode()).hexdigest()
    return Source(name, ids.shape[1], digest)


def deliver(report: Report, console: Console, json_output: Path | None, page: Path | None) -> None:
    """Write the files that are asked for, then print a report's summary, tables and notes.

    So a terminal or a pipe that is closed takes no file with it.
    """
    written = []
    if json_output is not None and json_output != STANDARD_OUTPUT:
        save_text(json_output, report_json(report))
        written.append(json_output)
    if page is not None:
        write_page(report, page)
        written.append(page)
    _print(report, console)
    for path in written:
        console.print(f"written to {escape(str(path))}", highlight=False, soft_wrap=True)
    if json_output == STANDARD_OUTPUT:
        typer.echo(report_json(report), nl=False)


def write_page(report: Report, page: Path) -> None:
    """Write a report as a page."""
    from ..report.html import write_report

    write_report(report, page)


def rounded(value: float, digits: int = 5) -> float:
    """Return a number with so many significant digits, for files that people read."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


def shown(cell: Cell) -> str:
    """Return a cell as people read it."""
    if cell is None:
        return ""
    if isinstance(cell, bool | str):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}"


def _print(report: Report, console: Console) -> None:
    if report.summary:
        summary = ScreenTable(title=escape(report.title), show_header=False)
        for name, value in report.summary:
            summary.add_row(escape(name), escape(shown(value)))
        console.print(summary)
    for table in report.tables:
        console.print(_on_screen(table))
    for note in report.notes:
        console.print(escape(note), highlight=False)


def _on_screen(table: Table) -> ScreenTable:
    made = ScreenTable(title=escape(table.title))
    for index, name in enumerate(table.columns):
        words = any(isinstance(row[index], str) for row in table.rows)
        made.add_column(escape(name), justify="left" if words else "right")
    for row in table.rows:
        made.add_row(*(escape(shown(cell)) for cell in row))
    return made
