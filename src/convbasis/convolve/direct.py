"""Attention and products with the matrix laid out, some rows at a time, without any transform.

O(n^2) time, and the fastest way for short sequences and short segments. With a kernel reversed in
memory and rows taken from the last to the first, the entries of a segment are a strided view of its
kernel: laying them out copies runs of neighbours, and no index is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ENTRIES = 1 << 16  # entries of the matrices that are laid out at a time


def direct_attention(
    logits: Tensor, starts: Tensor, value: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return softmax attention under segmented logits.

    Args:
        logits: ``(P, R, k, n)`` segment kernels, -inf past lag n - 1 - start.
        starts: ``(P, R, k)`` or ``(1, 1, k)``.
        value: ``(P, n, d_v)``, dtype of logits.
        real: bool ``(P, n)``, False for keys that nobody sees; None for none.

    Returns:
        output ``(P·R, n, d_v)`` and lse ``(P·R, n)``: 0 and -inf for rows that see no key.

    Complexity: O(n^2 (1 + d_v)) time for each head.
    """
    problems, sets, k, n = logits.shape
    heads = problems * sets
    lists = starts.flatten(0, 1).tolist()
    reversed_ = _reversed(logits.reshape(heads, k, n), -torch.inf)
    output = value.new_zeros((heads, n, value.shape[-1]))
    lse = value.new_full((heads, n), -torch.inf)
    together = max(1, _BLOCK_ENTRIES // (n * n)) if len(lists) == 1 else 1
    for low in range(0, heads, together):
        group = slice(low, min(heads, low + together))
        count = group.stop - group.start
        owner = torch.arange(group.start, group.stop, device=value.device) // sets
        mask = None if real is None else real[owner]
        values = value[owner] if sets > 1 or count < heads else value
        own = [start for start in lists[low if len(lists) > 1 else 0] if start < n]
        if not own:
            continue
        step = max(1, min(n, _BLOCK_ENTRIES // (count * n)))
        rows = value.new_empty((count, step, value.shape[-1]))
        for end in range(n, own[0], -step):
            begin = max(own[0], end - step)
            entries = _laid_out(reversed_[group], own, begin, end)
            if mask is not None:
                entries.masked_fill_(~mask[:, None, own[0] : end], -torch.inf)
            peak = entries.amax(-1, keepdim=True)
            if mask is not None:
                peak.masked_fill_(peak == -torch.inf, 0.0)
            entries.sub_(peak).exp_()
            total = entries.sum(-1, keepdim=True)
            lse[group, begin:end] = total.log().add_(peak).squeeze(-1).flip(1)
            if mask is not None:
                total.masked_fill_(total == 0, 1.0)
            torch.div(torch.bmm(entries, values[:, own[0] : end]), total, out=rows[:, : end - begin])
            output[group, begin:end] = rows[:, : end - begin].flip(1)
    return output, lse


def direct_product(kernels: Tensor, starts: Tensor, x: Tensor, transpose: bool) -> Tensor:
    """Return segmented matrices, or their transposes, times x.

    Args:
        kernels: ``(G, k, n)``, zero past lag n - 1 - start.
        starts: ``(G, k)`` or ``(1, k)``.
        x: ``(G, n, c)``, dtype of kernels.
        transpose: multiply with the transposes.

    Returns:
        ``(G, n, c)``.

    Complexity: O(n^2 c) time for each matrix.
    """
    groups, _, n = kernels.shape
    lists = starts.tolist()
    reversed_ = _reversed(kernels, 0.0)
    result = torch.zeros_like(x)
    for g in range(groups):
        own = [start for start in lists[g if len(lists) > 1 else 0] if start < n]
        if not own:
            continue
        step = max(1, min(n, _BLOCK_ENTRIES // n))
        for end in range(n, own[0], -step):
            begin = max(own[0], end - step)
            entries = _laid_out(reversed_[g : g + 1], own, begin, end)[0]
            columns = slice(own[0], end)
            if transpose:
                result[g, columns] += entries.t() @ x[g, begin:end].flip(0)
            else:
                result[g, begin:end] = (entries @ x[g, columns]).flip(0)
    return result


def _reversed(kernels: Tensor, fill: float) -> Tensor:
    """Return ``(G, k, 2 n)``: kernels from last entry to first, then what is above the diagonal."""
    return torch.nn.functional.pad(kernels.flip(-1), (0, kernels.shape[-1]), value=fill)


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
        view = backward.as_strided(shape, steps, offset)  # its entries overlap: a copy is needed
        return view.clone(memory_format=torch.contiguous_format).flatten(2)
    parts = []
    for r, (start, stop) in enumerate(zip(seen, stops, strict=True)):
        offset = backward.storage_offset() + r * strides[1] + (n - end + start) * strides[2]
        part = (groups, rows, stop - start)
        parts.append(backward.as_strided(part, (strides[0], strides[2], strides[2]), offset))
    return torch.cat(parts, dim=-1)
