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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..workspace import take
from .partition import Partition
from .spectra import (
    CHUNK_BYTES,
    FEW_PIECES,
    Group,
    WindowSpectra,
    by_row,
    column_step,
    piece_spectra,
    spectra_memory,
)
from .windows import Windows

# Bytes of the sums that are added to at a time, there.
_SUM_BYTES = 6 << 20


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
    of_windows = WindowSpectra(windows, partition, step, dtype.to_complex(), turned, max_bytes)
    if step < columns:
        of_windows.keep_within(max_bytes // 2)
    for low in range(0, max(1, columns), step):
        high = min(columns, low + step)
        count = high - low
        own = weights if low == 0 else None
        spectra, by_column = piece_spectra(x[:, low:high], own, dtype, partition, turned)
        squares = torch.stack([by_column[:, :count].sum(-1), by_column[:, count:].sum(-1)], dim=-1)
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


def _multiply(
    of_windows: WindowSpectra, spectra: Tensor, squares: Tensor
) -> Iterator[tuple[int, Tensor, list[float], Tensor]]:
    """Yield a first block, the circular products of it and the next ones ``(blocks, c, N)``, their
    shifts, and what squares entered them ``(blocks, 2)``; a last block that is cut off comes alone."""
    partition, turned = of_windows.partition, of_windows.turned
    sizes = partition.sizes
    width = spectra.shape[-1 if turned else 1]
    together = max(1, CHUNK_BYTES // (width * sizes.transform * squares.element_size()))
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
            part = by_row(product, begin, end) if turned else product[begin:end]
            result = torch.fft.irfft(part, n=sizes.transform)
            yield group.first + begin, result, group.shifts[begin:end], entered[begin:end]
            begin = end


def _matrix_products(group: Group, spectra: Tensor, partition: Partition) -> Tensor:
    """Return the spectra of the product ``(F, blocks, c)``, a matrix product for each frequency."""
    shape = (partition.sizes.bins, len(group.squares), spectra.shape[-1])
    product = take("product", shape, spectra.dtype, spectra.device)
    torch.bmm(group.spectra.transpose(0, 1), spectra.transpose(0, 1), out=product)
    return product


def _sums_of_products(group: Group, spectra: Tensor, partition: Partition) -> Tensor:
    """Return the spectra of the product ``(blocks, c, F)``, added up piece by piece."""
    pieces, width, bins = spectra.shape
    blocks = len(group.squares)
    product = spectra_memory("product", (blocks, width), bins, spectra.dtype, spectra.device, False)
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
