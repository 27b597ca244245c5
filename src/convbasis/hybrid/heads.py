"""All heads of a batch, one key-value head at a time, and what is known about the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype
from .group import attend_group
from .settings import Settings
from .strict import Running, at_the_start, attend_strictly


class HybridDispatch(NamedTuple):
    """What one call computed."""

    parts: tuple[str, ...]
    """Names of the parts that were merged."""
    keys_per_query: float
    """Keys with exact logits, in the mean over queries; segments count one each."""
    sampled_rows: int
    """Rows of exact attention, for fits and estimate together."""


class HybridStats(NamedTuple):
    """Attention output with what is known about it."""

    output: Tensor
    """``(B, H, n, d_v)``, dtype of the query."""
    lse: Tensor
    """``(B, H, n)`` natural log of the normaliser, of the keys that count; -inf at padding."""
    error_estimate: Tensor
    """``(B, H)`` float64, upper bound at 95 % confidence of the relative error of a head's output
    against exact attention, in the Euclidean norm; 0 where everything is exact. With 64
    samples, errors of fewer than about one row in forty may go unseen."""
    dispatch: HybridDispatch
    """What ran."""
    error_mean: Tensor
    """``(B, H)`` float64, the estimate itself."""


def attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Settings,
    scale: float,
    mask: Tensor | None,
    estimated: bool,
    running: Sequence[Running] | None = None,
) -> tuple[HybridStats, list[Running]]:
    """Run sequence by sequence, and within one by key-value head.

    Args:
        query: ``(B, H, m, d)``, of the last m tokens.
        key: ``(B, H_kv, n, d)``.
        value: ``(B, H_kv, n, d_v)``.
        settings: what to compute.
        scale: factor of the logits.
        mask: ``(B, n)`` of real tokens, for m = n; None for all.
        estimated: whether to estimate errors.
        running: what strict choices are made from, for each sequence and key-value head in it; None at
            the start.

    Returns:
        the attention, and what the choices of later tokens are made from, empty unless strict.
    """
    batch, heads, n, _ = query.shape
    work = compute_dtype(query.dtype)
    group = heads // key.shape[1]
    bound = torch.zeros((2, batch, heads), dtype=torch.float64, device=query.device)
    parts: tuple[str, ...] = ()
    keys, rows, runs = 0.0, 0, 0
    outputs, sums, left = [], [], list[Running]()
    with torch.autocast(query.device.type, enabled=False):
        for b in range(batch):
            real = None if mask is None or bool(mask[b].all()) else mask[b].nonzero()[:, 0]
            if real is not None and not len(real):
                outputs.append(query.new_zeros((heads, n, value.shape[-1])))
                sums.append(query.new_full((heads, n), -torch.inf, dtype=work))
                continue
            of_heads = []
            for h in range(key.shape[1]):
                q, k, v = (
                    (tensor if real is None else tensor.index_select(1, real)).to(work)
                    for tensor in (
                        query[b, h * group : (h + 1) * group],
                        key[b, h : h + 1],
                        value[b, h : h + 1],
                    )
                )
                if settings.strict:
                    known = at_the_start(q) if running is None else running[b * key.shape[1] + h]
                    done, after = attend_strictly(q, k, v, settings, scale, estimated, known)
                    left.append(after)
                else:
                    done = attend_group(q, k, v, settings, scale, estimated)
                of_heads.append(done)
                bound[:, b, h * group : (h + 1) * group] = torch.stack([done.mean, done.bound])
                parts, rows = done.parts, done.rows
                keys, runs = keys + done.keys, runs + 1
            found = torch.cat([done.output for done in of_heads]).to(query.dtype)
            lse_found = torch.cat([done.lse for done in of_heads])
            if real is not None:
                found = found.new_zeros((heads, n, found.shape[-1])).index_copy(1, real, found)
                hidden = lse_found.new_full((heads, n), -torch.inf)
                lse_found = hidden.index_copy(1, real, lse_found)
            outputs.append(found)
            sums.append(lse_found)
    dispatch = HybridDispatch(parts, keys / max(1, runs), rows)
    stats = HybridStats(_stacked(outputs), _stacked(sums), bound[1], dispatch, bound[0])
    return stats, left


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)
