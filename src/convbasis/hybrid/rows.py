"""Exact attention of a few rows, without its weights."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transforms import final
from ..workers import share
from .joined import joined
from .piece import merge, piece_attention

_TOGETHER = 32  # rows that are computed over the keys of the last of them


class Part(NamedTuple):
    """Some rows, and the keys up to the last of them."""

    rows: Tensor
    """``(s,)``, increasing."""
    common: int
    """First keys that all of the rows see, and that are computed apart from the others; 0 for none."""
    end: int
    """Keys that the last of them sees."""
    hidden: Tensor
    """``(s, end - common)``, -inf for what a row does not see."""


def in_parts(rows: Tensor, size: int, dtype: torch.dtype, *, masked: bool = False) -> list[Part]:
    """Return rows ``(s,)``, increasing, so many at a time.

    Args:
        rows: numbers.
        size: rows of a part.
        dtype: of masks.
        masked: whether keys that all rows of a part see have a mask like the others: fewer operators,
            and more to read for each, which pays for rows that lie far apart.
    """
    found = []
    for part in rows.split(size) if len(rows) else ():
        common, end = 0 if masked else int(part[0]) + 1, int(part[-1]) + 1
        keys = torch.arange(common, end, device=rows.device)
        hidden = torch.where(keys > part[:, None], -torch.inf, 0.0).to(dtype)
        found.append(Part(part, common, end, hidden))
    return found


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, scale: float, part: Part, offset: int = 0
) -> Tensor:
    """Return exact causal attention of some rows, ``(R, s, d_v)``; arguments as of `exact_rows`."""
    own = query[:, part.rows - offset]
    if not part.common:
        return _attend_from(0, own, key, value, scale, part)[0]
    # All heads as one: each reads these keys.
    known = key[None, :, : part.common], value[None, :, : part.common]
    together = piece_attention(own.flatten(0, 1)[None, None], *known, scale)
    output, lse = (x[0, 0].unflatten(0, own.shape[:2]) for x in together)
    if part.common < part.end:
        more = _attend_from(part.common, own, key, value, scale, part)
        output, _ = merge(output, lse, *more, overwrite=True)
    return output


def _attend_from(
    first: int, query: Tensor, key: Tensor, value: Tensor, scale: float, part: Part
) -> tuple[Tensor, Tensor]:
    """Return attention of the rows of a part, ``(R, s, d)``, over the keys that have a mask."""
    output, lse = piece_attention(
        query[None],
        key[None, :, first : part.end].expand(-1, len(query), -1, -1),
        value[None, :, first : part.end].expand(-1, len(query), -1, -1),
        scale,
        part.hidden[None, None],
        True if first == 0 else (part.rows >= first)[None, None],
    )
    return output[0], lse[0]


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
    parts = in_parts(rows, _TOGETHER, query.dtype)
    return joined(
        share([partial(attend_part, query, key, value, scale, part, offset) for part in parts]), 1
    )


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
