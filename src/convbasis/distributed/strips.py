"""Runs of tokens that ranks want of each other, and the way back: the two are adjoint."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from .ranks import Ranks
from .transport import exchange


class Strip(NamedTuple):
    """Some columns of the tokens first..last-1 of some sequences: one row of what a rank wants."""

    batch: slice
    columns: slice
    first: int
    last: int
    row: int


class Strips(NamedTuple):
    """What each rank wants, all strips of as many columns."""

    ranks: Ranks
    lengths: list[int]
    """Tokens that each rank has."""
    wanted: list[list[Strip]]
    """By rank."""
    shape: tuple[int, int, int]
    """Rows that this rank wants, tokens of a row, columns of a strip."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Return what this rank wants, ``(B, H, rows, tokens, columns)``, 0 where nobody has a token.

        Args:
            tensor: ``(B, H, m, c)``, of the tokens that this rank has.
        """
        rank, size = self.ranks.rank, self.ranks.size
        begin = sum(self.lengths[:rank])
        blocks = [
            [tensor[s.batch, :, low - begin : high - begin, s.columns] for s, low, high in parts]
            for parts in (self._between(rank, other) for other in range(size))
        ]
        known = [self._between(other, rank) for other in range(size)]
        shapes = [[self._shape(tensor, *part) for part in parts] for parts in known]
        found = tensor.new_zeros((*tensor.shape[:2], *self.shape))
        arrived = exchange(self.ranks, blocks, shapes, tensor, "strips")
        for parts, own in zip(known, arrived, strict=True):
            for (s, low, high), block in zip(parts, own, strict=True):
                found[s.batch, :, s.row, low - s.first : high - s.first] = block
        return found

    def scatter(self, found: Tensor, columns: int) -> Tensor:
        """Return the sums of what all ranks have of this rank's tokens, ``(B, H, m, columns)``.

        Args:
            found: as `gather` returns it, of this rank.
            columns: of all strips together.
        """
        rank, size = self.ranks.rank, self.ranks.size
        begin = sum(self.lengths[:rank])
        blocks = [
            [found[s.batch, :, s.row, low - s.first : high - s.first] for s, low, high in parts]
            for parts in (self._between(other, rank) for other in range(size))
        ]
        known = [self._between(rank, other) for other in range(size)]
        shapes = [[self._shape(found, *part) for part in parts] for parts in known]
        tensor = found.new_zeros((*found.shape[:2], self.lengths[rank], columns))
        arrived = exchange(self.ranks, blocks, shapes, found, "sums of strips")
        for parts, own in zip(known, arrived, strict=True):
            for (s, low, high), block in zip(parts, own, strict=True):
                tensor[s.batch, :, low - begin : high - begin, s.columns] += block
        return tensor

    def _between(self, sender: int, receiver: int) -> list[tuple[Strip, int, int]]:
        """Return the strips that one rank wants of another, each with the tokens that it gets."""
        begin = sum(self.lengths[:sender])
        end = begin + self.lengths[sender]
        return [
            (strip, max(strip.first, begin), min(strip.last, end))
            for strip in self.wanted[receiver]
            if strip.first < end and strip.last > begin and begin < end
        ]

    def _shape(self, tensor: Tensor, strip: Strip, low: int, high: int) -> tuple[int, ...]:
        batch = len(range(tensor.shape[0])[strip.batch])
        return batch, tensor.shape[1], high - low, strip.columns.stop - strip.columns.start


def numbers_between(wanted: Sequence[Sequence[Strip]], lengths: Sequence[int]) -> list[list[int]]:
    """Return how many numbers each rank (first index) has that another (second) wants.

    Args:
        wanted: strips by rank.
        lengths: tokens that each rank has.
    """
    ends = list(accumulate(lengths))
    found = [[0] * len(wanted) for _ in lengths]
    for receiver, strips in enumerate(wanted):
        for strip in strips:
            columns = strip.columns.stop - strip.columns.start
            low = strip.first
            while low < strip.last:
                sender = bisect_right(ends, low)
                high = min(strip.last, ends[sender])
                found[sender][receiver] += (high - low) * columns
                low = high
    return found
