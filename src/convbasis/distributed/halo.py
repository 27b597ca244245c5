"""The halo: the latest tokens of the ranks before, as far back as this rank's windows reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hybrid.window import Window
from .call import Tokens
from .transport import exchange


def halo_begin(first: int, window: Window) -> int:
    """Return where the windows of queries from token first on begin.

    Where queries share windows it is a border between those that do, so that positions counted from
    there have the same windows.
    """
    if window.shared == 1:
        return max(0, first - window.tokens + 1)
    begin = first // window.shared * window.shared - window.reach
    return max(0, begin // window.shared * window.shared)


def with_halo(tokens: Tokens, tensor: Tensor, window: Window) -> Tensor:
    """Return this rank's tokens with those before that windows hold; gradients go back to their ranks.

    Args:
        tokens: of all ranks.
        tensor: ``(B, H, m, c)``, of this rank.
        window: the halo may belong to several ranks.

    Returns:
        ``(B, H, h + m, c)``, from `halo_begin` on.
    """
    before: Tensor = _Halo.apply(tokens, tensor, window)
    return torch.cat([before, tensor], dim=2)


def _overlaps(tokens: Tokens, window: Window) -> list[list[slice]]:
    """Return for each receiver and sender which of the sender's tokens are in the receiver's halo."""
    ends = torch.tensor(tokens.lengths).cumsum(0).tolist()
    begins = [end - length for end, length in zip(ends, tokens.lengths, strict=True)]
    found = []
    for first, length in zip(begins, tokens.lengths, strict=True):
        base = halo_begin(first, window) if length else first
        halo = []
        for begin, end in zip(begins, ends, strict=True):
            low, high = max(base, begin), min(first, end)
            halo.append(slice(low - begin, max(low, high) - begin) if low < high else slice(0, 0))
        found.append(halo)
    return found


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tokens, tensor: Tensor, window: Window) -> Tensor:
        overlaps = _overlaps(tokens, window)
        rank = tokens.ranks.rank
        blocks = [[tensor[:, :, halo[rank]]] for halo in overlaps]
        shapes = [[_shape(tensor, part)] for part in overlaps[rank]]
        arrived = exchange(tokens.ranks, blocks, shapes, tensor, "halo")
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
        arrived = exchange(
            tokens.ranks, [[part] for part in parts], shapes, grad, "gradients of the halo"
        )
        for part, (block,) in zip(own, arrived, strict=True):
            found[:, :, part] += block
        return None, found, None


def _shape(tensor: Tensor, part: slice) -> tuple[int, ...]:
    return (*tensor.shape[:2], part.stop - part.start, tensor.shape[3])
