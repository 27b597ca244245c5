"""Exact attention of a few rows, without its weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..transforms import final
from ..workers import share
from .piece import merge, piece_attention

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

    def attend(part: Tensor) -> Tensor:
        own = query[:, part - offset]
        first, end = int(part[0]) + 1, int(part[-1]) + 1
        # Keys that all of these rows see, and those between the first and the last of them.
        output, lse = _over(own, key[:, :first], value[:, :first], scale)
        if first < end:
            keys = torch.arange(first, end, device=rows.device)
            hidden = torch.where(keys > part[:, None], -torch.inf, 0.0).to(query.dtype)
            more = _over(own, key[:, first:end], value[:, first:end], scale, hidden, part >= first)
            output, _ = merge(output, lse, *more, overwrite=True)
        return output

    found = share([partial(attend, part) for part in rows.split(_TOGETHER)])
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _over(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention of rows to some keys, and its log-sum-exp."""
    output, lse = piece_attention(
        query[None],
        key[None],
        value[None],
        scale,
        None if bias is None else bias[None, None],
        None if visible is None else visible[None, None],
    )
    return output[0], lse[0]


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
