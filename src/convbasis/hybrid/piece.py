"""Attention over one set of keys, with its log-sum-exp; sets are merged under one normaliser.

Softmax attention over the union of disjoint sets of keys is the average of the attentions over each,
weighted by exp(lse): this is how near and far keys are put together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..transforms import final

# Logits that are held at a time, beyond what a fused operator holds.
_LOGITS = 1 << 22


def piece_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None = None,
    visible: Tensor | bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Return softmax attention of queries over keys, and its log-sum-exp; both are differentiable.

    Args:
        query: ``(G, H, m, d)``.
        key: ``(G, H_kv, p, d)``, H a multiple of H_kv.
        value: ``(G, H_kv, p, d_v)``.
        scale: factor of the logits.
        bias: ``(G or 1, H or 1, m or 1, p)``, added to the logits; -inf hides a key. No gradient.
        visible: bool, broadcast to ``(G, H, m)``: rows that see a key, where the caller knows; True if
            all do.

    Returns:
        output ``(G, H, m, d_v)`` and lse ``(G, H, m)``; 0 and -inf for a row that sees no key.
    """
    tensors = (query, key, value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        output, lse = _Piece.apply(query, key, value, scale, bias, visible)
        return output, lse
    return _forward(query, key, value, scale, bias, visible)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return causal attention over as many keys as queries, and its log-sum-exp; nothing is recorded.

    Args:
        query: ``(G, H, m, d)``, on a processor.
        key: ``(G, H, m, d)``.
        value: ``(G, H, m, d)``.
        scale: factor of the logits.
    """
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=True, scale=scale
    )
    return output, lse


def merge(
    output: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Return attention over the union of two disjoint sets of keys, from that over each.

    `lowrank.merge_parts` does the same for any number of sets, of which all may be empty. This is the
    fast form for two of which one never is: it reads each output once, and can write in place.

    Args:
        output: ``(..., d_v)``; of rows that see a key.
        lse: ``(...)``, finite.
        more: ``(..., d_v)``.
        more_lse: ``(...)``; -inf where the second set is empty.
        overwrite: whether the result may take the place of `output`.
    """
    share = (more_lse - lse).sigmoid()[..., None].to(output.dtype)
    together = torch.logaddexp(lse, more_lse)
    if not overwrite or (torch.is_grad_enabled() and (output.requires_grad or more.requires_grad)):
        return torch.lerp(output, more, share), together
    return output.lerp_(more, share), together


def _fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's fused operator serves these tensors and returns a log-sum-exp."""
    return (
        query.device.type == "cpu"
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.numel() > 0
        and key.numel() > 0
    )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    visible: Tensor | bool | None,
) -> tuple[Tensor, Tensor]:
    if _fused(query, key, value):
        mask = None
        if bias is not None:
            # The operator broadcasts over groups and heads alone.
            mask = bias.to(query.dtype).expand(-1, -1, query.shape[-2], -1)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )
        if bias is None or visible is True:
            return output, lse
        # The operator gives 0 for a row that sees no key.
        hidden = ~visible if isinstance(visible, Tensor) else (bias == -torch.inf).all(-1)
        return output, lse.masked_fill(hidden, -torch.inf)
    output = value.new_zeros((*query.shape[:-1], value.shape[-1]))
    lse = query.new_full(query.shape[:-1], -torch.inf)
    for part, rows, logits in _logits(query, key, scale, bias):
        own = logits.logsumexp(-1)
        weights = (logits - own.masked_fill(own == -torch.inf, 0.0)[..., None]).exp_()
        grouped = weights.unflatten(1, (key.shape[1], -1))
        output[part, :, rows] = (grouped @ value[part, :, None]).flatten(1, 2)
        lse[part, :, rows] = own
    return output, lse


def _logits(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield groups, rows and their logits ``(g, H, r, p)``, some at a time."""
    groups, heads, rows, _ = query.shape
    per_row = max(1, heads * key.shape[-2])
    height = max(1, min(rows, _LOGITS // per_row))
    together = max(1, _LOGITS // (per_row * max(1, height)))
    for first in range(0, groups, together):
        part = slice(first, min(groups, first + together))
        for low in range(0, rows, height):
            own = slice(low, min(rows, low + height))
            grouped = query[part, :, own].unflatten(1, (key.shape[1], -1)) * scale
            logits = (grouped @ key[part, :, None].mT).flatten(1, 2)
            if bias is not None:
                of_part = bias if bias.shape[0] == 1 else bias[part]
                logits = logits + (of_part if bias.shape[2] == 1 else of_part[:, :, own])
            yield part, own, logits


class _Piece(torch.autograd.Function):
    """`piece_attention` with an explicit backward pass that makes the weights anew."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        bias: Tensor | None,
        visible: Tensor | bool | None,
    ) -> tuple[Tensor, Tensor]:
        output, lse = _forward(query, key, value, scale, bias, visible)
        ctx.save_for_backward(query, key, value, output, lse, bias)
        ctx.scale = scale
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, bias = ctx.saved_tensors
        with torch.no_grad():
            found = _backward(query, key, value, output, lse, bias, ctx.scale, grad_output, grad_lse)
        if torch.is_grad_enabled():  # somebody may want to differentiate once more
            sources = (grad_output, grad_lse, query, key, value)
            found = [final("hybrid_attention", gradient, *sources) for gradient in found]
        return *found, None, None, None


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    grad_output: Tensor,
    grad_lse: Tensor,
) -> list[Tensor]:
    """Return the gradients of query, key and value."""
    visible = lse > -math.inf
    shared = (grad_lse - (grad_output * output).sum(-1)).masked_fill(~visible, 0.0)
    rows_of = grad_output.masked_fill(~visible[..., None], 0.0)
    safe = lse.masked_fill(~visible, torch.inf)
    of_query, of_key, of_value = (torch.zeros_like(tensor) for tensor in (query, key, value))
    kv_heads = key.shape[1]
    for part, rows, logits in _logits(query, key, scale, bias):
        weights = (logits - safe[part, :, rows, None]).exp_().unflatten(1, (kv_heads, -1))
        up = rows_of[part, :, rows].unflatten(1, (kv_heads, -1))
        own = query[part, :, rows].unflatten(1, (kv_heads, -1))
        of_value[part] += (weights.mT @ up).sum(2)
        change = up @ value[part, :, None].mT
        change += shared[part, :, rows, None].unflatten(1, (kv_heads, -1))
        change *= weights * scale
        of_query[part, :, rows] = (change @ key[part, :, None]).flatten(1, 2)
        of_key[part] += (change.mT @ own).sum(2)
    return [of_query, of_key, of_value]
