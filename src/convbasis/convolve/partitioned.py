"""Products by partitioned convolution (B1): transforms of blocks, summed as small matrix products.

Each piece of x and each window of the matrix (see `partition`) is transformed once, at length N; then,
frequency by frequency, the spectra of the output blocks are one small complex matrix product of windows
and pieces, so that one inverse transform serves a whole block of rows. With p pieces it takes
O(n c log N + k n log N + p n c N / M) time: the logarithm has left the term with k. Rounding stays
within blocks: it is relative to what a block of rows sees, not to the whole sequence.

Everything is done block by block in memory that stays in the processor's caches. With many pieces the
spectra are turned, frequency first, as matrix products want them; few are added up as they are.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import unit_noise
from .partition import Partition
from .windows import Windows
from .workspace import take

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
# Bytes of the sums that are added to at a time, there.
_SUM_BYTES = 6 << 20
# Complex entries that a row of spectra is a multiple of, in memory: additions read whole vectors.
_ALIGNED = 8
# From this many frequencies on, a copy of one block's spectra is turned in two steps.
_FAR_APART = 1000
# Bytes of the spectra of x that are worked with at a time.
_SPECTRA_BYTES = 160 << 20
_LINE_BYTES = 64
# Bytes that are transformed at a time: what the processor's own cache holds.
_CHUNK_BYTES = 512 << 10


class Block(NamedTuple):
    """Rows of a product, before they are put where they belong."""

    rows: tuple[int, int]
    """First row and the one after the last; whole blocks, but for the end of the sequence."""
    columns: tuple[int, int]
    """First column of x and the one after the last."""
    values: Tensor
    """``(blocks, columns, rows of each)``, divided by exp(shift)."""
    weights: Tensor | None
    """``(blocks, rows of each)``, the product with the weights, divided by exp(shift); with the first
    columns alone."""
    shifts: list[float]
    """Of each block."""
    energy: Tensor
    """What `row_noise` makes the expected rounding error of a row of values, and of its weight, from;
    ``(blocks, 2)``."""


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


def partitioned_blocks(
    windows: Windows, partition: Partition, x: Tensor, weights: Tensor | None, max_bytes: int
) -> Iterator[Block]:
    """Multiply a segmented matrix with x, and with weights, some blocks of rows at a time.

    Args:
        windows: of the matrix.
        partition: of the matrix; at least one segment.
        x: ``(n, c)``; converted to the dtype of weights where there are any.
        weights: ``(n,)``, one more column of x whose product comes first; None for none.
        max_bytes: bound on the memory of spectra; never below one column.

    Yields:
        `Block`; all rows of the first columns, then of the next. Values hold until the next one.
    """
    sizes, columns = partition.sizes, x.shape[-1]
    dtype = x.dtype if weights is None else weights.dtype
    pieces = len(partition.pieces)
    step = column_step(pieces, sizes.bins, max(1, columns), dtype.itemsize, max_bytes)
    turned = pieces > FEW_PIECES
    of_windows = _WindowSpectra(windows, partition, step, dtype.to_complex(), turned, max_bytes)
    if step < columns:
        of_windows.keep_within(max_bytes // 2)
    for low in range(0, max(1, columns), step):
        high = min(columns, low + step)
        count = high - low
        own = weights if low == 0 else None
        spectra, squares = _piece_spectra(x[:, low:high], own, dtype, partition, turned)
        for first, product, shifts, entered in _multiply(of_windows, spectra, squares):
            begin = first * sizes.block
            end = min(partition.n, begin + len(product) * sizes.block)
            useful = product[..., sizes.piece : sizes.piece + min(sizes.block, end - begin)]
            energy = torch.empty_like(entered)
            torch.linalg.vector_norm(product[:, :count], dim=(1, 2), out=energy[:, 0])
            torch.linalg.vector_norm(product[:, count:], dim=(1, 2), out=energy[:, 1])
            yield Block(
                (begin, end),
                (low, high),
                useful[:, :count],
                None if own is None else useful[:, count],
                shifts,
                energy.square_().add_(entered, alpha=4.0),
            )


def _piece_spectra(
    x: Tensor, weights: Tensor | None, dtype: torch.dtype, partition: Partition, turned: bool
) -> tuple[Tensor, Tensor]:
    """Return the transforms of the pieces and sums of squares ``(p, 2)``.

    Weights, where there are any, are the last of the c columns; the squares are those of x and of them.
    The transforms are ``(p, c, F)``, or turned ``(p, F, c)``.
    """
    sizes, count = partition.sizes, x.shape[-1]
    width, total = count + (weights is not None), len(partition.pieces)
    spectra = _spectra(
        "piece spectra", (total, width), sizes.bins, dtype.to_complex(), x.device, turned
    )
    squares = torch.zeros((total, 2), dtype=dtype, device=x.device)
    together = max(1, _CHUNK_BYTES // (width * sizes.transform * dtype.itemsize))
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
        torch.linalg.vector_norm(part[:, :count], dim=(1, 2), out=squares[first:last, 0])
        torch.linalg.vector_norm(part[:, count:], dim=(1, 2), out=squares[first:last, 1])
        by_piece = spectra[first:last]
        (by_piece.mT if turned else by_piece).copy_(torch.fft.rfft(part))
    return spectra, squares.square_()


def _spectra(
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


def _multiply(
    of_windows: _WindowSpectra, spectra: Tensor, squares: Tensor
) -> Iterator[tuple[int, Tensor, list[float], Tensor]]:
    """Yield a first block, the circular products of it and the next ones ``(blocks, c, N)``, their
    shifts, and what squares entered them ``(blocks, 2)``; a last block that is cut off comes alone."""
    partition, turned = of_windows.partition, of_windows.turned
    sizes = partition.sizes
    width = spectra.shape[-1 if turned else 1]
    together = max(1, _CHUNK_BYTES // (width * sizes.transform * squares.element_size()))
    whole = partition.n // sizes.block
    for group in of_windows.groups():
        blocks, count = group.squares.shape
        multiply = _matrix_products if turned else _sums_of_products
        product = multiply(group, spectra[:count], partition)
        entered = group.squares @ squares[:count]
        begin = 0
        while begin < blocks:
            end = min(blocks, begin + together)
            if begin < whole - group.first < end:
                end = whole - group.first
            if not turned:
                part = product[begin:end]
            elif end - begin == 1 and sizes.bins > _FAR_APART:
                # Rows of a block are far apart in memory: side by side first, then turned.
                rows = take("product rows", (sizes.bins, width), spectra.dtype, spectra.device)
                rows.copy_(product[:, begin])
                part = _spectra(
                    "product turned", (1, width), sizes.bins, spectra.dtype, spectra.device, False
                )
                part[0].copy_(rows.t())
            else:
                part = product[:, begin:end].permute(1, 2, 0).contiguous()
            result = torch.fft.irfft(part, n=sizes.transform)
            yield group.first + begin, result, group.shifts[begin:end], entered[begin:end]
            begin = end


def _matrix_products(group: _Group, spectra: Tensor, partition: Partition) -> Tensor:
    """Return the spectra of the product ``(F, blocks, c)``, a matrix product for each frequency."""
    shape = (partition.sizes.bins, len(group.squares), spectra.shape[-1])
    product = take("product", shape, spectra.dtype, spectra.device)
    torch.bmm(group.spectra.transpose(0, 1), spectra.transpose(0, 1), out=product)
    return product


def _sums_of_products(group: _Group, spectra: Tensor, partition: Partition) -> Tensor:
    """Return the spectra of the product ``(blocks, c, F)``, added up piece by piece."""
    pieces, width, bins = spectra.shape
    blocks = len(group.squares)
    product = _spectra("product", (blocks, width), bins, spectra.dtype, spectra.device, False)
    step = max(1, _SUM_BYTES // (blocks * bins * spectra.element_size()))
    if not pieces:
        return product.zero_()
    for low in range(0, width, step):
        part = slice(low, low + step)
        for index in range(pieces):
            # The first block of the group that sees the piece.
            seen = max(0, partition.pieces[index].low // partition.sizes.block - group.first)
            factor, values = group.spectra[seen:, index, None], spectra[index, part]
            if index == 0:
                product[:seen, part] = 0.0
                torch.mul(factor, values, out=product[seen:, part])
            else:
                product[seen:, part].addcmul_(factor, values)
    return product


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
    sizes, columns = partition.sizes, x.shape[-1]
    result = torch.zeros_like(x)
    squares = x.new_zeros((len(partition.pieces), 2), dtype=torch.float64)  # of outputs and of inputs
    pieces = len(partition.pieces)
    step = column_step(pieces, sizes.bins, columns, 2 * x.element_size(), max_bytes)
    for low in range(0, columns, step):
        high = min(columns, low + step)
        spectra, entered = _transposed_spectra(windows, partition, x[:, low:high], max_bytes)
        squares[:, 1] += entered
        for index, piece in enumerate(partition.pieces):
            whole = torch.fft.irfft(spectra[index].t().contiguous(), n=sizes.transform)
            squares[index, 0] += torch.linalg.vector_norm(whole).double().square()
            result[piece.low : piece.high, low:high] = whole[:, : piece.high - piece.low].t()
    noise = row_noise(squares[:, 0] + 4.0 * squares[:, 1], sizes.transform, x.dtype)
    lengths = torch.tensor([piece.high - piece.low for piece in partition.pieces], device=x.device)
    by_row = noise.repeat_interleave(lengths)
    return result, torch.nn.functional.pad(by_row, (len(x) - len(by_row), 0))


def _transposed_spectra(
    windows: Windows, partition: Partition, x: Tensor, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """Return spectra of the product by piece ``(p, F, c)``, and what squares entered them ``(p,)``."""
    sizes, columns = partition.sizes, x.shape[-1]
    dtype = x.dtype.to_complex()
    total = torch.zeros((sizes.bins, len(partition.pieces), columns), dtype=dtype, device=x.device)
    entered = torch.zeros(len(partition.pieces), dtype=torch.float64, device=x.device)
    rows = x.new_zeros((columns, sizes.transform))
    for group in _WindowSpectra(windows, partition, columns, dtype, True, max_bytes).groups():
        blocks, count = group.squares.shape
        right = take("product", (blocks, sizes.bins, columns), dtype, x.device)
        for own in range(blocks):
            begin, end = partition.rows(group.first + own)
            rows[:, sizes.piece + end - begin :] = 0.0
            rows[:, sizes.piece : sizes.piece + end - begin] = x[begin:end].t()
            right[own].copy_(torch.fft.rfft(rows).conj_physical().t())
            square = torch.linalg.vector_norm(rows).double().square()
            entered[:count] += group.squares[own].double() * square
        # Conjugated here and in the end, as a correlation wants it.
        total[:, :count] += torch.bmm(group.spectra.permute(1, 2, 0), right.transpose(0, 1))
    return total.conj_physical_().transpose(0, 1), entered


class _Group(NamedTuple):
    """Windows of some blocks, as matrices of blocks and pieces for each frequency."""

    first: int
    """The first block."""
    spectra: Tensor
    """``(blocks, pieces, F)``, or turned; 0 for pieces that a block does not see."""
    shifts: list[float]
    """Of each block."""
    squares: Tensor
    """Sums of squares of the window of each piece ``(blocks, pieces)``."""


class _WindowSpectra:
    """Transforms of all windows, in groups of blocks whose spectra, and those of x, stay small."""

    def __init__(
        self,
        windows: Windows,
        partition: Partition,
        width: int,
        dtype: torch.dtype,
        turned: bool,
        max_bytes: int,
    ) -> None:
        """Keep what groups are made from.

        Args:
            windows: of the matrix.
            partition: of the matrix.
            width: columns of x that are worked with at a time.
            dtype: of the spectra.
            turned: see `_Group`.
            max_bytes: bound on the memory of spectra; a group takes a quarter of it, or one block.
        """
        self.partition, self.turned = partition, turned
        self._most = max_bytes // 4
        self._windows, self._width, self._dtype = windows, width, dtype
        self._kept: list[_Group] | None = None
        self._keep = False

    def keep_within(self, max_bytes: int) -> None:
        """Keep the spectra for the next time if they fit."""
        partition = self.partition
        bins = sum(
            partition.pieces_before(partition.rows(block)[1]) for block in range(partition.blocks)
        )
        self._keep = bins * partition.sizes.bins * self._dtype.itemsize <= max_bytes

    def groups(self) -> Iterator[_Group]:
        """Yield all groups; each holds until the next one, or all of them where they are kept."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[_Group] = []
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

    def _group(self, first: int, levels: _Levels) -> _Group:
        """Return the group that begins with a block."""
        partition, sizes, dtype = self.partition, self.partition.sizes, self._dtype
        blocks = min(partition.blocks - first, group_blocks(self._bytes(first), turned=self.turned))
        # Later blocks see more pieces, and all have room for those of the last.
        while blocks > 1 and blocks * self._bytes(first + blocks - 1) > self._most:
            blocks -= 1
        end = partition.rows(first + blocks - 1)[1]
        count, segments = partition.pieces_before(end), max(1, partition.segments_before(end))
        # Spectra that are kept have memory of their own.
        spectra = _spectra(
            "window spectra",
            (blocks, count),
            sizes.bins,
            dtype,
            self._windows.device,
            self.turned,
            fresh=self._keep,
        )
        by_piece = spectra.mT if self.turned else spectra
        together = max(1, 2 * _CHUNK_BYTES // (segments * sizes.transform * dtype.itemsize))
        shifts: list[float] = []
        squares = []
        for begin in range(0, blocks, together):
            end = min(blocks, begin + together)
            seen = partition.segments_before(partition.rows(first + end - 1)[1])
            window, shift = self._windows.next(first + begin, end - begin, seen)
            square = torch.linalg.vector_norm(window, dim=-1).square_()
            spectrum = torch.fft.rfft(window)
            if partition.levels > 1:
                for own in range(end - begin):
                    begun = partition.segments_before(partition.rows(first + begin + own)[1])
                    place = by_piece[begin + own]
                    if self.turned:
                        place = take("levels", (count, sizes.bins), dtype, place.device)
                    sums, common = levels.write(
                        spectrum[:begun, own], shift, square[:begun, own], place
                    )
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
        return _Group(first, spectra, shifts, squares[0] if len(squares) == 1 else torch.cat(squares))


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
    ) -> tuple[Tensor, float]:
        """Write the spectra by piece ``(pieces, F)`` of the next block.

        Returns:
            sums of squares ``(pieces,)`` and the shift that all windows now have.
        """
        self._recent.appendleft((spectrum, shift, square))
        common = max(shift for _, shift, _ in self._recent)
        squares = square.new_zeros(len(out))
        out.zero_()
        for level, (spectrum, shift, square) in enumerate(self._recent):
            within = bisect_left(self._segments[level], len(square))
            if not within:
                break
            positions, segments = (place[:within] for place in self._places[level])
            part = spectrum.index_select(0, segments)
            factor = math.exp(shift - common)
            if factor != 1.0:
                part = part * factor
            out[positions] = part
            squares[positions] = square.index_select(0, segments) * factor**2
        return squares, common
