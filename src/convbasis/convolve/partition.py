"""How a segmented matrix is cut for partitioned convolution: pieces of columns and blocks of rows.

Columns are cut at every segment start and, within a segment, every S columns after it; rows into blocks
of M. A piece that begins a·S columns after the start s of its segment meets block i in the rows
``i M - a S - S .. i M - a S + M - 1`` of column s of the matrix: a *window* of N = S + M entries. It
lies on the grid wherever the segment begins, so that windows are plain slices of that column.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Lengths of one partition, in tokens."""

    piece: int
    """S, the most columns of a piece."""
    transform: int
    """N >= 2 S, the length of the transforms."""

    @property
    def block(self) -> int:
        """M = N - S, rows of a block."""
        return self.transform - self.piece

    @property
    def bins(self) -> int:
        """Entries of the transform of real numbers."""
        return self.transform // 2 + 1


@dataclass(frozen=True)
class Piece:
    """Columns low..high-1, at most S of them, all in one segment."""

    low: int
    high: int
    segment: int
    level: int
    """a: the piece begins a·S columns after its segment."""


class Partition:
    """The pieces and blocks of one matrix."""

    def __init__(self, starts: list[int], n: int, sizes: Sizes) -> None:
        """Cut the columns.

        Args:
            starts: first column of each segment, strictly increasing; n for unused ones.
            n: rows and columns.
            sizes: lengths; where a segment is longer than S, blocks must have M = S rows.
        """
        self.n, self.sizes = n, sizes
        self.starts = starts[: bisect_left(starts, n)]
        stops = [*self.starts[1:], n][: len(self.starts)]
        self.pieces = [
            Piece(low, min(low + sizes.piece, stop), r, a)
            for r, (start, stop) in enumerate(zip(self.starts, stops, strict=True))
            for a, low in enumerate(range(start, stop, sizes.piece))
        ]
        self.levels = 1 + max((piece.level for piece in self.pieces), default=0)
        assert self.levels == 1 or sizes.block == sizes.piece
        self.blocks = -(-n // sizes.block)
        self._lows = [piece.low for piece in self.pieces]
        # By level: the positions of its pieces, ascending, and their segments.
        self.positions: list[list[int]] = [[] for _ in range(self.levels)]
        self.segments: list[list[int]] = [[] for _ in range(self.levels)]
        for position, piece in enumerate(self.pieces):
            self.positions[piece.level].append(position)
            self.segments[piece.level].append(piece.segment)

    def rows(self, block: int) -> tuple[int, int]:
        """Return the first row of a block and the one after its last."""
        low = block * self.sizes.block
        return low, min(self.n, low + self.sizes.block)

    def segments_before(self, row: int) -> int:
        """Return how many segments begin before a row."""
        return bisect_left(self.starts, row)

    def pieces_before(self, row: int) -> int:
        """Return how many pieces, the first ones, begin before a row."""
        return bisect_left(self._lows, row)
