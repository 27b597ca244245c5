"""Attention of the next tokens to a cache: the rows of the conv basis, laid out.

Row i takes from segment r, which begins at s, the products of its first key with the queries i, i - 1,
...: for tokens s, s + 1, ... The products with all recent queries are one matrix product, of
which each row of a segment is a run of neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import Past

_ENTRIES = 1 << 22  # entries of the attention matrix at a time


def attend_to_cache(
    past: Past, lag_bias: Tensor, starts: list[int], count: int, scale: float
) -> Tensor:
    """Return the attention of the last tokens.

    Args:
        past: what they attend to, themselves included.
        lag_bias: ``(H, n)``.
        starts: of the k segments.
        count: tokens whose attention is wanted.
        scale: factor of the logits.

    Returns:
        ``(B, H, count, d_v)``.

    Complexity: O(count · n d_v + k d (count + longest segment)) time for each head.
    """
    with torch.autocast(past.queries.device.type, enabled=False):
        return _attend(past, lag_bias, starts, count, scale)


def _attend(past: Past, lag_bias: Tensor, starts: list[int], count: int, scale: float) -> Tensor:
    query, first_keys, values, key_bias = past
    batch, heads, known, _ = query.shape
    kv_heads, n = values.shape[1:3]
    sets = heads // kv_heads
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(work).unflatten(1, (kv_heads, sets)) * scale
    # The newest query first: the products that a row takes from a segment then follow each other.
    products = first_keys.to(work)[:, :, None] @ grouped.flip(-2).mT  # (B, H_kv, R, k, m)
    widths = [stop - start for start, stop in zip(starts, [*starts[1:], n], strict=True)]
    short = max(0, count + max(widths) - 1 - known)
    products = torch.nn.functional.pad(products, (0, short)).flatten(1, 2)
    bias = key_bias.to(work)
    step = max(1, _ENTRIES // (batch * heads * n))
    outputs = []
    for high in range(n, n - count, -step):  # rows low .. high - 1, the last one first
        low = max(n - count, high - step)
        rows = torch.arange(high - 1, low - 1, -1, device=query.device)
        logits = _rows(products, widths, n - high, high - low)
        lags = rows[:, None] - torch.arange(n, device=query.device)
        logits += bias[:, :, None] + lag_bias.to(work)[:, lags.clamp(min=0)]
        logits.masked_fill_(lags < 0, -torch.inf)
        weights = logits.softmax(-1).unflatten(1, (kv_heads, sets))
        outputs.append((weights @ values.to(work)[:, :, None]).flatten(1, 2).flip(-2))
    return torch.cat(outputs[::-1], dim=2).to(query.dtype)


def _rows(products: Tensor, widths: list[int], first: int, count: int) -> Tensor:
    """Return ``(B, H, count, n)``, the row `first` before the last one first."""
    batch, heads, segments, _ = products.shape
    strides = products.stride()
    offset = products.storage_offset() + first * strides[3]
    full = widths[0]
    if all(width == full for width in widths[:-1]) and widths[-1] <= full:
        # All alike: one view of whole segments, of which the last one's end is cut off.
        shape = (batch, heads, count, segments, full)
        steps = (strides[0], strides[1], strides[3], strides[2], strides[3])
        laid_out = products.as_strided(shape, steps, offset).flatten(-2)
        return laid_out[..., : sum(widths)].contiguous()
    parts = []
    for r, width in enumerate(widths):
        run = (strides[0], strides[1], strides[3], strides[3])
        place = offset + r * strides[2]
        parts.append(products.as_strided((batch, heads, count, width), run, place))
    return torch.cat(parts, dim=-1)
