"""A convolution cut into blocks over ranks: who has which tokens, lags and frequencies.

Tokens and lags are cut into the same blocks of M. Columns are cut at the borders of blocks and at the
starts of segments, into *pieces*. Rows of block i and a piece of segment r in block b meet the lags
from (i - b - 1) M + 1 to (i - b + 1) M - 1 of the kernel of segment r: two blocks of lags. With
transforms of N >= 2 M values a circular convolution gives M right rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .strips import Strip

# Blocks are no shorter than this, unless there is one alone in each rank: bins come on top of them.
_LEAST_BLOCK = 16
# Blocks of rows are multiplied with the pieces before them in so many groups.
_GROUPS = 8
_ODD_FACTORS = tuple(3**a * 5**b * 7**c for a in range(8) for b in range(5) for c in range(4))


class Cut(NamedTuple):
    """Columns low..high-1, all in one block and one segment."""

    block: int
    segment: int
    low: int
    high: int


@dataclass(frozen=True)
class Grid:
    """The blocks of one call."""

    n: int
    """Tokens."""
    ranks: int
    each: int
    """Blocks of each rank."""
    starts: tuple[int, ...]
    """First column of each segment, as given."""

    @property
    def blocks(self) -> int:
        """Of all ranks."""
        return self.ranks * self.each

    @property
    def block(self) -> int:
        """M, tokens of a block; the last ones may have fewer, or none."""
        return max(1, -(-self.n // self.blocks))

    @cached_property
    def transform(self) -> int:
        """N, the length of the transforms."""
        return smooth_length(2 * self.block)

    @property
    def bins(self) -> int:
        """Frequencies of a transform of real numbers."""
        return self.transform // 2 + 1

    def tokens(self, rank: int) -> tuple[int, int]:
        """Return the first token of a rank's blocks and the one after the last."""
        size = self.each * self.block
        return min(self.n, rank * size), min(self.n, (rank + 1) * size)

    def frequencies(self, rank: int) -> slice:
        """Return the frequencies that a rank multiplies."""
        return slice(self.bins * rank // self.ranks, self.bins * (rank + 1) // self.ranks)

    @cached_property
    def lag_rows(self) -> list[list[tuple[int, int]]]:
        """For each rank, the segments and blocks of lags that it transforms.

        Late segments have few lags. Blocks are dealt out to and fro, so that ranks have about as many.
        """
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.ranks)]
        for block in range(self.blocks):
            place = block % (2 * self.ranks)
            owner = min(place, 2 * self.ranks - 1 - place)
            rows = [(r, block) for r, s in enumerate(self.starts) if s + block * self.block < self.n]
            found[owner] += rows
        return found

    @cached_property
    def cuts(self) -> list[list[Cut]]:
        """For each rank, the pieces of its blocks, in order."""
        blocks = self._cuts_by_block
        return [
            [cut for own in blocks[rank * self.each : (rank + 1) * self.each] for cut in own]
            for rank in range(self.ranks)
        ]

    @cached_property
    def _cuts_by_block(self) -> list[list[Cut]]:
        found: list[list[Cut]] = [[] for _ in range(self.blocks)]
        stops = [*self.starts[1:], self.n]
        for segment, (start, stop) in enumerate(zip(self.starts, stops, strict=True)):
            low = start
            while low < min(stop, self.n):
                block = low // self.block
                high = min(stop, (block + 1) * self.block, self.n)
                found[block].append(Cut(block, segment, low, high))
                low = high
        return found

    def windows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which rows of lags make the windows of all segments: of a distance and of one less.

        Both are ``(k·blocks,)``, rows in the order of the ranks; what there is not is the row after
        the last.
        """
        rows = [row for own in self.lag_rows for row in own]
        table = torch.full((len(self.starts), self.blocks + 1), len(rows), dtype=torch.int64)
        if rows:
            segment, block = torch.tensor(rows).unbind(-1)
            table[segment, block + 1] = torch.arange(len(rows))
        table = table.to(device)
        return table[:, 1:].flatten(), table[:, :-1].flatten()

    def pairs(self, device: torch.device) -> Tensor:
        """Return which window a block of rows and a piece meet in, ``(blocks, pieces)``.

        The window after the last stands for none: the piece comes later.
        """
        cuts = [cut for own in self.cuts for cut in own]
        block = torch.tensor([cut.block for cut in cuts], dtype=torch.int64, device=device)
        segment = torch.tensor([cut.segment for cut in cuts], dtype=torch.int64, device=device)
        distance = torch.arange(self.blocks, device=device)[:, None] - block
        window = segment * self.blocks + distance
        return torch.where(distance >= 0, window, len(self.starts) * self.blocks)

    def row_groups(self) -> list[tuple[int, int, int]]:
        """Return groups of blocks of rows, first and last, with how many pieces they may meet."""
        step = -(-self.blocks // _GROUPS)
        counts = [len(own) for own in self._cuts_by_block]
        return [
            (low, min(low + step, self.blocks), sum(counts[: low + step]))
            for low in range(0, self.blocks, step)
        ]

    def token_strips(self, batch: int, columns: int) -> list[list[Strip]]:
        """Return what each rank wants of tensors of tokens: the tokens of its blocks, in one row."""
        edges = [self.tokens(rank) for rank in range(self.ranks)]
        return [
            [Strip(slice(0, batch), slice(0, columns), low, high, 0)] if low < high else []
            for low, high in edges
        ]

    def lag_strips(self, groups: list[tuple[slice, list[int]]]) -> list[list[Strip]]:
        """Return what each rank wants of the logits by segment: its blocks of lags, a row each.

        Args:
            groups: some sequences each, with the first keys of their segments: lag 0.
        """
        found = []
        for own in self.lag_rows:
            strips = []
            for row, (segment, block) in enumerate(own):
                for batch, firsts in groups:
                    first = firsts[segment] + block * self.block
                    last = min(first + self.block, self.n)
                    if first < last:
                        strips.append(Strip(batch, slice(segment, segment + 1), first, last, row))
            found.append(strips)
        return found


def smooth_length(minimum: int) -> int:
    """Return the smallest even number >= minimum without a prime factor above 7, but for rare ones.

    >>> [smooth_length(n) for n in (2, 11, 97, 1000, 4099)]
    [2, 12, 98, 1000, 4116]
    """
    return min(
        odd << max(1, (-(-minimum // odd) - 1).bit_length()) for odd in _ODD_FACTORS if odd <= minimum
    )


@lru_cache(maxsize=64)
def grid_for(
    n: int, ranks: int, starts: tuple[int, ...], heads: int, value_heads: int, width: int
) -> Grid:
    """Return the grid for which the busiest rank sends the fewest spectra.

    Shorter blocks are cut by fewer starts of segments, but there are more of them to multiply: at most
    about twice as many as segments, or as ranks.

    Args:
        n: tokens.
        ranks: number of processes.
        starts: of the segments.
        heads: query heads.
        value_heads: heads with values of their own.
        width: value columns and normaliser.
    """
    found = []
    each = 1
    most = 2 * max(len(starts), ranks)
    while each == 1 or (each * ranks <= most and n >= _LEAST_BLOCK * ranks * each):
        grid = Grid(n, ranks, each, starts)
        rows = max(
            heads * len(lags) + value_heads * width * len(cuts)
            for lags, cuts in zip(grid.lag_rows, grid.cuts, strict=True)
        )
        found.append((grid.transform * (rows + heads * width * each), each, grid))
        each *= 2
    return min(found, key=lambda entry: entry[:2])[2]
