"""The halo: the latest tokens of the ranks before, as far back as this rank's windows reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import Tokens
from .transport import exchange


def with_halo(tokens: Tokens, tensor: Tensor, reach: int) -> Tensor:
    """Return this rank's tokens with up to `reach` before them; gradients go back to their ranks.

    Args:
        tokens: of all ranks.
        tensor: ``(B, H, m, c)``, of this rank.
        reach: tokens; they may belong to several ranks.

    Returns:
        ``(B, H, h + m, c)`` with h = min(reach, position of this rank's first token).
    """
    before: Tensor = _Halo.apply(tokens, tensor, reach)
    return torch.cat([before, tensor], dim=2)


def _overlaps(tokens: Tokens, reach: int) -> list[list[slice]]:
    """Return for each receiver and sender which of the sender's tokens are in the receiver's halo."""
    ends = torch.tensor(tokens.lengths).cumsum(0).tolist()
    begins = [end - length for end, length in zip(ends, tokens.lengths, strict=True)]
    found = []
    for first, length in zip(begins, tokens.lengths, strict=True):
        base = max(0, first - reach) if length else first
        halo = []
        for begin, end in zip(begins, ends, strict=True):
            low, high = max(base, begin), min(first, end)
            halo.append(slice(low - begin, max(low, high) - begin) if low < high else slice(0, 0))
        found.append(halo)
    return found


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tokens, tensor: Tensor, reach: int) -> Tensor:
        overlaps = _overlaps(tokens, reach)
        rank = tokens.ranks.rank
        blocks = [[tensor[:, :, halo[rank]]] for halo in overlaps]
        shapes = [[_shape(tensor, part)] for part in overlaps[rank]]
        arrived = exchange(tokens.ranks, blocks, shapes, tensor)
        ctx.tokens, ctx.overlaps, ctx.shape = tokens, overlaps, tensor.shape
        return torch.cat([parts[0] for parts in arrived], dim=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, rank = ctx.tokens, ctx.tokens.ranks.rank
        parts = grad.split([part.stop - part.start for part in ctx.overlaps[rank]], dim=2)
        own = [halo[rank] for halo in ctx.overlaps]
        found = grad.new_zeros(ctx.shape)
        shapes = [[_shape(found, part)] for part in own]
        arrived = exchange(tokens.ranks, [[part] for part in parts], shapes, grad)
        for part, (block,) in zip(own, arrived, strict=True):
            found[:, :, part] += block
        return None, found, None


def _shape(tensor: Tensor, part: slice) -> tuple[int, ...]:
    return (*tensor.shape[:2], part.stop - part.start, tensor.shape[3])
