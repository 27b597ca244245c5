"""All heads of a batch, each for itself, and what is known about the result."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..workers import run_all
from .group import Group, attend_group, nothing
from .settings import Settings
from .strict import Running, at_the_start, attend_strictly

_OF_HEADS = ("output", "lse", "mean", "bound")  # what a group knows of each of its heads


class HybridDispatch(NamedTuple):
    """What one call computed."""

    parts: tuple[str, ...]
    """Names of the parts that were merged, in any sequence."""
    keys_per_query: float
    """Keys with exact logits, in the mean over queries; segments count one each."""
    sampled_rows: int
    """Rows of exact attention, for fits and estimate together, in the longest sequence."""


class HybridStats(NamedTuple):
    """Attention output with what is known about it."""

    output: Tensor
    """``(B, H, n, d_v)``, dtype of the query."""
    lse: Tensor
    """``(B, H, n)`` natural log of the normaliser, of the keys that count; -inf at padding."""
    error_estimate: Tensor
    """``(B, H)`` float64, upper bound at 95 % confidence of the relative error of a head's output
    against exact attention, in the Euclidean norm; 0 where everything is exact. Where one row in
    twenty may be off by more than half of its norm, it is at least as large as that. Errors of fewer
    rows may go unseen."""
    dispatch: HybridDispatch
    """What ran."""
    error_mean: Tensor
    """``(B, H)`` float64, the estimate itself."""


class Together(NamedTuple):
    """Heads of one sequence that share keys and settings: one piece of work."""

    sequence: int
    """Its number in the batch."""
    heads: list[int]
    """Numbers of query heads."""
    settings: Settings
    """What they compute."""


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
    """Attend with all heads of all sequences by the same settings.

    Args:
        query: ``(B, H, m, d)``, of the last m tokens.
        key: ``(B, H_kv, n, d)``.
        value: ``(B, H_kv, n, d_v)``.
        settings: what to compute.
        scale: factor of the logits.
        mask: ``(B, n)`` of real tokens, for m = n; None for all.
        estimated: whether to estimate errors.
        running: what strict choices are made from, as returned for the tokens before; None at first.

    Returns:
        the attention, and what the choices of later tokens are made from, empty unless strict.
    """
    batch, heads = query.shape[:2]
    own = [settings] * heads
    pieces = [piece for b in range(batch) for piece in pieces_of_work(query, key, b, own)]
    groups, after = attend_pieces(query, key, value, pieces, scale, mask, estimated, running)
    output, lse, mean, bound = (
        parts[0] if len(parts) == 1 else torch.cat(parts)
        for parts in ([getattr(group, name) for group in groups] for name in _OF_HEADS)
    )
    ran = [group for group in groups if group.parts]
    dispatch = HybridDispatch(
        tuple(dict.fromkeys(part for group in ran for part in group.parts)),
        sum(group.keys for group in ran) / max(1, len(ran)),
        max((group.rows for group in ran), default=0),
    )
    of_batch = (batch, heads)
    stats = HybridStats(
        output.unflatten(0, of_batch),
        lse.unflatten(0, of_batch),
        bound.view(of_batch),
        dispatch,
        mean.view(of_batch),
    )
    return stats, after


def pieces_of_work(
    query: Tensor, key: Tensor, sequence: int, settings: Sequence[Settings | None]
) -> list[Together]:
    """Return the heads of a sequence, each with what shares its work; those without settings left out.

    An accelerator takes heads that share keys and settings at once; on a processor each is by itself.
    """
    if query.device.type == "cpu":
        return [Together(sequence, [head], own) for head, own in enumerate(settings) if own is not None]
    sharing = query.shape[1] // key.shape[1]
    found: dict[tuple[int, Settings], list[int]] = {}
    for head, own in enumerate(settings):
        if own is not None:
            found.setdefault((head // sharing, own), []).append(head)
    return [Together(sequence, heads, own) for (_, own), heads in found.items()]


def attend_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Sequence[Together],
    scale: float,
    mask: Tensor | None,
    estimated: bool,
    running: Sequence[Running] | None = None,
    into: Tensor | None = None,
) -> tuple[list[Group], list[Running]]:
    """Return the attention of each piece of work; several run at the same time, in this order.

    Other arguments, and what is returned beside, are those of `attend_heads`. Outputs are written to
    `into` ``(B, H, m, d_v)``, where it is given and no gradient is recorded.

    Returns:
        for each piece output ``(R, m, d_v)`` in the dtype of the query, none where it is written
        elsewhere, and lse ``(R, m)``; 0 and -inf at padding.
    """
    work = compute_dtype(query.dtype)
    sharing = query.shape[1] // key.shape[1]
    real = [None] * len(query) if mask is None else [_real(row) for row in mask]

    def attend(number: int) -> tuple[Group, Running | None]:
        b, heads, settings = pieces[number]
        consecutive = slice(heads[0], heads[-1] + 1)
        of_queries = consecutive if heads[-1] - heads[0] < len(heads) else heads
        of_keys = heads[0] // sharing
        chosen = real[b]
        q, k, v = (
            # A model's heads lie between each other's: one copy, and all that follows is faster.
            (tensor if chosen is None else tensor.index_select(1, chosen)).to(work).contiguous()
            for tensor in (query[b, of_queries], key[b, of_keys, None], value[b, of_keys, None])
        )
        after = None
        with torch.autocast(query.device.type, enabled=False):
            if not q.shape[1]:
                found = nothing(q, v)
            elif not settings.strict:
                found = attend_group(q, k, v, settings, scale, estimated)
            else:
                known = at_the_start(q) if running is None else running[number]
                found, after = attend_strictly(q, k, v, settings, scale, estimated, known)
        output = found.output.to(query.dtype)
        lse = found.lse
        if chosen is not None:
            output, lse = (
                part.new_full((len(part), query.shape[2], *part.shape[2:]), padding).index_copy(
                    1, chosen, part
                )
                for part, padding in ((output, 0.0), (lse, -torch.inf))
            )
        if into is not None:
            into[b, of_queries] = output
        return found._replace(output=output if into is None else output[:0], lse=lse), after

    tasks = [partial(attend, number) for number in range(len(pieces))]
    done = run_all(tasks, (query, key, value))
    return [group for group, _ in done], [after for _, after in done if after is not None]


def _real(row: Tensor) -> Tensor | None:
    """Return the positions of real tokens, None if all are."""
    return None if bool(row.all()) else row.nonzero()[:, 0]
