"""Direct evaluation: kernels gathered into rows of the matrix, no transform, O(n^2) time.

Every row is a sum over its own columns alone, in float64, so that rounding is relative to that row
and nothing of a later token enters. It serves as the exact backend, for short sequences, and for the
rows whose value a transform would lose in rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .segments import column_segments

_BLOCK_ENTRIES = 1 << 19  # matrix entries gathered at a time: 4 MB in float64, and as much of indices


def row_blocks(
    kernels: Tensor, starts: Tensor, rows: Tensor, fill: float, *, transpose: bool = False
) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Yield blocks of the given rows of segmented matrices, densely.

    Args:
        kernels: ``(G, k, n)``, k >= 1.
        starts: ``(G, k)``.
        rows: ``(G, m)`` row indices, ascending in each matrix.
        fill: the entry of columns before the first start; entries above the diagonal get it too.
        transpose: take the rows of the transposes instead.

    Yields:
        (matrices, positions, columns, entries): a slice of G, a slice of the m rows, a slice of e
        columns, and their entries ``(g, b, e)``, float64; no row has any in other columns.
    """
    for part, block, columns, index, hidden in _indices(kernels, starts, rows, transpose=transpose):
        entries = kernels[part].reshape(len(index), -1).gather(1, index.flatten(1)).view(index.shape)
        yield part, block, columns, entries.double().masked_fill(hidden, fill)


def row_entries(logits: Tensor, starts: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield blocks of the given rows of one matrix of logits, and where its entries come from.

    Args:
        logits: ``(1, k, n)``.
        starts: ``(1, k)``; the first one 0.
        rows: ``(1, m)``, ascending.

    Yields:
        (positions, entries, index): a slice of the m rows, the entries ``(1, b, e)``, -inf above the
        diagonal, and their places in the flat kernels.
    """
    for _, block, _, index, hidden in _indices(logits, starts, rows, transpose=False):
        entries = logits.reshape(1, -1).gather(1, index.flatten(1)).view(index.shape)
        yield block, entries.masked_fill(hidden, -torch.inf), index


def _indices(
    kernels: Tensor, starts: Tensor, rows: Tensor, *, transpose: bool
) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
    """Yield matrices, positions, columns, places in the flat kernels, and where there is no entry."""
    groups, _, n = kernels.shape
    count = rows.shape[-1]
    per_group = max(1, _BLOCK_ENTRIES // n)
    segment = column_segments(starts, n)
    for g in range(0, groups, per_group):
        part = slice(g, min(g + per_group, groups))
        position = 0
        while position < count:
            block = slice(position, _block_end(rows[part], position, n, transpose))
            own = rows[part, block, None]
            if transpose:
                columns = slice(int(own.min()), n)
                lag = torch.arange(columns.start, n, device=rows.device) - own
                owner = segment[part].gather(1, rows[part, block])[..., None]
            else:
                columns = slice(0, int(own.max()) + 1)
                lag = own - torch.arange(columns.stop, device=rows.device)
                owner = segment[part, None, columns]
            hidden = (lag < 0) | (owner < 0)
            index = lag.add_(owner * n).masked_fill_(hidden, 0)
            yield part, block, columns, index, hidden
            position = block.stop


def _block_end(rows: Tensor, position: int, n: int, transpose: bool) -> int:
    """Return the end of a block of rows whose entries up to the diagonal fit into one block."""
    groups, count = rows.shape
    if transpose:  # the first row reaches furthest
        extent = n - int(rows[:, position].min())
        return min(count, position + max(1, _BLOCK_ENTRIES // (groups * extent)))
    extent = int(rows[:, position].max()) + 1
    end = min(count, position + max(1, _BLOCK_ENTRIES // (groups * extent)))
    # The rows before that end reach at most as far as its last one.
    extent = int(rows[:, end - 1].max()) + 1
    return min(count, position + max(1, _BLOCK_ENTRIES // (groups * extent)))


def product_rows(
    kernels: Tensor, starts: Tensor, x: Tensor, rows: Tensor, *, transpose: bool = False
) -> Tensor:
    """Return the given rows of the segmented matrix, or of its transpose, times x.

    Args:
        kernels: ``(G, k, n)``.
        starts: ``(G, k)``.
        x: ``(G, n, c)``.
        rows: ``(G, m)``, ascending.

    Returns:
        ``(G, m, c)``.
    """
    pieces: dict[int, list[Tensor]] = {}
    for part, _, columns, entries in row_blocks(kernels, starts, rows, 0.0, transpose=transpose):
        product = (entries @ x[part, columns].double()).to(x.dtype)
        pieces.setdefault(part.start, []).append(product)
    return torch.cat([torch.cat(blocks, dim=1) for blocks in pieces.values()])


def softmax_rows(
    logits: Tensor, starts: Tensor, value: Tensor, rows: Tensor, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the given rows of softmax attention under segmented logits, and their log-sum-exp.

    Args:
        logits: ``(G, k, n)`` segment kernels; the maximum of each row is taken out before exp, so
            that any range of logits is safe.
        starts: ``(G, k)``.
        value: ``(G, n, d_v)``.
        rows: ``(G, m)``, ascending.
        key_bias: ``(G, n)``, added to the logits by key, -inf for keys that nobody sees; None for none.

    Returns:
        output ``(G, m, d_v)`` and lse ``(G, m)``: 0 and -inf for rows that see no key.
    """
    outputs: dict[int, list[Tensor]] = {}
    sums: dict[int, list[Tensor]] = {}
    for part, _, columns, entries in row_blocks(logits, starts, rows, -torch.inf):
        if key_bias is not None:
            entries = entries + key_bias[part, None, columns]
        peak = entries.detach().amax(-1, keepdim=True)
        empty = peak == -torch.inf
        weights = entries.sub(peak.masked_fill(empty, 0.0)).exp_()
        total = weights.sum(-1, keepdim=True).masked_fill(empty, 1.0)
        output = weights @ value[part, columns].double() / total
        lse = (peak + total.log())[..., 0]
        outputs.setdefault(part.start, []).append(output.to(value.dtype))
        sums.setdefault(part.start, []).append(lse.to(value.dtype))
    result = torch.cat([torch.cat(blocks, dim=1) for blocks in outputs.values()])
    return result, torch.cat([torch.cat(blocks, dim=1) for blocks in sums.values()])
