"""Transposed partitioned products, and gradients with respect to the matrix: correlations.

With the windows and pieces of `partition`, ``^`` their transforms and ``*`` the conjugate, the gradient
``g`` of a product, cut into blocks, gives frequency by frequency

    ^dx_piece = Σ_blocks ^window*_{block, piece} · ^g_block
    ^dwindow_{block, piece} = Σ_columns ^g_block · ^x*_piece

so that both are matrix products of the size of the product's own: O(n c log N + k n log N + p n c N /
M) time with p pieces, as `partitioned`.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from ..workspace import take
from .partition import Partition
from .spectra import (
    CHUNK_BYTES,
    Group,
    Recorded,
    WindowSpectra,
    by_row,
    column_step,
    piece_spectra,
    row_noise,
    spectra_memory,
)
from .windows import Windows


class Outer(NamedTuple):
    """The gradient of a product ``A x`` and ``A weights``, whose rows are still to be scaled."""

    rows: Tensor
    """``(n, c)``."""
    shared: Tensor | None
    """``(n,)``, of the product with the weights; None where there are none."""
    lse: Tensor | None
    """``(n,)``: row i counts exp(-lse[i]) times; inf for rows that do not count. None for once each."""


class ProductGradients(NamedTuple):
    """Gradients of a product, and what rounding they may hold."""

    x: Tensor
    """``(n, c)``, 0 before the first segment."""
    weights: Tensor | None
    """``(n,)``."""
    columns: Tensor | None
    """``(k, n)``: of the columns at segment starts, by row; times these columns if logarithmic."""
    noise: Tensor
    """``(n,)`` float64, expected rounding error of the rows of x, and of weights, in the 2-norm."""
    column_noise: float
    """Expected rounding error of columns in the 2-norm, of all together."""


def partitioned_gradients(
    windows: Windows,
    partition: Partition,
    x: Tensor,
    weights: Tensor | None,
    outer: Outer,
    max_bytes: int,
    *,
    of_columns: bool,
    logarithmic: bool = False,
    dtype: torch.dtype | None = None,
    result: torch.dtype | None = None,
) -> ProductGradients:
    """Return the gradients of a partitioned product.

    Args:
        windows: of the matrix.
        partition: of the matrix; at least one segment.
        x: ``(n, c)``; not used unless of_columns.
        weights: ``(n,)``, one more column of x, or None.
        outer: the gradient of the products.
        max_bytes: bound on the memory of spectra; never below one column.
        of_columns: find the gradient with respect to the matrix too.
        logarithmic: with respect to the logarithms of the entries of its columns.
        dtype: to work in, that of the windows; the others are converted block by block. That of the
            outer rows by default.
        result: dtype of the gradient of x; that of the work by default.
    """
    dtype = outer.rows.dtype if dtype is None else dtype
    result = dtype if result is None else result
    job = _Job(windows, partition, x, weights, outer, max_bytes, of_columns, logarithmic, dtype, result)
    return job.run()


class _Job:
    """One evaluation of `partitioned_gradients`."""

    def __init__(
        self,
        windows: Windows,
        partition: Partition,
        x: Tensor,
        weights: Tensor | None,
        outer: Outer,
        max_bytes: int,
        of_columns: bool,
        logarithmic: bool,
        dtype: torch.dtype,
        result: torch.dtype,
    ) -> None:
        self.partition, self.x, self.weights, self.outer = partition, x, weights, outer
        self.logarithmic, self.of_columns = logarithmic, of_columns
        self.dtype, self.device = dtype, outer.rows.device
        sizes, columns = partition.sizes, outer.rows.shape[-1]
        pieces = len(partition.pieces)
        item = self.dtype.itemsize
        self.step = column_step(pieces, sizes.bins, columns, 2 * item, max_bytes)
        self.spectra = WindowSpectra(
            windows,
            partition,
            self.step,
            self.dtype.to_complex(),
            True,
            max_bytes,
            conjugate=True,
            record=of_columns,
        )
        if self.step < columns:
            self.spectra.keep_within(max_bytes // 2)
        segments = len(partition.starts)
        self.of_x = torch.empty(outer.rows.shape, dtype=result, device=self.device)
        self.of_x[: partition.starts[0]] = 0.0
        self.of_weights = None if weights is None else torch.zeros_like(weights, dtype=dtype)
        # Laid out as windows are: S rows before the first block.
        extent = sizes.piece + partition.blocks * sizes.block
        self.columns = None
        if of_columns:
            self.columns = torch.zeros((segments, extent), dtype=dtype, device=self.device)
        self.of_pieces = torch.zeros(pieces, dtype=torch.float64, device=self.device)
        self.of_windows = torch.zeros((), dtype=torch.float64, device=self.device)

    def run(self) -> ProductGradients:
        """Go through the columns of x, some at a time."""
        partition, columns = self.partition, self.outer.rows.shape[-1]
        for low in range(0, max(1, columns), self.step):
            self._some_columns(low, min(columns, low + self.step))
        noise = row_noise(self.of_pieces, partition.sizes.transform, self.dtype)
        lengths = [piece.high - piece.low for piece in partition.pieces]
        by_row = noise.repeat_interleave(torch.tensor(lengths, device=self.device))
        columns_noise = row_noise(self.of_windows, partition.sizes.transform, self.dtype)
        before = partition.sizes.piece
        return ProductGradients(
            self.of_x,
            self.of_weights,
            None if self.columns is None else self.columns[:, before : before + partition.n],
            torch.nn.functional.pad(by_row, (partition.n - len(by_row), 0)),
            float(columns_noise),
        )

    def _some_columns(self, low: int, high: int) -> None:
        partition, sizes = self.partition, self.partition.sizes
        weights = self.weights if low == 0 else None
        shared = self.outer.shared if low == 0 else None
        width = high - low + (weights is not None)
        pieces = len(partition.pieces)
        inner = squares = None
        if self.of_columns:
            inner, squares = piece_spectra(
                self.x[:, low:high], weights, self.dtype, partition, True, conjugate=True
            )
        shape = (sizes.bins, pieces, width)
        total = take("transposed product", shape, self.dtype.to_complex(), self.device)
        pending = _Pending(self)
        for group in self.spectra.groups():
            count = group.squares.shape[1]
            right, norms = self._outer_spectra(low, high, shared, group)
            left = group.spectra.permute(1, 2, 0)
            if group.first == 0 and count == pieces:
                torch.bmm(left, right, out=total)
            else:
                if group.first == 0:
                    total.zero_()
                total[:, :count].baddbmm_(left, right)
            of_blocks = norms.sum(-1)
            self.of_pieces[:count] += 4.0 * (group.squares.double().t() @ of_blocks)
            if inner is None or squares is None:
                continue
            change = torch.bmm(right, inner[:count].permute(1, 2, 0))
            entered = norms @ squares[:count].double().t()
            self.of_windows += 4.0 * (entered * group.squares.double()).sum()
            for recorded in group.recorded:
                begin = recorded.first - group.first
                own = change[:, begin : begin + recorded.blocks]
                if partition.levels > 1:
                    pending.take_in(recorded, own)
                else:
                    self._add(recorded, by_row(own[..., : len(recorded.rows)], 0, recorded.blocks))
        pending.finish()
        self._pieces_back(total, low, high)

    def _outer_spectra(
        self, low: int, high: int, shared: Tensor | None, group: Group
    ) -> tuple[Tensor, Tensor]:
        """Return the transforms of blocks of the gradient, scaled, ``(F, blocks, c)``, and the sums of
        squares of their columns ``(blocks, c)``, float64."""
        sizes, n = self.partition.sizes, self.partition.n
        count, blocks = high - low, len(group.squares)
        width = count + (shared is not None)
        dtype = self.dtype.to_complex()
        spectra = spectra_memory("outer spectra", (blocks, width), sizes.bins, dtype, self.device, True)
        norms = torch.empty((blocks, width), dtype=torch.float64, device=self.device)
        together = max(1, CHUNK_BYTES // (width * sizes.transform * self.dtype.itemsize))
        shape = (min(blocks, together), width, sizes.transform)
        chunk = take("outer blocks", shape, self.dtype, self.device)
        chunk[..., : sizes.piece] = 0.0
        for begin in range(0, blocks, together):
            end = min(blocks, begin + together)
            rows = slice((group.first + begin) * sizes.block, min(n, (group.first + end) * sizes.block))
            part = chunk[: end - begin]
            values = self.outer.rows[rows, low:high]
            more = None if shared is None else shared[rows]
            if self.outer.lse is not None:
                shifts = torch.tensor(group.shifts[begin:end], dtype=torch.float64, device=self.device)
                scale = shifts.repeat_interleave(sizes.block)[: rows.stop - rows.start]
                scale = (scale - self.outer.lse[rows]).exp_().to(self.dtype)
                values = values * scale[:, None]
                more = None if more is None else more * scale
            missing = (end - begin) * sizes.block - len(values)
            if missing:
                values = torch.nn.functional.pad(values, (0, 0, 0, missing))
                more = None if more is None else torch.nn.functional.pad(more, (0, missing))
            part[:, :count, sizes.piece :] = values.unflatten(0, (-1, sizes.block)).mT
            if more is not None:
                part[:, count, sizes.piece :] = more.view(-1, sizes.block)
            norms[begin:end] = torch.linalg.vector_norm(part, dim=-1).double().square_()
            spectra[begin:end].mT.copy_(torch.fft.rfft(part))
        return spectra.transpose(0, 1), norms

    def _add(self, recorded: Recorded, spectra: Tensor) -> None:
        """Add the gradients of windows ``(blocks, segments, F)`` to those of the columns."""
        assert self.columns is not None
        sizes = self.partition.sizes
        segments = len(recorded.rows)
        if not segments:  # padding alone
            return
        change = torch.fft.irfft(spectra, n=sizes.transform).transpose(0, 1)
        shape = (segments, recorded.blocks, sizes.transform)
        window = recorded.rows.as_strided(shape, (recorded.rows.stride(0), sizes.block, 1))
        square = torch.linalg.vector_norm(change, dim=-1) * torch.linalg.vector_norm(window, dim=-1)
        self.of_windows += square.double().square_().sum()
        if self.logarithmic:
            change *= window
        # Windows of neighbouring blocks overlap, those of every other block do not.
        for parity in range(min(2, recorded.blocks)):
            own = change[:, parity::2]
            offset = (recorded.first + parity) * sizes.block
            strides = (self.columns.stride(0), 2 * sizes.block, 1)
            self.columns.as_strided(own.shape, strides, offset).add_(own)

    def _pieces_back(self, total: Tensor, low: int, high: int) -> None:
        """Write the product by row, from its spectra ``(F, pieces, c)``."""
        partition, sizes = self.partition, self.partition.sizes
        width, count = total.shape[-1], high - low
        together = max(1, CHUNK_BYTES // (width * sizes.transform * self.dtype.itemsize))
        for begin in range(0, len(partition.pieces), together):
            end = min(len(partition.pieces), begin + together)
            whole = torch.fft.irfft(by_row(total, begin, end), n=sizes.transform)
            squares = torch.linalg.vector_norm(whole, dim=(1, 2)).double().square_()
            self.of_pieces[begin:end] += squares
            first, last = partition.pieces[begin].low, partition.pieces[end - 1].high
            if last - first == (end - begin) * sizes.piece:  # whole pieces, one after the other
                own = whole[:, :, : sizes.piece]
                self.of_x[first:last, low:high].unflatten(0, (-1, sizes.piece)).copy_(own[:, :count].mT)
                if width > count:
                    assert self.of_weights is not None
                    self.of_weights[first:last].view(-1, sizes.piece).copy_(own[:, count])
                continue
            for own, piece in zip(whole, partition.pieces[begin:end], strict=True):
                length = piece.high - piece.low
                self.of_x[piece.low : piece.high, low:high] = own[:count, :length].t()
                if width > count:
                    assert self.of_weights is not None
                    self.of_weights[piece.low : piece.high] = own[count, :length]


class _Pending:
    """Segments of several pieces: a block's windows get gradients from later blocks too."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        partition = job.partition
        self._places = [
            (torch.tensor(positions, device=job.device), torch.tensor(segments, device=job.device))
            for positions, segments in zip(partition.positions, partition.segments, strict=True)
        ]
        self._open: deque[tuple[Recorded, Tensor]] = deque()

    def take_in(self, recorded: Recorded, change: Tensor) -> None:
        """Add the gradients ``(F, blocks, pieces)`` of what the pieces took, block by block."""
        sizes = self._job.partition.sizes
        for own in range(recorded.blocks):
            begin = own * sizes.block
            block = recorded.first + own
            seen = self._job.partition.segments_before(self._job.partition.rows(block)[1])
            rows = recorded.rows[:seen, begin : begin + sizes.transform]
            sums = torch.zeros((seen, sizes.bins), dtype=change.dtype, device=change.device)
            self._open.appendleft((Recorded(block, 1, rows, []), sums))
            by_piece = change[:, own].t()
            factors = recorded.factors[own]
            for (_, target), (positions, segments), factor in zip(
                self._open, self._places, factors, strict=False
            ):
                within = int((segments < len(target)).sum())
                part = by_piece.index_select(0, positions[:within])
                target.index_add_(0, segments[:within], part, alpha=factor)
            if len(self._open) == self._job.partition.levels:
                self._close()

    def finish(self) -> None:
        """Close what is open."""
        while self._open:
            self._close()

    def _close(self) -> None:
        recorded, sums = self._open.pop()
        self._job._add(recorded, sums[None])


def partitioned_transposed(
    windows: Windows, partition: Partition, x: Tensor, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """Multiply the transpose of a segmented matrix with x.

    Args:
        windows: of the matrix, with shifts of 0.
        partition: of the matrix; at least one segment.
        x: ``(n, c)``, dtype of the windows.
        max_bytes: bound on the memory of the spectra; never below one column.

    Returns:
        the product ``(n, c)``, 0 for columns before the first segment, and the expected rounding error
        of its rows in the Euclidean norm, float64 ``(n,)``.
    """
    found = partitioned_gradients(
        windows, partition, x, None, Outer(x, None, None), max_bytes, of_columns=False
    )
    return found.x, found.noise
