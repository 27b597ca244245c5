"""The far field by low rank: a polynomial of logits against the mean far key, between row factors.

The logit of a far key is that of the mean far key, which is a row factor, and a rest, whose exponential
is the polynomial of degree 2 of its largest coordinates: always positive. Row factors are corrected by
ridge regression on the query until the sampled rows have the right far weight. With one segment and
degree 0 this is a mean of all far keys; the polynomial adds what keys differ in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..lowrank import IntervalMask, lowrank_attention_stats
from .sampling import SampledRows
from .scaled_conv import _row_factors
from .window import Window

_DEGREE, _RANK = 2, 8  # 45 features; more coordinates made nothing better
_SWEEPS = 6


def lowrank_far_attention(
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
        sampled: exact rows that the row factors are fitted to.

    Returns:
        output ``(R, n, d_v)`` and lse ``(R, n)``, -inf for none. Factors carry no gradient.

    Complexity: O(n r d_v + n d^2) time for r features.
    """
    n = key.shape[1]
    rows = torch.arange(n)
    mask = IntervalMask(torch.zeros_like(rows), window.first(rows) - 1)
    with torch.no_grad():
        center, columns, targets = _fit(query, key, seen, window, scale, sampled)
    found = lowrank_attention_stats(
        query[None],
        (key - center)[None],
        value.expand(len(query), -1, -1)[None],
        mask,
        degree=_DEGREE,
        rank=min(_RANK, query.shape[-1]),
        scale=scale,
        key_bias=columns[None],
    )
    output, lse = found.output[0], found.lse[0]
    with torch.no_grad():
        factors = _row_factors(query, key, seen, window, scale, sampled, targets, lse)
    return output, (lse + factors).masked_fill(lse == -torch.inf, -torch.inf)


def _fit(
    query: Tensor, key: Tensor, seen: Tensor, window: Window, scale: float, sampled: SampledRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean far key ``(R, 1, d)`` as the sampled rows look at keys, the logarithms of column
    factors ``(R, n)`` and of the far weights of the sampled rows ``(R, s)``."""
    keys = torch.arange(key.shape[1], device=key.device)
    far = (keys < window.first(sampled.rows)[:, None]) & ~seen[:, None]
    weights = sampled.weights * far
    tiny = torch.finfo(weights.dtype).tiny
    targets = weights.sum(-1)
    by_column = weights.sum(1)
    looked = by_column + 0.1 * by_column.mean(-1, keepdim=True) + tiny
    looked = looked.masked_fill(seen, 0.0)
    center = (looked[:, None] @ key) / looked.sum(-1)[:, None, None]
    x = (query[:, sampled.rows] @ (key - center).mT) * scale
    model = (1.0 + x + 0.5 * x * x) * far
    column = torch.ones_like(by_column)
    for _ in range(_SWEEPS):
        row = targets / (model @ column[..., None])[..., 0].clamp(min=tiny)
        of_model = (row[:, None] @ model)[:, 0]
        prior = 0.1 * of_model.mean(-1, keepdim=True) + tiny  # what few rows could look at stays near 1
        column = (by_column + prior) / (of_model + prior)
    return center, column.log().masked_fill(seen, -torch.inf), targets.log() + sampled.lse
