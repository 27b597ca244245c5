"""The far field by a convolution between row and column factors, diag(e^α) conv(e^c) diag(e^β).

Column and lag factors are fitted to exact attention in sampled rows by proportional fitting: in turn
they are scaled until their sums over the sampled rows are right. A row's factor is the logit of the
mean far key, corrected by ridge regression on the query over the sampled rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import conv_basis_attention_stats
from .row_factors import row_factors
from .sampling import SampledRows
from .window import Window

# What a key that does not count is lowered by, in nats: nothing is left of it.
_NOTHING = -80.0
_SWEEPS, _LAG_BINS = 6, 64


class Factors(NamedTuple):
    """Logarithms of the factors, of R heads."""

    columns: Tensor
    """``(R, n)``."""
    lags: Tensor
    """``(R, n)``."""


def conv_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    window: Window,
    scale: float,
    sampled: SampledRows,
) -> tuple[Tensor, Tensor]:
    """Return attention over the keys that nothing else sees, and its log-sum-exp.

    Args:
        query: ``(R, n, d)``.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        seen: ``(R, n)``, True for keys that count elsewhere.
        window: of exact tokens.
        scale: factor of the logits.
        sampled: exact rows that the factors are fitted to.

    Returns:
        output ``(R, n, d_v)`` and lse ``(R, n)``, -inf for none. Factors carry no gradient.

    Complexity: O(n d_v log n + n d + s n) time.
    """
    n = key.shape[1]
    with torch.no_grad():
        factors, targets = _fit(seen, window, sampled)
    # Row i looks at keys up to i - window: a convolution from lag 0 on, of rows that far earlier.
    count = n - window.tokens
    zero = torch.zeros_like(value[None, :, :count, :1])
    far = conv_basis_attention_stats(
        zero.expand(-1, len(query), -1, -1),
        zero,
        value[None, :, :count],
        starts=[0],
        key_bias=factors.columns[:, :count],
        lag_bias=factors.lags[:, window.tokens :],
        enable_gqa=True,
    )
    before = (0, 0, window.tokens, 0)
    output = torch.nn.functional.pad(far.output[0], before)
    lse = torch.nn.functional.pad(far.lse[0], before[2:], value=-torch.inf)
    with torch.no_grad():
        rows = row_factors(query, key, seen, window, scale, sampled, targets, lse)
        nothing = torch.nn.functional.pad((~seen[:, :count]).cumsum(-1), before[2:]) == 0
    return output, (lse + rows).masked_fill(nothing, -torch.inf)


def _fit(seen: Tensor, window: Window, sampled: SampledRows) -> tuple[Factors, Tensor]:
    """Return the factors, and the logarithm of the far weight of each sampled row ``(R, s)``,
    -inf where nothing is far."""
    rows, n = sampled.rows, seen.shape[-1]
    keys = torch.arange(n, device=rows.device)
    far = (keys < window.first(rows)[:, None]) & ~seen[:, None]  # (R, s, n)
    weights = sampled.weights * far
    tiny = torch.finfo(weights.dtype).tiny
    targets = weights.sum(-1)
    # Bins of lags, alike in logarithm.
    lag = (rows[:, None] - keys).clamp(min=1)
    edges = torch.linspace(0, float(torch.tensor(float(n)).log()), _LAG_BINS + 1, device=rows.device)
    bins = (torch.bucketize(lag.log(), edges) - 1).clamp(0, _LAG_BINS - 1)
    by_lag = _by_bin(weights, bins)
    by_column = weights.sum(1)
    column = torch.ones_like(by_column).masked_fill_(seen, 0.0)
    of_lag = torch.ones_like(by_lag)
    for _ in range(_SWEEPS):
        model = column[:, None] * of_lag.gather(1, bins.flatten().expand(len(seen), -1)).view(
            weights.shape
        )
        model = model * far
        row = targets / model.sum(-1).clamp(min=tiny)
        model *= row[..., None]
        of_lag *= (by_lag + tiny) / (_by_bin(model, bins) + tiny)
        of_lag.clamp_(1e-6, 1e6)
        model = row[..., None] * far
        model *= of_lag.gather(1, bins.flatten().expand(len(seen), -1)).view(weights.shape)
        looked = model.sum(1)
        # A key that few rows could look at stays near 1.
        prior = 0.1 * looked.mean(-1, keepdim=True) + tiny
        column = ((by_column + prior) / (looked + prior)).masked_fill_(seen, 0.0)
    every = keys.clamp(min=1).log()
    of_every = (torch.bucketize(every, edges) - 1).clamp(0, _LAG_BINS - 1)
    lags = of_lag.clamp(min=1e-30).log()[:, of_every]
    columns = column.clamp(min=1e-30).log().masked_fill(seen, _NOTHING).clamp(min=_NOTHING)
    return Factors(columns, lags), targets.log() + sampled.lse


def _by_bin(weights: Tensor, bins: Tensor) -> Tensor:
    """Return the sums over entries of a bin, ``(R, bins)``."""
    flat = weights.flatten(1)
    return flat.new_zeros((len(flat), _LAG_BINS)).index_add_(1, bins.flatten(), flat)
