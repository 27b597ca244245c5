"""Products with the matrix laid out, some rows at a time, without any transform.

O(n^2) time, and the fastest way for short sequences and short segments. With a kernel reversed in
memory and rows taken from the last to the first, the entries of a segment are a strided view of its
kernel: laying them out copies runs of neighbours, and no index is computed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..workspace import take

_TILE_ENTRIES = 1 << 18  # entries of the matrices that are laid out at a time
_WHOLE_ROWS = 2048  # tokens up to which all columns of a row are laid out at a time
_TILE_COLUMNS = 1024  # columns at a time of longer rows


def direct_product(
    kernels: Tensor,
    starts: Tensor,
    x: Tensor,
    transpose: bool = False,
    *,
    row_sums: Tensor | None = None,
) -> Tensor:
    """Return segmented matrices, or their transposes, times x.

    Args:
        kernels: ``(G, k, n)``, zero past lag n - 1 - start.
        starts: ``(G, k)`` or ``(1, k)``.
        x: ``(G, n, c)``, dtype of kernels.
        transpose: multiply with the transposes.
        row_sums: ``(G, n)`` of zeros, to be filled with the sums of the matrices' rows, for less than
            one more column of x costs; None for none, and always with transposes.

    Returns:
        ``(G, n, c)``.

    Complexity: O(n^2 c) time for each matrix.
    """
    result = torch.zeros_like(x)
    for at, entries in laid_out_rows(kernels, starts, 0.0):
        part, rows, columns = at.matrices, at.rows, at.columns
        if transpose:
            result[part, columns].baddbmm_(entries.mT, x[part, rows].flip(1))
            continue
        shape = (*entries.shape[:2], x.shape[-1])
        product = take("laid out rows", shape, x.dtype, x.device)
        torch.bmm(entries, x[part, columns], out=product)
        result[part, rows] += product.flip(1)
        if row_sums is not None:
            row_sums[part, rows] += entries.sum(-1).flip(1)
    return result


class Place(NamedTuple):
    """Where laid-out entries stand."""

    matrices: slice
    """Of the G matrices."""
    rows: slice
    columns: slice
    runs: list[tuple[int, int]]
    """Segments that the columns are of, with the first of these columns of each."""

    def stops(self) -> list[int]:
        """Return the column after the last one of each run."""
        return [*(first for _, first in self.runs[1:]), self.columns.stop]

    def uniform_width(self) -> int:
        """Return the columns of each run where all have as many, else 0."""
        widths = {stop - first for (_, first), stop in zip(self.runs, self.stops(), strict=True)}
        return widths.pop() if len(widths) == 1 else 0


def laid_out_rows(kernels: Tensor, starts: Tensor, fill: float) -> Iterator[tuple[Place, Tensor]]:
    """Yield all of segmented matrices, a tile at a time: some rows, and columns up to the diagonal.

    Args:
        kernels: ``(G, k, n)``.
        starts: ``(G, k)`` or ``(1, k)``.
        fill: the entries above the diagonal.

    Yields:
        place and entries ``(g, rows, columns)``, *the last row first*; they may be overwritten, and
        hold until the next ones.
    """
    groups, _, n = kernels.shape
    lists = starts.tolist()
    backward = torch.nn.functional.pad(kernels.flip(-1), (0, n), value=fill)
    # Matrices with the same segments are laid out together while they are small.
    together = max(1, _TILE_ENTRIES // (n * n)) if len(lists) == 1 else 1
    width = n if n <= _WHOLE_ROWS else _TILE_COLUMNS
    for low in range(0, groups, together):
        part = slice(low, min(groups, low + together))
        own = [start for start in lists[low if len(lists) > 1 else 0] if start < n]
        if not own:
            continue
        step = max(1, min(n, _TILE_ENTRIES // ((part.stop - part.start) * width)))
        for end in range(n, own[0], -step):
            rows = slice(max(own[0], end - step), end)
            for first in range(own[0], end, width):
                columns = slice(first, min(end, first + width))
                place = Place(part, rows, columns, _runs(own, columns))
                yield place, _laid_out(backward[part], place)


def _runs(starts: list[int], columns: slice) -> list[tuple[int, int]]:
    low = bisect_right(starts, columns.start) - 1
    high = bisect_left(starts, columns.stop)
    return [(r, max(columns.start, starts[r])) for r in range(low, high)]


def _laid_out(backward: Tensor, place: Place) -> Tensor:
    """Return rows end-1, end-2, ..., begin of the matrices, and some of their columns.

    Args:
        backward: ``(g, k, 2 n)``: kernels from last entry to first, then what is above the diagonal.
        place: of what is laid out.
    """
    groups, _, double = backward.shape
    rows, width = place.rows.stop - place.rows.start, place.columns.stop - place.columns.start
    # Entry (i, j) is kernel[i - j] = backward[n - 1 - i + j]; the first of these rows is i = end - 1.
    base = backward.storage_offset() + double // 2 - place.rows.stop
    per_group, per_segment, _ = backward.stride()
    run = place.uniform_width()
    segment, first = place.runs[0]
    if run:
        shape = (groups, rows, len(place.runs), run)
        steps = (per_group, 1, per_segment + run, 1)
        laid_out = take("laid out", shape, backward.dtype, backward.device)
        view = backward.as_strided(shape, steps, base + segment * per_segment + first)
        return laid_out.copy_(view).flatten(2)
    parts = []
    for (segment, first), stop in zip(place.runs, place.stops(), strict=True):
        offset = base + segment * per_segment + first
        parts.append(backward.as_strided((groups, rows, stop - first), (per_group, 1, 1), offset))
    laid_out = take("laid out", (groups, rows, width), backward.dtype, backward.device)
    return torch.cat(parts, dim=-1, out=laid_out)


class KernelSums:
    """The adjoint of laying out: sums over the entries that were the same entry of a kernel."""

    def __init__(self, kernels: Tensor) -> None:
        """Begin with zeros like kernels, ``(G, k, n)``."""
        self._n = kernels.shape[-1]
        self._backward = kernels.new_zeros((*kernels.shape[:-1], 2 * self._n))

    def add(self, place: Place, entries: Tensor) -> None:
        """Add entries ``(g, rows, columns)`` that stand where `laid_out_rows` says."""
        backward = self._backward[place.matrices]
        base = self._n - place.rows.stop
        per_group, per_segment, _ = backward.stride()
        run = place.uniform_width()
        if run:
            segment, first = place.runs[0]
            sums = _diagonal_sums(entries.unflatten(2, (len(place.runs), run)).transpose(1, 2))
            offset = backward.storage_offset() + base + segment * per_segment + first
            backward.as_strided(sums.shape, (per_group, per_segment + run, 1), offset).add_(sums)
            return
        begin = place.columns.start
        for (segment, first), stop in zip(place.runs, place.stops(), strict=True):
            sums = _diagonal_sums(entries[..., first - begin : stop - begin])
            low = base + first
            backward[:, segment, low : low + sums.shape[-1]] += sums

    def kernels(self) -> Tensor:
        """Return the sums, ``(G, k, n)`` by lag."""
        return self._backward[..., : self._n].flip(-1)


def _diagonal_sums(entries: Tensor) -> Tensor:
    """Return the sums ``(..., rows + columns - 1)`` over ``row + column`` of ``(..., rows, columns)``.

    Squares are written into rows that are longer by one than how they are read: each row then stands
    one further to the right than the one before, and columns are what is summed.
    """
    rows, columns = entries.shape[-2:]
    height = min(rows, columns)
    squares = -(-rows // height)
    length = columns + height
    padded = entries.new_zeros((*entries.shape[:-2], squares * height, length))
    padded[..., :rows, :columns] = entries
    flat = padded.unflatten(-2, (squares, height)).flatten(-2)[..., : height * (length - 1)]
    sums = flat.unflatten(-1, (height, length - 1)).sum(-2)
    result = entries.new_zeros((*entries.shape[:-2], squares * height + columns - 1))
    for index in range(squares):
        result[..., index * height : index * height + length - 1] += sums[..., index, :]
    return result[..., : rows + columns - 1]
