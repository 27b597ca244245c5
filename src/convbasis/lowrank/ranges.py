"""Products where each row sees one range of positions, by chunks and sums of chunks.

A range is a few positions at either end, multiplied out, and whole chunks between. The state of a chunk
is ``Σ right_j x_j^T``. With sums within aligned groups of 2^l chunks, from each chunk back to the
beginning and on to the end of its group, a range of whole chunks is the sum of two states: those of the
two halves, on either side of the border, of the smallest aligned group that holds it. Nothing is
subtracted, so that nothing cancels, which differences of prefix sums would in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import Tiles, tiles_of

CHUNK = 64  # tokens of a chunk, and rows of a tile
_ENTRIES = 1 << 19  # numbers of tiles at a time
_STATES = 1 << 26  # numbers in the states of all chunks at a time


class PartialChunks(NamedTuple):
    """Rows that see a part of a chunk."""

    tiles: Tiles
    first: Tensor
    """``(t, h)`` the first position of each row, within the chunk."""
    last: Tensor
    """``(t, h)`` the last one; below the first where a tile is not full."""


class Lookups(NamedTuple):
    """Rows that read sums within groups of 2^level chunks."""

    to_end: Tiles
    """From each chunk to the end of its group."""
    from_begin: Tiles
    """From the beginning of its group to each chunk."""


class Ranges:
    """Row e of m sees positions lower[e]..upper[e] of n; an empty range has upper < lower."""

    def __init__(self, lower: Tensor, upper: Tensor, n: int) -> None:
        """Sort the rows by what they read.

        Args:
            lower: int64 ``(m,)``.
            upper: int64 ``(m,)``.
            n: number of positions.
        """
        self.m, self.n = len(lower), n
        self.chunks = -(-n // CHUNK)
        rows = (upper >= lower).nonzero()[:, 0]
        low, high = lower[rows], upper[rows]
        first, last = -(-low // CHUNK), (high + 1) // CHUNK - 1  # whole chunks
        left = low % CHUNK != 0
        right = ((high + 1) % CHUNK != 0) & ~(left & (low // CHUNK == high // CHUNK))
        self.parts = [
            self._part(rows[left], low[left], torch.minimum(high, first * CHUNK - 1)[left]),
            self._part(rows[right], torch.maximum(low, (last + 1) * CHUNK)[right], high[right]),
        ]
        whole = last >= first
        rows, first, last = rows[whole], first[whole], last[whole]
        longest = int((last - first).max()) + 1 if len(rows) else 0
        self.levels = max(0, longest - 2).bit_length()
        # The highest bit in which the two ends differ, -1 for one chunk alone. The border lies at a
        # multiple of 2^level; groups as long as the longest range reach it from all higher levels too.
        level = (_bit_length(first ^ last) - 1).clamp(max=self.levels)
        self.lookups = []
        for at in range(self.levels + 1):
            two, any_end = level == at, (level == at) | ((level < 0) & (at == 0))
            self.lookups.append(
                Lookups(
                    tiles_of(rows[two], first[two], CHUNK, self.m),
                    tiles_of(rows[any_end], last[any_end], CHUNK, self.m),
                )
            )
        self.reads_states = len(rows) > 0

    def _part(self, rows: Tensor, low: Tensor, high: Tensor) -> PartialChunks:
        tiles = tiles_of(rows, low // CHUNK, CHUNK, self.m)
        first, last = (torch.full((self.m + 1,), end, device=rows.device) for end in (0, -1))
        first[rows], last[rows] = low % CHUNK, high % CHUNK
        return PartialChunks(tiles, first[tiles.rows], last[tiles.rows])

    def product(self, left: Tensor, right: Tensor, x: Tensor) -> Tensor:
        """Return rows ``left_e · Σ right_j x_j^T`` over the range of e, ``(P, m, c)``.

        Args:
            left: ``(P, m, r)``.
            right: ``(P, n, r)``.
            x: ``(P, n, c)``.

        Complexity: O((m + n) (r c + 64 (r + c))) time; memory of two times n r c / 64
        numbers, or of two times 2^26 where that is less.
        """
        left = _lengthened(left, self.m + 1)
        rights, values = (self._chunked(tensor) for tensor in (right, x))
        output = x.new_zeros((len(x), self.m + 1, x.shape[-1]))
        for part in self.parts:
            width = CHUNK + 2 * left.shape[-1] + 2 * x.shape[-1]
            for some in _some(len(part.tiles.rows), len(x) * CHUNK * width):
                pairs = self._pairs(left, rights, part, some)
                found = pairs @ values.index_select(1, part.tiles.source[some])
                _add_rows(output, part.tiles.rows[some], found)
        if self.reads_states:
            for some in self._features(left, x):
                self._read(output, left[..., some].contiguous(), rights[..., some], values)
        return output[:, : self.m]

    def transposed(self, left: Tensor, right: Tensor, x: Tensor) -> Tensor:
        """Return rows ``left_j · Σ right_e x_e^T`` over the ranges e that hold j, ``(P, n, c)``.

        Args:
            left: ``(P, n, r)``.
            right: ``(P, m, r)``.
            x: ``(P, m, c)``.
        """
        right, x = _lengthened(right, self.m + 1), _lengthened(x, self.m + 1)
        lefts = self._chunked(left)
        output = x.new_zeros((*lefts.shape[:3], x.shape[-1]))
        for part in self.parts:
            width = CHUNK + 2 * left.shape[-1] + 2 * x.shape[-1]
            for some in _some(len(part.tiles.rows), len(x) * CHUNK * width):
                pairs = self._pairs(right, lefts, part, some)
                values = _gathered(x, part.tiles.rows[some])
                output.index_add_(1, part.tiles.source[some], pairs.mT @ values)
        if self.reads_states:
            for some in self._features(right, x):
                output += lefts[..., some] @ self._written(right[..., some].contiguous(), x)
        return output.flatten(1, 2)[:, : self.n]

    def _pairs(self, rows_of: Tensor, chunks_of: Tensor, part: PartialChunks, some: slice) -> Tensor:
        """Return products of rows with their chunk, 0 where they do not see it: ``(P, t, h, 64)``."""
        pairs = (
            _gathered(rows_of, part.tiles.rows[some])
            @ chunks_of.index_select(1, part.tiles.source[some]).mT
        )
        at = torch.arange(CHUNK, device=rows_of.device)
        seen = (at >= part.first[some, :, None]) & (at <= part.last[some, :, None])
        return pairs.masked_fill_(~seen, 0.0)

    def _chunked(self, tensor: Tensor) -> Tensor:
        """Return a tensor ``(P, n, ·)`` as chunks ``(P, chunks, 64, ·)``, the last filled with 0."""
        return _lengthened(tensor, self.chunks * CHUNK).unflatten(1, (self.chunks, CHUNK))

    def _features(self, left: Tensor, x: Tensor) -> Iterator[slice]:
        """Yield slices of the r features whose states are held at a time."""
        r = left.shape[-1]
        some = max(1, _STATES // (len(x) * self.chunks * x.shape[-1]))
        for low in range(0, r, some):
            yield slice(low, min(r, low + some))

    def _read(self, output: Tensor, left: Tensor, right: Tensor, x: Tensor) -> None:
        """Add what rows see of whole chunks."""
        states = right.mT @ x
        to_end, from_begin = (states, states.clone()) if self.levels else (states, states)
        for level, lookup in enumerate(self.lookups):
            if level:
                self._widen(to_end, from_begin, level)
            for tiles, sums in ((lookup.to_end, to_end), (lookup.from_begin, from_begin)):
                for some in _some(len(tiles.rows), len(x) * sums[0, 0].numel()):
                    rows = _gathered(left, tiles.rows[some])
                    found = rows @ sums.index_select(1, tiles.source[some])
                    _add_rows(output, tiles.rows[some], found)

    def _widen(self, to_end: Tensor, from_begin: Tensor, level: int) -> None:
        """Make sums within groups of 2^level chunks from those within groups of half as many."""
        for low, middle, high, number in self._halves(level):
            ends, begins = (_grouped(sums, low, high, number) for sums in (to_end, from_begin))
            ends[:, :, : middle - low] += ends[:, :, middle - low, None]
            begins[:, :, middle - low :] += begins[:, :, middle - low - 1, None]

    def _halves(self, level: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield the begin, border and end of the first of some groups alike, and their number."""
        size = 1 << level
        groups, rest = divmod(self.chunks, size)
        if groups:
            yield 0, size // 2, size, groups
        if rest > size // 2:
            yield groups * size, groups * size + size // 2, self.chunks, 1

    def _written(self, right: Tensor, x: Tensor) -> Tensor:
        """Return the sums over rows by chunk that they see as a whole, ``(P, chunks, r, c)``."""
        shape = (len(x), self.chunks, right.shape[-1], x.shape[-1])
        to_end, from_begin = x.new_zeros(shape), x.new_zeros(shape)
        for level in range(self.levels, -1, -1):
            lookup = self.lookups[level]
            for tiles, sums in ((lookup.to_end, to_end), (lookup.from_begin, from_begin)):
                for some in _some(len(tiles.rows), len(x) * sums[0, 0].numel()):
                    rows, values = (_gathered(tensor, tiles.rows[some]) for tensor in (right, x))
                    sums.index_add_(1, tiles.source[some], rows.mT @ values)
            if level:
                for low, middle, high, number in self._halves(level):
                    ends, begins = (_grouped(sums, low, high, number) for sums in (to_end, from_begin))
                    ends[:, :, middle - low] += ends[:, :, : middle - low].sum(2)
                    begins[:, :, middle - low - 1] += begins[:, :, middle - low :].sum(2)
        return to_end.add_(from_begin)


def _grouped(sums: Tensor, low: int, high: int, number: int) -> Tensor:
    """Return a view of groups of chunks, ``(P, number, high - low, r, c)``."""
    return sums[:, low : low + number * (high - low)].unflatten(1, (number, high - low))


def _gathered(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return rows ``(P, t, h, ·)`` of a tensor ``(P, ·, ·)``."""
    return tensor.index_select(1, rows.flatten()).unflatten(1, rows.shape)


def _add_rows(output: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values ``(P, t, h, c)`` to rows ``(t, h)`` of an output ``(P, ·, c)``."""
    problems, height, columns = output.shape
    begins = torch.arange(problems, device=rows.device)[:, None] * height
    # Along the first dimension: several times faster than along another.
    index = (begins + rows.flatten()).flatten()
    output.view(-1, columns).index_add_(0, index, values.reshape(-1, columns))


def _lengthened(tensor: Tensor, length: int) -> Tensor:
    more = length - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, 0, 0, more)) if more else tensor


def _some(count: int, entries: int) -> Iterator[slice]:
    """Yield slices of tiles of so many entries each."""
    together = max(1, _ENTRIES // max(1, entries))
    for low in range(0, count, together):
        yield slice(low, min(count, low + together))


def _bit_length(numbers: Tensor) -> Tensor:
    """Return the number of bits of integers >= 0 below 2^53."""
    return torch.frexp(numbers.double()).exponent.long()
