"""The prompt of a planned layer: each head by its setting, exact where that is not good enough."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..checks import check_finite, check_qkv
from ..hybrid import hybrid_attention
from ..hybrid.heads import attend_pieces, pieces_of_work
from ..hybrid.settings import Settings, check_settings
from ..plan import ConcreteSetting, HeadPlan


class Prefill(NamedTuple):
    """What a planned layer gives for a batch of prompts."""

    output: Tensor
    """``(B, H, n, d_v)``."""
    fallen_back: Tensor
    """bool ``(B, H)``: approximated heads whose estimate exceeded the tolerance, and that are exact."""


def planned_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Sequence[HeadPlan],
    *,
    scale: float,
    padding: Tensor | None,
    tolerance: float | None,
) -> Prefill:
    """Return causal attention of one layer over whole prompts, each head by its setting.

    Args:
        query: ``(B, H, n, d)``.
        key: ``(B, H_kv, n, d)``.
        value: ``(B, H_kv, n, d_v)``.
        heads: the plan of each of the H heads.
        scale: factor of the logits.
        padding: bool ``(B, n)``, True for a real token; None if all are.
        tolerance: a head whose estimated error exceeds it in a prompt is computed exactly in that
            prompt; None leaves every head as it is.
    """
    batch, count, n, _ = query.shape
    check_qkv(query, key, value, True)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_finite(name, tensor, None if padding is None else padding[:, None, :, None])
    settings = [None if head.setting is None else _settings(head.setting.at(n)) for head in heads]
    pieces = [piece for b in range(batch) for piece in pieces_of_work(query, key, b, settings)]
    # The longest first: then all threads end at about the same time.
    pieces.sort(key=lambda piece: -heads[piece.heads[0]].cost * len(piece.heads))
    found, _ = attend_pieces(query, key, value, pieces, scale, padding, tolerance is not None)
    output = query.new_zeros(batch, count, n, value.shape[-1])
    approximated = torch.zeros(batch, count, dtype=torch.bool)
    fallen_back = torch.zeros(batch, count, dtype=torch.bool)
    for (b, members, _), group in zip(pieces, found, strict=True):
        output[b, members] = group.output
        approximated[b, members] = True
        if tolerance is not None:
            fallen_back[b, members] = ~(group.bound <= tolerance).cpu()
    for row, exact in enumerate((~approximated | fallen_back).tolist()):
        members = [head for head in range(count) if exact[head]]
        if members:
            real = slice(None) if padding is None else padding[row].nonzero()[:, 0]
            chosen = of_heads(members, *(x[row : row + 1, :, real] for x in (query, key, value)))
            attended = scaled_dot_product_attention(
                *chosen, is_causal=True, scale=scale, enable_gqa=True
            )
            places = torch.tensor(members, device=query.device)
            if padding is None:
                output[row, places] = attended[0]
            else:
                output[row, places[:, None], real] = attended[0]
    return Prefill(output, fallen_back)


def _settings(sizes: ConcreteSetting) -> Settings:
    """Return the arguments of hybrid attention, those that a plan does not know by default."""
    defaults = signature(hybrid_attention).parameters
    others = {name: defaults[name].default for name in ("num_segments", "samples", "seed")}
    settings = Settings(**sizes._asdict(), **others)
    check_settings(settings)
    return settings


def sliding_prefill(
    query: Tensor, key: Tensor, value: Tensor, *, window: int, scale: float, padding: Tensor | None
) -> Tensor:
    """Return exact attention of a layer whose queries see their latest keys alone, in O(n window) time.

    Args:
        query: ``(B, H, n, d)``.
        key: ``(B, H_kv, n, d)``.
        value: ``(B, H_kv, n, d_v)``.
        window: latest keys that a query sees, its own included.
        scale: factor of the logits.
        padding: bool ``(B, n)``, True for a real token, at one or both ends; None if all are real.
    """
    return hybrid_attention(
        query,
        key,
        value,
        window=window,
        sinks=0,
        columns=0,
        scale=scale,
        enable_gqa=True,
        key_padding_mask=padding,
    )


def of_heads(
    members: list[int], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries of some heads with their keys and values, shared where whole groups share."""
    count, sharing = query.shape[1], query.shape[1] // key.shape[1]
    if len(members) == count:
        return query, key, value
    groups = [head // sharing for head in members]
    whole = sorted(set(groups))
    if len(whole) * sharing == len(members):
        groups = whole
    return query[:, members], key[:, groups], value[:, groups]
