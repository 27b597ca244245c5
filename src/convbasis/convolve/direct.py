"""Products with the matrix laid out, some rows at a time, without any transform.

O(n^2) time, and the fastest way for short sequences and short segments. With a kernel reversed in
memory and rows taken from the last to the first, the entries of a segment are a strided view of its
kernel: laying them out copies runs of neighbours, and no index is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .workspace import take

_BLOCK_ENTRIES = 1 << 18  # entries of the matrices that are laid out at a time


def direct_product(
    kernels: Tensor,
    starts: Tensor,
    x: Tensor,
    transpose: bool = False,
    *,
    row_sums: Tensor | None = None,
) -> Tensor:
    """Return segmented matrices, or their transposes, times x.

    Args:
        kernels: ``(G, k, n)``, zero past lag n - 1 - start.
        starts: ``(G, k)`` or ``(1, k)``.
        x: ``(G, n, c)``, dtype of kernels.
        transpose: multiply with the transposes.
        row_sums: ``(G, n)`` of zeros, to be filled with the sums of the matrices' rows, for less than
            one more column of x costs; None for none, and always with transposes.

    Returns:
        ``(G, n, c)``.

    Complexity: O(n^2 c) time for each matrix.
    """
    groups, _, n = kernels.shape
    lists = starts.tolist()
    reversed_ = _reversed(kernels)
    result = torch.zeros_like(x)
    # Matrices with the same segments are laid out together while they are small.
    together = max(1, _BLOCK_ENTRIES // (n * n)) if len(lists) == 1 else 1
    for low in range(0, groups, together):
        part = slice(low, min(groups, low + together))
        own = [start for start in lists[low if len(lists) > 1 else 0] if start < n]
        if not own:
            continue
        step = max(1, min(n, _BLOCK_ENTRIES // ((part.stop - part.start) * n)))
        for end in range(n, own[0], -step):
            begin = max(own[0], end - step)
            entries = _laid_out(reversed_[part], own, begin, end)
            columns = slice(own[0], end)
            if transpose:
                result[part, columns].baddbmm_(entries.mT, x[part, begin:end].flip(1))
            else:
                shape = (part.stop - part.start, end - begin, x.shape[-1])
                rows = take("laid out rows", shape, x.dtype, x.device)
                torch.bmm(entries, x[part, columns], out=rows)
                result[part, begin:end] = rows.flip(1)
                if row_sums is not None:
                    row_sums[part, begin:end] = entries.sum(-1).flip(1)
    return result


def _reversed(kernels: Tensor) -> Tensor:
    """Return ``(G, k, 2 n)``: kernels from last entry to first, then the zeros above the diagonal."""
    return torch.nn.functional.pad(kernels.flip(-1), (0, kernels.shape[-1]))


def _laid_out(backward: Tensor, starts: list[int], begin: int, end: int) -> Tensor:
    """Return rows end-1, end-2, ..., begin of the matrices, columns from the first start to end-1.

    Args:
        backward: ``(g, k, 2 n)``, see `_reversed`.
        starts: of the segments in use.
        begin: the last row.
        end: one more than the first row.

    Returns:
        ``(g, end - begin, end - starts[0])``.
    """
    groups, _, double = backward.shape
    n, rows = double // 2, end - begin
    seen = [start for start in starts if start < end]
    stops = [*seen[1:], end]
    width = stops[0] - seen[0]
    strides = backward.stride()
    # Entry (i, j) is kernel[i - j] = backward[n - 1 - i + j]; the first of these rows is i = end - 1.
    if all(stop - start == width for start, stop in zip(seen, stops, strict=True)):
        shape = (groups, rows, len(seen), width)
        steps = (strides[0], strides[2], strides[1] + width * strides[2], strides[2])
        offset = backward.storage_offset() + (n - end + seen[0]) * strides[2]
        laid_out = take("laid out", shape, backward.dtype, backward.device)
        return laid_out.copy_(backward.as_strided(shape, steps, offset)).flatten(2)
    parts = []
    for r, (start, stop) in enumerate(zip(seen, stops, strict=True)):
        offset = backward.storage_offset() + r * strides[1] + (n - end + start) * strides[2]
        part = (groups, rows, stop - start)
        parts.append(backward.as_strided(part, (strides[0], strides[2], strides[2]), offset))
    full = (groups, rows, end - seen[0])
    laid_out = take("laid out", full, backward.dtype, backward.device)
    return torch.cat(parts, dim=-1, out=laid_out)
