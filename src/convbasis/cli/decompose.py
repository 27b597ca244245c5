"""`convbasis decompose`: the conv basis of a matrix in a file, and what a tolerance would save."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table as ScreenTable
from torch import Tensor

from .. import __version__
from ..basis import ConvBasis
from ..decompose import decompose
from ..matrices import read_matrix
from ..report.content import Cell, Provenance, Report, Table
from ..storage import save_text

STANDARD_OUTPUT = Path("-")
# Parts of the largest entry.
_TOLERANCES = (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
_LISTED_SEGMENTS = 16


def run_decompose(
    source: Path,
    output: Path | None,
    tol: float,
    key: str | None,
    json_output: Path | None,
    console: Console,
) -> None:
    """Decompose the matrix of a file, and tell how large its basis is.

    Args:
        source: a .npy, .npz or .safetensors file with a lower-triangular matrix.
        output: safetensors file for the basis, or None.
        tol: the largest error of an entry, in the units of the matrix.
        key: name of the array in the file, see `read_matrix`.
        json_output: file for the same as strict JSON, or None; ``-`` for standard output, which then
            gets nothing else.
        console: where the tables go.

    Raises:
        FileFormatError: the file is damaged or holds no real square matrix.
        InputError: the matrix is not lower triangular or not finite, tol is negative, or key is needed.
        MissingPathError: there is no such file, or no folder for an output.
    """
    matrix = read_matrix(source, key)
    basis = decompose(matrix, tol=tol)
    with Progress(console=console, transient=True) as progress:
        sizes = [
            _size(matrix, relative)
            for relative in progress.track(_TOLERANCES, description="other tolerances")
        ]
    report = _report(source, matrix, basis, tol, sizes)
    if output is not None:
        basis.save(output)
    if json_output != STANDARD_OUTPUT:
        _print(report, console)
        if output is not None:
            console.print(f"Basis: {escape(str(output))}", highlight=False, soft_wrap=True)
    if json_output is None:
        return
    content = {"format": "convbasis.report", "version": 1, **dataclasses.asdict(report)}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if json_output == STANDARD_OUTPUT:
        sys.stdout.write(text)
    else:
        save_text(json_output, text)


def _errors(matrix: Tensor, basis: ConvBasis) -> tuple[float, float]:
    """Return the largest error of an entry, and the relative error of the whole matrix."""
    exact = matrix.double()
    difference = basis.to_dense().double() - exact
    norm = float(exact.norm())
    return float(difference.abs().max()), float(difference.norm()) / norm if norm else 0.0


def _stored(basis: ConvBasis) -> int:
    """Return the bytes of a basis."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in (basis.segment_kernels, basis.starts)
    )


def _size(matrix: Tensor, relative: float) -> tuple[Cell, ...]:
    """Return a row of the table of tolerances."""
    tol = relative * float(matrix.abs().max())
    basis = decompose(matrix, tol=tol)
    dense = matrix.numel() * matrix.element_size()
    return relative, tol, basis.k, _stored(basis) / dense, *_errors(matrix, basis)


def _report(
    source: Path, matrix: Tensor, basis: ConvBasis, tol: float, sizes: list[tuple[Cell, ...]]
) -> Report:
    n, k = basis.n, basis.k
    largest, relative = _errors(matrix, basis)
    dense = matrix.numel() * matrix.element_size()
    starts = [*basis.starts.tolist(), n]
    peaks = basis.segment_kernels.abs().amax(-1).tolist()
    rows = tuple(
        (index, starts[index], starts[index + 1] - starts[index], peaks[index])
        for index in range(min(k, _LISTED_SEGMENTS))
    )
    listed = f"the first {_LISTED_SEGMENTS} of {k:,}" if k > _LISTED_SEGMENTS else f"{k}"
    return Report(
        title=f"Conv basis of {source.name}",
        provenance=_provenance(),
        summary=(
            ("n", n),
            ("k, bases of the matrix", k),
            ("tolerance of an entry", float(tol)),
            ("dtype", str(matrix.dtype).removeprefix("torch.")),
            ("bytes of the basis", _stored(basis)),
            ("bytes of the dense matrix", dense),
            ("basis / dense", _stored(basis) / dense),
            ("largest error of an entry", largest),
            ("relative error of the matrix", relative),
        ),
        tables=(
            Table(f"Segments: {listed}", ("segment", "first column", "columns", "largest entry"), rows),
            Table(
                "What a tolerance saves",
                (
                    "tolerance / largest entry",
                    "tolerance",
                    "k",
                    "basis / dense",
                    "largest error",
                    "relative error",
                ),
                tuple(sizes),
            ),
        ),
        notes=(
            "The basis has the fewest segments of all whose entries are within the tolerance. It saves "
            "memory where k is far below n.",
        ),
    )


def _provenance() -> Provenance:
    versions = {
        "convbasis": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return Provenance(
        command=" ".join(["convbasis", *sys.argv[1:]]),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions=versions,
        threads=torch.get_num_threads(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
    )


def _print(report: Report, console: Console) -> None:
    summary = ScreenTable(title=escape(report.title), show_header=False)
    for name, value in report.summary:
        summary.add_row(escape(name), escape(_shown(value)))
    console.print(summary)
    for table in report.tables:
        made = ScreenTable(title=escape(table.title))
        for name in table.columns:
            made.add_column(escape(name), justify="right")
        for row in table.rows:
            made.add_row(*(escape(_shown(cell)) for cell in row))
        console.print(made)
    for note in report.notes:
        console.print(escape(note), highlight=False)


def _shown(cell: Cell) -> str:
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
