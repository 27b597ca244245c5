"""Transforms of the pieces of x and of the windows of a matrix, in memory that is used again.

With many pieces the spectra are turned, frequency first, as matrix products want them; few are kept as
the transforms leave them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..workspace import take
from .noise import unit_noise
from .partition import Partition
from .windows import Windows

# Up to this many pieces, spectra are multiplied and added entry by entry as the transforms leave them;
# with more, matrix products pay for turning the spectra.
FEW_PIECES = 24
# Bytes of the spectra of a group of blocks, which are multiplied at a time: near the processor still.
_GROUP_BYTES = 12 << 20
# Matrices of fewer blocks than this would read the pieces for little: more bytes then, up to a limit.
_LEAST_BLOCKS = 16
_LARGEST_GROUP_BYTES = 128 << 20
# The same where no matrix is multiplied: the more blocks, the fewer times the pieces are read.
_FEW_GROUP_BYTES = 40 << 20
# Complex entries that a row of spectra is a multiple of, in memory: additions read whole vectors.
_ALIGNED = 8
# From this many frequencies on, a copy of one block's spectra is turned in two steps.
_FAR_APART = 1000
# Bytes of the spectra of x that are worked with at a time.
_SPECTRA_BYTES = 160 << 20
_LINE_BYTES = 64
# Bytes that are transformed at a time: what the processor's own cache holds.
CHUNK_BYTES = 512 << 10


def row_noise(energy: Tensor, transform: int, dtype: torch.dtype) -> Tensor:
    """Return the expected rounding error of rows in the Euclidean norm, float64.

    Args:
        energy: sums of squares of what a transform takes and gives.
        transform: its length.
        dtype: that it works in.
    """
    return energy.double().div_(transform).sqrt_().mul_(unit_noise(dtype, transform))


def column_step(pieces: int, bins: int, columns: int, itemsize: int, max_bytes: int) -> int:
    """Return how many columns of x are transformed at a time, within half of max_bytes.

    They are all columns, or as many as fill whole lines of the processor's caches, or what fits.

    Args:
        pieces: of the partition.
        bins: of the transforms.
        columns: of x.
        itemsize: bytes of an entry of x.
        max_bytes: bound on the memory of spectra.
    """
    per_column = 2 * itemsize * bins * pieces
    # Where matrices are multiplied, wide ones are worth more than what stays near the processor.
    near = _SPECTRA_BYTES if pieces <= FEW_PIECES else max_bytes
    most = max(1, min(max_bytes // 2, near) // per_column)
    if most >= columns:
        return columns
    line = _LINE_BYTES // itemsize
    return most // line * line or most


def group_blocks(of_block: int, *, turned: bool) -> int:
    """Return how many blocks are multiplied at a time, given the bytes of the spectra of one."""
    if not turned:
        return max(1, _FEW_GROUP_BYTES // of_block)
    return max(1, _GROUP_BYTES // of_block, min(_LEAST_BLOCKS, _LARGEST_GROUP_BYTES // of_block))


def piece_spectra(
    x: Tensor,
    weights: Tensor | None,
    dtype: torch.dtype,
    partition: Partition,
    turned: bool,
    *,
    conjugate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the transforms of the pieces and the sums of squares of their columns ``(p, c)``.

    Weights, where there are any, are the last of the c columns.
    The transforms are ``(p, c, F)``, or turned ``(p, F, c)``, or the conjugates of that.
    """
    sizes, count = partition.sizes, x.shape[-1]
    width, total = count + (weights is not None), len(partition.pieces)
    spectra = spectra_memory(
        "piece spectra", (total, width), sizes.bins, dtype.to_complex(), x.device, turned
    )
    norms = torch.empty((total, width), dtype=dtype, device=x.device)
    together = max(1, CHUNK_BYTES // (width * sizes.transform * dtype.itemsize))
    chunk = take("pieces", (min(total, together), width, sizes.transform), dtype, x.device)
    chunk.zero_()
    for first in range(0, total, together):
        pieces = partition.pieces[first : first + together]
        part = chunk[: len(pieces)]
        low, high = pieces[0].low, pieces[-1].high
        if high - low == len(pieces) * sizes.piece:  # whole pieces, one after the other
            part[:, :count, : sizes.piece] = x[low:high].unflatten(0, (-1, sizes.piece)).mT
            if weights is not None:
                part[:, count, : sizes.piece] = weights[low:high].view(-1, sizes.piece)
        else:
            for own, cut in zip(part, pieces, strict=True):
                length = cut.high - cut.low
                own[:count, :length] = x[cut.low : cut.high].t()
                if weights is not None:
                    own[count, :length] = weights[cut.low : cut.high]
                if length < sizes.piece:
                    own[:, length : sizes.piece] = 0.0
        last = first + len(pieces)
        torch.linalg.vector_norm(part, dim=-1, out=norms[first:last])
        by_piece = spectra[first:last]
        transformed = torch.fft.rfft(part)
        if conjugate:
            transformed.conj_physical_()
        (by_piece.mT if turned else by_piece).copy_(transformed)
    return spectra, norms.square_()


def spectra_memory(
    name: str,
    shape: tuple[int, int],
    bins: int,
    dtype: torch.dtype,
    device: torch.device,
    turned: bool,
    fresh: bool = False,
) -> Tensor:
    """Return memory for spectra, ``(*shape, F)`` in rows that begin aligned, or turned.

    It is that of the last call with this name, unless a fresh one is wanted.
    """
    first, second = shape
    middle, last = (bins, second) if turned else (second, bins)
    full = (first, middle, -(-last // _ALIGNED) * _ALIGNED)
    memory = torch.empty(full, dtype=dtype, device=device) if fresh else take(name, full, dtype, device)
    return memory[..., :last]


def by_row(turned: Tensor, begin: int, end: int) -> Tensor:
    """Return some of the spectra ``(F, b, c)`` as ``(b, c, F)``, valid until the next call."""
    bins, _, width = turned.shape
    if end - begin > 1 or bins <= _FAR_APART:
        return turned[:, begin:end].permute(1, 2, 0).contiguous()
    # Rows of a block are far apart in memory: side by side first, then turned.
    rows = take("rows side by side", (bins, width), turned.dtype, turned.device)
    rows.copy_(turned[:, begin])
    part = spectra_memory("rows turned", (1, width), bins, turned.dtype, turned.device, False)
    part[0].copy_(rows.t())
    return part


class Group(NamedTuple):
    """Windows of some blocks, as matrices of blocks and pieces for each frequency."""

    first: int
    """The first block."""
    spectra: Tensor
    """``(blocks, pieces, F)``, or turned; 0 for pieces that a block does not see."""
    shifts: list[float]
    """Of each block."""
    squares: Tensor
    """Sums of squares of the window of each piece ``(blocks, pieces)``."""
    recorded: list[Recorded]
    """The windows that these are the transforms of, if they are recorded; else empty."""


class Recorded(NamedTuple):
    """Windows of some blocks, kept."""

    first: int
    """The first block."""
    blocks: int
    """How many."""
    rows: Tensor
    """``(segments, S + blocks·M)``: windows that overlap."""
    factors: list[list[float]]
    """By block: what pieces multiply the windows with that they take, level by level: of this block, of
    the one before, and so on."""


class WindowSpectra:
    """Transforms of all windows, in groups of blocks whose spectra, and those of x, stay small."""

    def __init__(
        self,
        windows: Windows,
        partition: Partition,
        width: int,
        dtype: torch.dtype,
        turned: bool,
        max_bytes: int,
        *,
        conjugate: bool = False,
        record: bool = False,
    ) -> None:
        """Keep what groups are made from.

        Args:
            windows: of the matrix.
            partition: of the matrix.
            width: columns of x that are worked with at a time.
            dtype: of the spectra.
            turned: see `Group`.
            max_bytes: bound on the memory of spectra; a group takes a quarter of it, or one block.
            conjugate: give the conjugates of the transforms.
            record: keep the windows of a group too.
        """
        self._conjugate, self._record = conjugate, record
        self.partition, self.turned = partition, turned
        self._most = max_bytes // 4
        self._windows, self._width, self._dtype = windows, width, dtype
        self._kept: list[Group] | None = None
        self._keep = False

    def keep_within(self, max_bytes: int) -> None:
        """Keep the spectra for the next time if they fit."""
        partition = self.partition
        bins = sum(
            partition.pieces_before(partition.rows(block)[1]) for block in range(partition.blocks)
        )
        self._keep = bins * partition.sizes.bins * self._dtype.itemsize <= max_bytes

    def groups(self) -> Iterator[Group]:
        """Yield all groups; each holds until the next one, or all of them where they are kept."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Group] = []
        self._windows.restart()
        levels = _Levels(self.partition, self._windows.device)
        first = 0
        while first < self.partition.blocks:
            group = self._group(first, levels)
            yield group
            if self._keep:
                kept.append(group)
            first += len(group.squares)
        self._kept = kept if self._keep else None

    def _bytes(self, block: int) -> int:
        """Return the memory of the spectra of one block, of its windows or of its product."""
        visible = self.partition.pieces_before(self.partition.rows(block)[1])
        return self._dtype.itemsize * self.partition.sizes.bins * max(self._width, visible)

    def _group(self, first: int, levels: _Levels) -> Group:
        """Return the group that begins with a block."""
        partition, sizes, dtype = self.partition, self.partition.sizes, self._dtype
        blocks = min(partition.blocks - first, group_blocks(self._bytes(first), turned=self.turned))
        # Later blocks see more pieces, and all have room for those of the last.
        while blocks > 1 and blocks * self._bytes(first + blocks - 1) > self._most:
            blocks -= 1
        end = partition.rows(first + blocks - 1)[1]
        count, segments = partition.pieces_before(end), max(1, partition.segments_before(end))
        # Spectra that are kept have memory of their own.
        spectra = spectra_memory(
            "window spectra",
            (blocks, count),
            sizes.bins,
            dtype,
            self._windows.device,
            self.turned,
            fresh=self._keep,
        )
        by_piece = spectra.mT if self.turned else spectra
        together = max(1, 2 * CHUNK_BYTES // (segments * sizes.transform * dtype.itemsize))
        shifts: list[float] = []
        squares = []
        recorded = []
        for begin in range(0, blocks, together):
            end = min(blocks, begin + together)
            seen = partition.segments_before(partition.rows(first + end - 1)[1])
            window, shift = self._windows.next(first + begin, end - begin, seen)
            square = torch.linalg.vector_norm(window, dim=-1).square_()
            spectrum = torch.fft.rfft(window)
            if self._conjugate:
                spectrum.conj_physical_()
            factors: list[list[float]] = []
            if self._record:
                extent = (seen, sizes.piece + (end - begin) * sizes.block)
                kept = window.as_strided(extent, (window.stride(0), 1)).clone()
                recorded.append(Recorded(first + begin, end - begin, kept, factors))
            if partition.levels > 1:
                for own in range(end - begin):
                    begun = partition.segments_before(partition.rows(first + begin + own)[1])
                    place = by_piece[begin + own]
                    if self.turned:
                        place = take("levels", (count, sizes.bins), dtype, place.device)
                    sums, common, own_factors = levels.write(
                        spectrum[:begun, own], shift, square[:begun, own], place
                    )
                    factors.append(own_factors)
                    if self.turned:
                        by_piece[begin + own] = place
                    squares.append(sums[None])
                    shifts.append(common)
                continue
            by_piece[begin:end, :seen] = spectrum.transpose(0, 1)
            if seen < count:
                by_piece[begin:end, seen:] = 0.0
                square = torch.nn.functional.pad(square, (0, 0, 0, count - seen))
            squares.append(square.t())
            shifts.extend([shift] * (end - begin))
        sums = squares[0] if len(squares) == 1 else torch.cat(squares)
        return Group(first, spectra, shifts, sums, recorded)


class _Levels:
    """Segments of several pieces: later pieces take the windows of earlier blocks."""

    def __init__(self, partition: Partition, device: torch.device) -> None:
        self._segments = partition.segments
        self._places = [
            (torch.tensor(positions, device=device), torch.tensor(segments, device=device))
            for positions, segments in zip(partition.positions, partition.segments, strict=True)
        ]
        # Of the last blocks: spectra (segments, F), shift and sums of squares.
        self._recent: deque[tuple[Tensor, float, Tensor]] = deque(maxlen=partition.levels)

    def write(
        self, spectrum: Tensor, shift: float, square: Tensor, out: Tensor
    ) -> tuple[Tensor, float, list[float]]:
        """Write the spectra by piece ``(pieces, F)`` of the next block.

        Returns:
            sums of squares ``(pieces,)``, the shift that all windows now have, and the factors that
            those of this block and of the ones before were multiplied with for it.
        """
        self._recent.appendleft((spectrum, shift, square))
        common = max(shift for _, shift, _ in self._recent)
        squares = square.new_zeros(len(out))
        factors: list[float] = []
        out.zero_()
        for level, (spectrum, shift, square) in enumerate(self._recent):
            within = bisect_left(self._segments[level], len(square))
            if not within:
                break
            positions, segments = (place[:within] for place in self._places[level])
            part = spectrum.index_select(0, segments)
            factor = math.exp(shift - common)
            factors.append(factor)
            if factor != 1.0:
                part = part * factor
            out[positions] = part
            squares[positions] = square.index_select(0, segments) * factor**2
        return squares, common, factors
