"""The prompt of a planned layer whose tokens are spread over ranks: each attends for some heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.by_heads import attend_by_heads
from ..distributed.call import begin, graph_of_its_own
from ..distributed.handshake import ranks_for, refusals_told
from ..distributed.hybrid import hybrid_attention
from ..distributed.shares import Piece
from ..errors import InputError
from ..plan import HeadPlan
from .exact import Mask
from .masks import MaskSpec, stands_together
from .planned import AppliedPlan
from .prefill import Prefill, planned_prefill
from .reasons import why_exact, why_not_local
from .same_in_ranks import of_plan


def prefill_over_ranks(
    applied: AppliedPlan,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    heads: Sequence[HeadPlan],
    options: dict[str, Any],
) -> Prefill:
    """Return causal attention of one layer for this rank's tokens of whole prompts.

    Args:
        applied: the plan, and its mesh.
        module: the model's attention module.
        query: ``(B, H, m, d)``, of this rank's tokens.
        key: ``(B, H_kv, m, d)``.
        value: ``(B, H_kv, m, d_v)``.
        mask: of this rank's tokens.
        heads: the plan of each of the H heads.
        options: what else the model passes on.

    Returns:
        the output of these tokens, with which of the heads were approximated and fell back, in whatever
        rank.

    Raises:
        InputError: tokens in a cache, or attention that is more than causal.
        DistributedError: ranks that do not fit together, or one that is missing.
    """
    with refusals_told(applied.mesh, applied.timeout):
        mask = _plain_mask(module, query, key, mask, options, len(heads))
        if torch.is_autocast_enabled(query.device.type):  # rotary positions leave float32
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        scaling = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        own = mask.padding(query.device)
        real = query.new_ones((len(query), query.shape[2]), dtype=torch.bool) if own is None else own
    ranks = ranks_for(applied.mesh, applied.timeout)
    window, stated = mask.window, options.get("sliding_window")

    def same() -> dict[str, Any]:
        found = {"scale": scale, "layer": module.layer_idx, "training mode": bool(module.training)}
        found |= {"window": window, "sliding_window": stated}
        return found | of_plan(applied)

    tokens = begin(ranks, query, key, value, real, True, same)
    n = tokens.n
    padding: Tensor | None = tokens.gather_mask(real)
    if padding is not None and bool(padding.all()):
        padding = None
    # A rank's own tokens may be fewer than a window, and their padding at an end.
    outside = padding is None or stands_together(padding)
    _refuse(why_not_local(window, stated, n, lambda: outside))
    exact = [HeadPlan(None)] * len(heads)
    fallen_back = torch.zeros(len(query), len(heads), dtype=torch.bool)
    if window is not None and window < n:
        output = hybrid_attention(
            query,
            key,
            value,
            mesh=applied.mesh,
            window=window,
            sinks=0,
            columns=0,
            scale=scale,
            enable_gqa=True,
            key_padding_mask=None if padding is None else real,
            timeout=applied.timeout,
        )
        return Prefill(output, fallen_back, fallen_back)
    if n <= applied.min_length or (module.training and not applied.training):
        heads = exact

    def attend(piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        done = planned_prefill(
            query,
            key,
            value,
            heads[piece.heads],
            scale=scale,
            padding=padding,
            tolerance=applied.tolerance(n),
            min_length=applied.min_length,
            last_rows=applied.last_rows,
        )
        fallen_back[:, piece.heads] = done.fallen_back
        return done.output

    with graph_of_its_own():
        output = attend_by_heads(tokens, query, key, value, "heads", attend)
    # So that the model's report is the same in all ranks.
    everyones = ranks.gather(
        fallen_back.to(torch.uint8).to(query.device),
        [fallen_back.numel()] * ranks.size,
        "heads that fell back",
    )
    total = torch.stack(everyones).amax(0).view(fallen_back.shape).bool().cpu()
    approximated = torch.tensor([head.setting is not None for head in heads]).expand_as(total)
    if padding is not None:
        approximated = approximated & (padding.sum(1).cpu() > applied.min_length)[:, None]
    return Prefill(output, total, approximated)


def _plain_mask(
    module: Any, query: Tensor, key: Tensor, mask: Mask, options: dict[str, Any], heads: int
) -> MaskSpec:
    """Return the mask of this rank's tokens if a plan can be followed, as far as these tell."""
    if not isinstance(mask, MaskSpec) or not mask.begins or key.shape[2] != query.shape[2]:
        raise InputError(
            "a model whose tokens are spread over ranks attends to whole prompts alone: no cache "
            "before them, no mask of one's own; decode with a model that has no mesh"
        )
    _refuse(why_exact(module, query, mask, options, heads))
    return mask


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise InputError(f"tokens that are spread over ranks cannot be attended to with {reason}")
