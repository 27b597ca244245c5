"""Hybrid attention where the tokens are: windows with a halo, and columns that all ranks send round."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..hybrid.columns import chosen_attention
from ..hybrid.piece import merge
from ..hybrid.settings import Settings
from ..hybrid.window import Window, window_attention
from .call import Tokens
from .halo import with_halo
from .heavy import heavy_columns
from .transport import gather_tokens


def why_not_by_tokens(settings: Settings, mask: Tensor | None) -> str | None:
    """Return why these settings need whole heads, or None."""
    for name in ("blocks", "strict", "correction"):
        if getattr(settings, name):
            return f"{name}={getattr(settings, name)}"
    if settings.far_field != "none":
        return f"far_field={settings.far_field!r}"
    return None if mask is None else "key_padding_mask"


def attend_by_tokens(
    tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, settings: Settings, scale: float
) -> Tensor:
    """Return window, sinks and columns under one normaliser, for this rank's queries.

    Args:
        tokens: of all ranks.
        query: ``(B, H, m, d)``.
        key: ``(B, H_kv, m, d)``.
        value: ``(B, H_kv, m, d_v)``.
        settings: which keys a query sees.
        scale: factor of the logits.

    Complexity: about window (d + d_v) numbers of each key-value head are sent on, and a rank's columns
        to all others.
    """
    work = compute_dtype(query.dtype)
    d = query.shape[-1]
    window = Window(settings.window, settings.shared)
    own = torch.cat([key, value], dim=-1)
    near = with_halo(tokens, own, window).to(work)
    columns, distant = None, None
    if window.begin < tokens.n and settings.sinks + settings.columns:
        q, k = query.to(work), key.to(work)
        columns = heavy_columns(tokens, q, k, settings, window, scale)
        kv_heads = key.shape[1]
        places = columns.clamp(max=tokens.n - 1).unflatten(1, (kv_heads, -1)).flatten(2)
        distant = gather_tokens(tokens.ranks, tokens.lengths, own, places).to(work)
        distant = distant.unflatten(2, (-1, columns.shape[-1]))  # (B, H_kv, R, c, d + d_v)
    if not query.shape[2]:  # nothing to compute, but gradients of what the others made of these tokens
        sources = [x for x in (query, near, distant) if x is not None]
        nothing = torch.stack([x.sum().to(query.dtype) * 0 for x in sources]).sum()
        return query.new_zeros((*query.shape[:3], value.shape[-1])) + nothing
    rows = tokens.first + torch.arange(query.shape[2], device=query.device)
    outputs = []
    for b, queries in enumerate(query.to(work)):
        for h, group in enumerate(queries.unflatten(0, (key.shape[1], -1))):
            offset = near.shape[2] - query.shape[2]
            known = near[b, h : h + 1]
            output, lse = window_attention(group, known[..., :d], known[..., d:], window, offset, scale)
            if columns is not None and distant is not None:
                own_columns = columns[b].unflatten(0, (key.shape[1], -1))[h]
                keys, values = distant[b, h][..., :d], distant[b, h][..., d:]
                far = chosen_attention(group, keys, values, own_columns, window.first(rows), scale)
                output, lse = merge(output, lse, *far)
            outputs.append(output)
    return torch.cat(outputs).view(*query.shape[:3], -1).to(query.dtype)
