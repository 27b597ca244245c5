"""The far field by low rank: a polynomial of logits against the mean far key, between row factors.

The logit of a far key is that of the mean far key, which is a row factor, and a rest, whose exponential
is the polynomial of degree 2 of its largest coordinates: always positive. Row factors are corrected by
ridge regression on the query until the sampled rows have the right far weight. With one segment and
degree 0 this is a mean of all far keys; the polynomial adds what keys differ in.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..lowrank import IntervalMask, lowrank_attention_stats
from ..lowrank.coordinates import balanced_coordinates
from .row_factors import row_factors
from .sampling import SampledRows
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
    with torch.no_grad():
        far = _far_keys(seen, window, sampled.rows)
        weights = sampled.weights * far
        center = _mean_key(key, seen, weights)
        maps = balanced_coordinates(query * scale, key - center)
    # Few coordinates, the same for the fit and for what is computed.
    left = (query * scale) @ maps.of_query[..., :_RANK]
    right = (key - center) @ maps.of_key[..., :_RANK]
    with torch.no_grad():
        logits = left[:, sampled.rows] @ right.mT
        columns, targets = _fit(logits, seen, far, weights)
        targets += sampled.lse
    found = lowrank_attention_stats(
        left[None],
        right[None],
        value.expand(len(query), -1, -1)[None],
        _keys_before(n, window),
        degree=_DEGREE,
        scale=1.0,
        key_bias=columns[None],
    )
    output, lse = found.output[0], found.lse[0]
    with torch.no_grad():
        factors = row_factors(query, key, seen, window, scale, sampled, targets, lse)
    return output, (lse + factors).masked_fill(lse == -torch.inf, -torch.inf)


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)  # later calls may record gradients
def _keys_before(n: int, window: Window) -> IntervalMask:
    """Return the mask of all keys before the window; heads share it."""
    rows = torch.arange(n)
    return IntervalMask(torch.zeros_like(rows), window.first(rows) - 1)


def _far_keys(seen: Tensor, window: Window, rows: Tensor) -> Tensor:
    """Return which keys are far from each row and count nowhere else, ``(R, s, n)``."""
    keys = torch.arange(seen.shape[-1], device=seen.device)
    return (keys < window.first(rows)[:, None]) & ~seen[:, None]


def _mean_key(key: Tensor, seen: Tensor, weights: Tensor) -> Tensor:
    """Return the mean far key ``(R, 1, d)`` as the sampled rows look at keys."""
    tiny = torch.finfo(weights.dtype).tiny
    by_column = weights.sum(1)
    looked = by_column + 0.1 * by_column.mean(-1, keepdim=True) + tiny
    looked = looked.masked_fill(seen, 0.0)
    total = looked.sum(-1).clamp(min=tiny)  # all keys may count elsewhere
    return (looked / total[:, None])[:, None] @ key


def _fit(logits: Tensor, seen: Tensor, far: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return logarithms of column factors ``(R, n)`` and of the far weights of sampled rows ``(R, s)``.

    Args:
        logits: ``(R, s, n)`` of the sampled rows, against the mean far key.
        seen: ``(R, n)``, True for keys that count elsewhere.
        far: ``(R, s, n)``, True for far keys.
        weights: ``(R, s, n)``, their exact weights.
    """
    tiny = torch.finfo(weights.dtype).tiny
    targets, by_column = weights.sum(-1), weights.sum(1)
    model = (1.0 + logits + 0.5 * logits * logits) * far
    column = torch.ones_like(by_column)
    for _ in range(_SWEEPS):
        row = targets / (model @ column[..., None])[..., 0].clamp(min=tiny)
        of_model = (row[:, None] @ model)[:, 0]
        prior = 0.1 * of_model.mean(-1, keepdim=True) + tiny  # what few rows could look at stays near 1
        column = (by_column + prior) / (of_model + prior)
    return column.log().masked_fill(seen, -torch.inf), targets.log()
