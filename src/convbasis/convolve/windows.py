"""Windows of the columns at segment starts, some blocks of rows at a time.

A segmented matrix is known by its k columns at the starts of segments: entry (i, j) of segment r is
entry ``starts[r] + i - j`` of that column. The window of a block holds S rows before the block and the
M rows of it, of every segment that begins before the block's end; 0 above the diagonal and outside the
matrix.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..workspace import take
from .partition import Partition

# Logits are taken relative to a shift that follows their largest one where it is farther than this from
# it, in nats: far enough from the ends of float32, and usually no shift at all.
_SLACK = 15.0


class Windows(Protocol):
    """What partitioned convolution needs to know of a matrix."""

    device: torch.device

    def restart(self) -> None:
        """Go back to the first block."""
        ...

    def next(self, first: int, blocks: int, count: int) -> tuple[Tensor, float]:
        """Return the windows of some blocks, in order from block 0 on, and their shift.

        Args:
            first: the first block.
            blocks: how many.
            count: segments that begin before the last block's end.

        Returns:
            ``(count, blocks, N)``, valid until the next call; the matrix's entries are these times
            exp(shift).
        """
        ...


def _overlapping(rows: Tensor, partition: Partition, blocks: int) -> Tensor:
    """Return the windows in ``(count, S + blocks·M)`` rows of columns, without a copy."""
    sizes = partition.sizes
    shape = (len(rows), blocks, sizes.transform)
    return rows.as_strided(shape, (rows.stride(0), sizes.block, 1), rows.storage_offset())


class KernelWindows:
    """Windows of given kernels."""

    def __init__(self, kernels: Tensor, partition: Partition) -> None:
        """Lay the kernels out as columns.

        Args:
            kernels: ``(k, n)`` by lag, zero past lag n - 1 - start.
            partition: of the matrix.
        """
        sizes, n = partition.sizes, partition.n
        self.device = kernels.device
        self._partition = partition
        length = sizes.piece + partition.blocks * sizes.block
        self._columns = kernels.new_zeros((len(partition.starts), length))
        for r, start in enumerate(partition.starts):
            self._columns[r, sizes.piece + start : sizes.piece + n] = kernels[r, : n - start]

    def restart(self) -> None:
        """Go back to the first block."""

    def next(self, first: int, blocks: int, count: int) -> tuple[Tensor, float]:
        """Return the windows of some blocks, a view."""
        low = first * self._partition.sizes.block
        return _overlapping(self._columns[:count, low:], self._partition, blocks), 0.0


class _LagBias:
    """A bias by lag, for the columns at segment starts."""

    def __init__(self, bias: Tensor, starts: list[int]) -> None:
        """Keep the bias ``(n,)``."""
        self._starts = starts
        steps = {after - before for before, after in pairwise(starts)}
        self._step = steps.pop() if len(steps) == 1 else 0
        # Lags below 0 come first; their entries are not used.
        self._bias = torch.nn.functional.pad(bias, (len(bias), 0))

    def of(self, count: int, low: int, high: int) -> Tensor:
        """Return the bias of the rows low .. high - 1 of the first columns, ``(count, high - low)``."""
        zero = len(self._bias) // 2
        if self._step or count == 1:
            # Starts alike: from the last column to the first each one is the same numbers, a step on.
            offset = self._bias.storage_offset() + zero + low - self._starts[count - 1]
            return self._bias.as_strided((count, high - low), (self._step, 1), offset).flip(0)
        starts = torch.tensor(self._starts[:count], device=self._bias.device)
        rows = torch.arange(low, high, device=self._bias.device)
        return self._bias[rows - starts[:, None] + zero]


class LogitWindows:
    """Windows of exp(logits), from queries and the first key of each segment (F3, F5).

    One matrix product for some blocks; the rows that they share with the block before are kept. Entries
    above the diagonal are logits of -inf: no branch per segment.
    """

    def __init__(
        self,
        query: Tensor,
        first_keys: Tensor,
        partition: Partition,
        lag_bias: Tensor | None = None,
    ) -> None:
        """Keep the inputs.

        Args:
            query: ``(n, d)``, of any floating-point dtype; converted block by block.
            first_keys: ``(k, d)``, already multiplied with the scale, in the dtype to work in.
            partition: of the matrix.
            lag_bias: ``(n,)``, added to the logits by lag, in the dtype to work in; None for none.
        """
        self.device = query.device
        self._query, self._keys = query, first_keys
        self._lag_bias = None if lag_bias is None else _LagBias(lag_bias, partition.starts)
        self._partition = partition
        self._starts = torch.tensor(partition.starts, device=query.device)
        # The last S rows of logits so far, of the segments that have begun.
        self._kept = torch.empty(0, device=query.device)
        self._shift = 0.0

    def restart(self) -> None:
        """Go back to the first block."""
        self._shift = 0.0

    def next(self, first: int, blocks: int, count: int) -> tuple[Tensor, float]:
        """Return the windows of some blocks."""
        sizes, dtype = self._partition.sizes, self._keys.dtype
        before, length = sizes.piece, sizes.piece + blocks * sizes.block
        known = 0 if first == 0 else len(self._kept)
        low, high = first * sizes.block, min(self._partition.n, (first + blocks) * sizes.block)
        filled = before + high - low
        logits = take("window logits", (count, length), dtype, self.device)
        window = take("window", (count, length), dtype, self.device)
        if known:
            logits[:known, :before] = self._kept
        logits[known:, :before] = -torch.inf
        new = logits[:, before:filled]
        torch.mm(self._keys[:count], self._query[low:high].to(dtype).t(), out=new)
        if filled < length:
            logits[:, filled:] = -torch.inf
        rows = torch.arange(low, high, device=self.device)
        if self._lag_bias is not None:
            new += self._lag_bias.of(count, low, high)
        if count > known:
            new[known:].masked_fill_(rows < self._starts[known:count, None], -torch.inf)
        if high < self._partition.n:
            self._kept = take("kept logits", (count, before), dtype, self.device)
            self._kept.copy_(logits[:, length - before :])
        peak = float(logits.amax()) if count else 0.0
        if not abs(peak - self._shift) <= _SLACK:
            self._shift = peak if math.isfinite(peak) and abs(peak) > _SLACK else 0.0
        if self._shift:
            torch.sub(logits, self._shift, out=window)
            window.exp_()
        else:
            torch.exp(logits, out=window)
        return _overlapping(window, self._partition, blocks), self._shift
