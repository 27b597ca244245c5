"""Segment kernels of attention logits, from queries and the first key of each segment (F5)."""

from __future__ import annotations

import torch
from torch import Tensor

from .convolve.segments import lag_mask


def segment_logits(
    query: Tensor,
    key: Tensor,
    starts: Tensor,
    scale: float,
    stop: Tensor | None = None,
    lag_bias: Tensor | None = None,
) -> Tensor:
    """Return ``c_r[t] = scale · q[s_r + t]·k[s_r] + lag_bias[t]``, -inf outside the matrix.

    Args:
        query: ``(P, R, n, d)``.
        key: ``(P, n, d)``.
        starts: ``(P, R, k)`` or ``(1, 1, k)``; a start of n gives a kernel of -inf.
        scale: multiplies the products.
        stop: ``(P, 1, 1)`` tokens that count; kernels are -inf from there on too. None for all.
        lag_bias: ``(P, R, n)``; None for none.

    Returns:
        ``(P, R, k, n)``.

    Complexity: O(k n d) time, as one matrix product, and O(k n) memory.
    """
    problems, sets, n, d = query.shape
    k = starts.shape[-1]
    starts = starts.expand(problems, sets, k)
    position = starts.clamp(max=n - 1).reshape(problems, sets * k, 1)
    first_keys = key.gather(1, position.expand(-1, -1, d)).view(problems, sets, k, d) * scale
    products = first_keys @ query.mT  # by query position
    lags = torch.arange(n, device=query.device)
    shifted = products.gather(-1, (starts[..., None] + lags).clamp(max=n - 1))
    if lag_bias is not None:
        shifted += lag_bias[..., None, :]
    return shifted.masked_fill(~lag_mask(starts, n, stop), -torch.inf)
