"""Exact attention of a few rows, without its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..transforms import final
from .piece import piece_attention

_TOGETHER = 32  # rows that are computed over the keys of the last of them


def exact_rows(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float, offset: int = 0
) -> Tensor:
    """Return exact causal attention of some rows, ``(R, s, d_v)``, in O(s n (d + d_v)) time.

    Args:
        query: ``(R, m, d)``, of the tokens offset .. offset + m - 1.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        rows: ``(s,)`` positions, increasing, one at least.
        scale: factor of the logits.
        offset: position of the first query.
    """
    found = []
    parts = rows.split(_TOGETHER)
    # What follows a row is hidden: keys from the first row of a part on. The rest of the bias stays 0.
    widest = max(int(part[-1] - part[0]) + 1 for part in parts)
    height = min(len(rows), _TOGETHER)
    bias = query.new_zeros((height, int(rows[-1]) + 1))
    for part in parts:
        end = int(part[-1]) + 1
        keys = torch.arange(end - widest, end, device=rows.device)
        bias[: len(part), -widest:] = torch.where(keys > part[:, None], -torch.inf, 0.0)
        own = bias[None, None, : len(part), -end:]
        output, _ = piece_attention(
            query.index_select(1, part - offset)[None],
            key[None, :, :end],
            value[None, :, :end],
            scale,
            own.clone() if torch.is_grad_enabled() else own,  # a backward pass needs it
            torch.ones((1, 1, 1), dtype=torch.bool, device=rows.device),
        )
        found.append(output[0])
    return torch.cat(found, dim=1)


def with_gradient(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float
) -> Tensor:
    """Return exact attention of rows that is known already, with the gradient of `exact_rows`.

    Args:
        output: ``(R, s, d_v)``, what `exact_rows` gives for the other arguments, up to rounding.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        found: Tensor = _Known.apply(output, query, key, value, rows, scale)
        return found
    return output


class _Known(torch.autograd.Function):
    """The identity of what is known; the backward pass computes the rows again."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, rows)
        ctx.scale = scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *given, rows = ctx.saved_tensors
        with torch.enable_grad():
            own = [tensor.detach().requires_grad_() for tensor in given]
            again = exact_rows(own[0], own[1], own[2], rows, ctx.scale)
            found = torch.autograd.grad(again, own, gradient.detach())
        if torch.is_grad_enabled():  # somebody may want to differentiate once more
            found = tuple(final("hybrid_attention", each, gradient, *given) for each in found)
        return None, *found, None, None
