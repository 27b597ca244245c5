"""Logits by segment instead of queries and keys: k numbers a token, for small k.

The kernel of segment r at lag t is the logit of query s + t and the segment's first key, at s. Who
holds a query can compute its logits with all first keys; who computes attention then needs these alone.
They take the place of the queries, and unit vectors that of the keys: ``logits · e_r`` is the logit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def first_real_keys(starts: Tensor, real: Tensor | None, batch: int, n: int) -> Tensor:
    """Return the position of the first real key of each segment, ``(B, k)``.

    Segments without one have some position in them or after them.

    Args:
        starts: ``(k,)``.
        real: bool ``(B, n)``; None if all are real.
        batch: number of sequences.
        n: tokens.
    """
    if real is None:
        return starts.expand(batch, -1)
    tokens = torch.arange(n, device=starts.device)
    following = torch.where(real, tokens, n - 1).flip(-1).cummin(-1).values.flip(-1)
    return following[:, starts]


def segment_logits_of(query: Tensor, first: Tensor, scale: float) -> Tensor:
    """Return the logits ``(B, H, m, k)`` of queries with first keys.

    Args:
        query: ``(B, H, m, d)``.
        first: ``(B, H_kv, k, d)``.
        scale: factor of the logits.
    """
    grouped = query.unflatten(1, (first.shape[1], -1))
    return (grouped @ first[:, :, None].mT).flatten(1, 2) * scale


def unit_keys(starts: Tensor, n: int, like: Tensor) -> Tensor:
    """Return the keys that pick a token's logit of its segment, ``(n, k)``."""
    owner = torch.searchsorted(starts, torch.arange(n, device=starts.device), right=True) - 1
    return torch.nn.functional.one_hot(owner, len(starts)).to(like.dtype)
