"""Row sums of segmented matrices: the normaliser of attention (F4)."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ENTRIES = 1 << 22  # kernel entries summed at a time, in float64


def row_sums(kernels: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """Sum each row over its columns, as sliding sums of the kernels.

    Row i takes from segment r the lags ``i - stops[r] + 1 .. i - starts[r]``: a window of constant
    width. Windows are added up from sums of 2^p consecutive entries, never as a difference of prefix
    sums, so that a sum of non-negative entries keeps full relative accuracy.

    Args:
        kernels: ``(P, R, k, n)``.
        starts: ``(P, R, k)`` or ``(1, 1, k)``.
        stops: like starts; a segment's columns that count are starts..stops-1.

    Returns:
        ``(P, R, n)`` float64.

    Complexity: O(k n log n) time, O(n) memory for each of P and R.
    """
    problems, sets, k, n = kernels.shape
    starts, stops = (t.expand(problems, sets, k) for t in (starts, stops))
    result = kernels.new_zeros((problems, sets, n), dtype=torch.float64)
    if result.numel() == 0:
        return result
    step = max(1, _BLOCK_ENTRIES // max(1, problems * sets * n))
    for r in range(0, k, step):
        block = slice(r, r + step)
        result = result + _window_sums(
            kernels[..., block, :].double(), starts[..., block], stops[..., block]
        ).sum(-2)
    return result


def _window_sums(kernels: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """Return, for row i, the sum of ``kernels[t]`` over ``i - stops < t <= i - starts``."""
    n = kernels.shape[-1]
    width = (stops - starts).clamp(min=0)
    lag = torch.arange(n, device=kernels.device) - starts[..., None]  # the newest lag not yet summed
    power = kernels  # power[t] = sum of the 2^p entries that end at t
    total = torch.zeros_like(kernels)
    for p in range(int(width.max()).bit_length()):
        taken = ((width >> p) & 1).bool()[..., None]
        total = total + power.gather(-1, lag.clamp(min=0)).masked_fill(~taken | (lag < 0), 0.0)
        lag = lag - (taken.long() << p)
        shifted = torch.nn.functional.pad(power, (1 << p, 0))[..., :n]
        power = power + shifted
    return total
