"""Logits by segment instead of queries and keys: k numbers a token, for small k.

The kernel of segment r at lag t is the logit of query s + t and the segment's first key, at s. Who
holds a query can compute its logits with all first keys; who computes attention then needs these alone.
They take the place of the queries, and unit vectors that of the keys: ``logits · e_r`` is the logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ranks import Ranks


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


def gather_tokens(ranks: Ranks, lengths: Sequence[int], tensor: Tensor, positions: Tensor) -> Tensor:
    """Return tokens of the whole sequence, the same in all ranks; gradients go back to their owners.

    Args:
        ranks: the processes.
        lengths: tokens of each rank.
        tensor: ``(B, H, m, c)``, of this rank's tokens.
        positions: ``(B, p)`` or ``(B, H, p)`` in the whole sequence, the same in all ranks.

    Returns:
        ``(B, H, p, c)``.
    """
    places = positions if positions.ndim == 3 else positions[:, None]
    places = places.expand(*tensor.shape[:2], -1)
    found: Tensor = _Gather.apply(ranks, list(lengths), tensor, places)
    return found


class _Gather(torch.autograd.Function):
    """Every rank sends the tokens that it owns to all."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, lengths: list[int], tensor: Tensor, places: Tensor) -> Tensor:
        ends = torch.tensor(lengths, device=places.device).cumsum(0)
        owner = torch.searchsorted(ends, places.contiguous(), right=True)  # (B, H, p)
        mine = owner == ranks.rank
        first = int(ends[ranks.rank]) - lengths[ranks.rank]
        b, h, p = mine.nonzero(as_tuple=True)
        index = (b, h, places[b, h, p] - first)
        width = tensor.shape[-1]
        counts = torch.bincount(owner.flatten(), minlength=ranks.size).tolist()
        arrived = ranks.gather(tensor[index], [count * width for count in counts])
        found = tensor.new_empty((*places.shape, width))
        for rank, rows in enumerate(arrived):
            found[owner == rank] = rows.view(-1, width)
        ctx.ranks, ctx.shape = ranks, tensor.shape
        ctx.save_for_backward(owner, *index)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        owner, *index = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        blocks = [[grad[owner == rank]] for rank in range(ranks.size)]
        own = blocks[ranks.rank][0]
        arrived = ranks.all_to_all(blocks, [own.numel()] * ranks.size, grad)
        total = torch.stack(arrived).sum(0).view(own.shape)
        found = grad.new_zeros(ctx.shape)
        found.index_put_(tuple(index), total, accumulate=True)
        return None, None, found, None
