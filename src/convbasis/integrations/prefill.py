"""The prompt of a planned layer: each head by its setting, exact where that is not good enough."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..checks import check_qkv
from ..hybrid import hybrid_attention
from ..hybrid.exact import serves_exactly
from ..hybrid.heads import Together, attend_pieces, pieces_of_work
from ..hybrid.settings import Settings, check_settings
from ..plan import HeadPlan, HeadSetting

_ROWS = 512  # of exact attention that share a mask
# What a plan does not know is as by default.
OTHERS = {
    name: signature(hybrid_attention).parameters[name].default
    for name in ("num_segments", "samples", "seed")
}


class Prefill(NamedTuple):
    """What a planned layer gives for a batch of prompts."""

    output: Tensor
    """``(B, H, n, d_v)``."""
    fallen_back: Tensor
    """bool ``(B, H)``: approximated heads whose estimate exceeded the tolerance, and that are exact."""
    approximated: Tensor
    """bool ``(B, H)``: heads that were approximated, those that fell back among them."""
    estimated: Tensor | None = None
    """bool ``(B, H)``: heads whose output is finite, as its estimate is; None for none."""


def planned_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Sequence[HeadPlan],
    *,
    scale: float,
    padding: Tensor | None,
    tolerance: float | None,
    min_length: int = 0,
    last_rows: int = 0,
) -> Prefill:
    """Return causal attention of one layer over whole prompts, each head by its setting.

    The sizes of settings are those of each prompt's own length, whatever it is padded to.

    Args:
        query: ``(B, H, n, d)``, finite.
        key: ``(B, H_kv, n, d)``, finite.
        value: ``(B, H_kv, n, d_v)``, finite.
        heads: the plan of each of the H heads.
        scale: factor of the logits.
        padding: bool ``(B, n)``, True for a real token; None if all are.
        tolerance: a head whose estimated error exceeds it in a prompt is computed exactly in that
            prompt; None leaves every head as it is.
        min_length: prompts of at most so many tokens are exact.
        last_rows: the latest tokens of each prompt, in which every head is exact.
    """
    batch, count, n, _ = query.shape
    check_qkv(query, key, value, True)
    lengths = [n] * batch if padding is None else padding.sum(1).tolist()
    settings = {length: _settings(heads, length) for length in lengths if length > min_length}
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    # Exact heads among others are pieces of work like these; elsewhere they are attended to at once.
    as_pieces = serves_exactly(query, value) and not recorded
    pieces = []
    for b, length in enumerate(lengths):
        if length in settings:
            pieces += pieces_of_work(query, key, b, settings[length])
            if as_pieces and any(settings[length]):
                alone = [head for head, own in enumerate(settings[length]) if own is None]
                pieces += [Together(b, [head], ()) for head in alone]
    # The longest first: then all threads end at about the same time.
    pieces.sort(key=lambda piece: -sum(heads[head].cost for head in piece.heads))
    # As the model wants it in the end: by token, then by head.
    empty = query.new_empty if padding is None else query.new_zeros
    output = empty(batch, n, count, value.shape[-1]).transpose(1, 2)
    found, _ = attend_pieces(
        query,
        key,
        value,
        pieces,
        scale,
        padding,
        tolerance is not None,
        into=None if recorded else output,
        last_rows=last_rows,
        tolerance=tolerance if as_pieces else None,
    )
    approximated = torch.zeros(batch, count, dtype=torch.bool)
    fallen_back = torch.zeros(batch, count, dtype=torch.bool)
    estimated = torch.zeros(batch, count, dtype=torch.bool)
    done = torch.zeros(batch, count, dtype=torch.bool)
    for (b, members, own), group in zip(pieces, found, strict=True):
        done[b, members] = True
        if not own:
            continue
        if recorded:
            output[b, members] = group.output
        approximated[b, members] = True
        if tolerance is not None:
            fallen_back[b, members] = again = ~(group.bound <= tolerance).cpu()
            estimated[b, members] = ~again & (group.rows > 0)
    if not as_pieces:
        done &= ~fallen_back
    for row, exact in enumerate((~done).tolist()):
        members = [head for head in range(count) if exact[head]]
        if not members or not lengths[row]:
            continue
        real = slice(None) if padding is None else padding[row].nonzero()[:, 0]
        tensors = (x[row : row + 1, :, real] for x in (query, key, value))
        attended = attend_last_rows(*of_heads(members, *tensors), scale)[0]
        places = torch.tensor(members, device=query.device)
        if padding is None:
            output[row, places] = attended
        else:
            output[row, places[:, None], real] = attended
    return Prefill(output, fallen_back, approximated, estimated)


def _settings(heads: Sequence[HeadPlan], n: int) -> list[Settings | None]:
    """Return what each head computes for n tokens."""
    return [None if head.setting is None else _settings_of(head.setting, n) for head in heads]


@functools.lru_cache(1024)  # few settings, for each length in a batch
def _settings_of(setting: HeadSetting, n: int) -> Settings:
    own = Settings(**setting.at(n)._asdict(), **OTHERS)
    check_settings(own)
    return own


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


def attend_last_rows(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return causal attention of the last rows, all or some at a time: a mask takes O(n) memory.

    Args:
        query: ``(1, H, m, d)``, of the last m tokens.
        key: ``(1, H_kv, n, d)``.
        value: ``(1, H_kv, n, d_v)``.
        scale: factor of the logits.
    """
    m, n = query.shape[2], key.shape[2]
    if m == n:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    found = []
    for low in range(0, m, _ROWS):
        rows = torch.arange(low, min(m, low + _ROWS), device=query.device) + n - m
        end = n - m + low + len(rows)
        found.append(
            scaled_dot_product_attention(
                query[:, :, low : low + len(rows)],
                key[:, :, :end],
                value[:, :, :end],
                attn_mask=torch.arange(end, device=query.device) <= rows[:, None],
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(found, dim=2)


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
