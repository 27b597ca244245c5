"""`convbasis decompose`: the conv basis of a matrix in a file, and what a tolerance would save."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from torch import Tensor

from ..basis import ConvBasis
from ..decompose import decompose
from ..matrices import read_matrix
from ..report.content import Chart, Line, Provenance, Report, Table
from .progress import one_bar
from .results import check_outputs, deliver, provenance

# Parts of the largest entry.
_TOLERANCES = (0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
_LISTED_SEGMENTS = 16


class Saved(NamedTuple):
    """What a tolerance saves, and what it loses."""

    relative: float
    """The tolerance as a part of the largest entry."""
    tol: float
    k: int
    share: float
    """Bytes of the basis over those of the dense matrix."""
    largest: float
    """Error of an entry."""
    error: float
    """Relative error of the matrix."""


def run_decompose(
    source: Path,
    output: Path | None,
    tol: float,
    key: str | None,
    json_output: Path | None,
    page: Path | None,
    console: Console,
) -> None:
    """Decompose the matrix of a file, and tell how large its basis is.

    Args:
        source: a .npy, .npz or .safetensors file with a lower-triangular matrix.
        output: safetensors file for the basis, or None.
        tol: the largest error of an entry, in the units of the matrix.
        key: name of the array in the file, see `read_matrix`.
        json_output: file for the same as strict JSON, or None; ``-`` for standard output.
        page: file for the same as a page, or None.
        console: where the tables go.

    Raises:
        FileFormatError: the file is damaged or holds no real square matrix.
        InputError: the matrix is not lower triangular or not finite, tol is negative, or key is needed.
        MissingPathError: there is no such file, or no folder for an output.
    """
    check_outputs(json_output, output, page=page, inputs=[source])
    matrix = read_matrix(source, key)
    basis = decompose(matrix, tol=tol)
    saved: list[Saved] = []
    with one_bar("other tolerances", len(_TOLERANCES)) as step:
        for relative in _TOLERANCES:
            saved.append(_saved(matrix, relative))
            step(len(saved), len(_TOLERANCES))
    if output is not None:
        basis.save(output)
    deliver(_report(source, matrix, basis, tol, saved, provenance()), console, json_output, page)
    if output is not None:
        console.print(f"Basis: {escape(str(output))}", highlight=False, soft_wrap=True)


def _errors(matrix: Tensor, basis: ConvBasis) -> tuple[float, float]:
    """Return the largest error of an entry, and the relative error of the whole matrix."""
    exact = matrix.double()
    difference = basis.to_dense().double() - exact
    # Squares of large and of small entries are none.
    unit = float(exact.abs().max()) or 1.0
    norm = float((exact / unit).norm()) or 1.0
    return float(difference.abs().max()), float((difference / unit).norm()) / norm


def _stored(basis: ConvBasis) -> int:
    """Return the bytes of a basis."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in (basis.segment_kernels, basis.starts)
    )


def _saved(matrix: Tensor, relative: float) -> Saved:
    """Return what a tolerance saves."""
    tol = relative * float(matrix.abs().max())
    basis = decompose(matrix, tol=tol)
    dense = matrix.numel() * matrix.element_size()
    return Saved(relative, tol, basis.k, _stored(basis) / dense, *_errors(matrix, basis))


def _report(
    source: Path,
    matrix: Tensor,
    basis: ConvBasis,
    tol: float,
    saved: list[Saved],
    where: Provenance,
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
        provenance=where,
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
        charts=(
            Chart(
                title="What a tolerance saves",
                x_title="tolerance / largest entry",
                y_title="bytes, basis / dense",
                lines=(
                    Line(
                        "conv basis",
                        tuple(one.relative for one in saved if one.relative),
                        tuple(one.share for one in saved if one.relative),
                        tuple(f"k = {one.k:,}" for one in saved if one.relative),
                    ),
                ),
                x_log=True,
                level=(1.0, "as large as the dense matrix"),
            ),
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
                tuple(map(tuple, saved)),
            ),
        ),
        notes=(
            "The basis has the fewest segments of all whose entries are within the tolerance. It saves "
            "memory where k is far below n.",
        ),
    )
