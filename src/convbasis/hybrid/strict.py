"""Strictly causal choices: what a query sees is chosen from what came before, in stretches of tokens.

The columns of a stretch and the weights of keys in it come from sampled rows of the stretches before
it, the blocks of a block of queries from rows of the block before. All places are absolute, and each
choice is made from the same numbers in the same shapes whatever the number of tokens: a prompt may come
in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..workers import share
from .estimate import bound_of, judged
from .group import Group, no_estimate
from .look import in_order
from .piece import merge
from .put_down import PutDown, put_down
from .rows import exact_rows
from .running import (
    PERIOD,
    STRETCH,
    Running,
    first_not_exact,
    rows_of_a_stretch,
    rows_to_judge,
    window_at,
    with_stretch,
)
from .runs import runs
from .settings import Settings
from .stretches import Far, attend_stretches
from .window import BLOCK, window_attention

# Stretches that are attended to together, at most, and keys that these have all in all.
_TOGETHER, _KEYS = 8, 1 << 20


def attend_strictly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Sequence[Settings],
    scale: float,
    estimated: bool,
    running: Running,
    into: Tensor | None = None,
) -> tuple[Group, Running]:
    """Return attention of R heads that share keys, each row from its own and earlier tokens alone.

    Args:
        query: ``(R, m, d)``, of the last m tokens.
        key: ``(1, n, d)``, of all tokens.
        value: ``(1, n, d_v)``.
        settings: of each head; far_field is "none" or "segments", samples and seed are the same.
        scale: factor of the logits.
        estimated: whether to estimate the error.
        running: what the tokens before have left.
        into: ``(R, m, d_v)``, where the output is written to and no gradient is recorded.

    Returns:
        the attention, and what these tokens leave.
    """
    m, n = query.shape[1], key.shape[1]
    offset = n - m
    queries = query.detach()
    if running.queries.shape[1]:
        queries = torch.cat([running.queries, queries], dim=1)
    known = running._replace(queries=queries)
    rows = put_down(query, key, value, into)
    parts, keys = ["window"], 0.0
    for begins in _batches(offset, n):
        low, high = max(offset, begins[0]), min(n, begins[-1] + STRETCH)
        before = [known]
        for begin in begins:
            before.append(_after(begin, before[-1], key, settings, scale))
        known = before.pop()
        place = low - offset
        own = query[:, place : high - offset], key[:, :high], value[:, :high]
        far = _attend(rows, place, *own, settings, begins, before, scale)
        for some in far:
            parts += [name for name in some.parts if name not in parts]
            keys += some.keys * len(some.heads) * (high - low)
    output, lse = rows.all()
    sampled = 0
    if _weighed(settings):
        sampled = rows_of_a_stretch(settings[0]) * (n // STRETCH - offset // STRETCH)
    mean, bound = no_estimate(query)
    if estimated:
        mean, bound, held, more_rows = _estimate(
            query, key, value, output, settings, running.held, scale
        )
        known = known._replace(held=held)
        sampled += more_rows
    window = sum(min(n, own.window) for own in settings) / len(settings)
    per_query = window + keys / (len(query) * m)
    kept = min(n // STRETCH * STRETCH, max(0, n // BLOCK - 1) * BLOCK)
    left = known._replace(queries=known.earlier(slice(None), kept, n).clone(), first=kept)
    return Group(output, lse, mean, bound, tuple(parts), per_query, sampled), left


def _weighed(settings: Sequence[Settings]) -> bool:
    """Whether any head needs the weights of keys."""
    return any(own.columns or own.weighs_keys for own in settings)


def _after(
    begin: int, known: Running, key: Tensor, settings: Sequence[Settings], scale: float
) -> Running:
    """Return what is known after a stretch, the same as before if it is not over or nobody asks."""
    end = begin + STRETCH
    if end > key.shape[1] or not _weighed(settings):
        return known
    return with_stretch(known, key[:, :end].detach(), settings, scale)


def _attend(
    rows: PutDown,
    place: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Sequence[Settings],
    begins: list[int],
    before: Sequence[Running],
    scale: float,
) -> list[Far]:
    """Put down attention of some stretches, and return what their queries see before their windows.

    Args:
        rows: where it goes.
        place: the first of these rows.
        query: ``(R, m, d)``, of the last tokens.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        settings: of each head.
        begins: where the stretches begin.
        before: what is known before each.
        scale: factor of the logits.
    """
    far = share(
        [
            partial(
                attend_stretches,
                query[in_order(heads)],
                key,
                value,
                heads,
                settings,
                begins,
                before,
                scale,
            )
            for heads in _kinds(settings)
        ]
    )
    share(
        [
            partial(_put_rows, rows, place, query[heads], key, value, heads, own, far, scale)
            for heads, own in runs(settings)
        ]
    )
    return far


def _put_rows(
    rows: PutDown,
    place: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: slice,
    settings: Settings,
    far: Sequence[Far],
    scale: float,
) -> None:
    """Put down attention of the last tokens in some heads: to their windows, and what is before them.

    Args:
        rows: where rows of all heads go.
        place: the first of these rows.
        query: ``(R, m, d)``.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        heads: which these are.
        settings: theirs.
        far: attention of all heads to keys before their windows.
        scale: factor of the logits.
    """
    offset = key.shape[1] - query.shape[1]
    window = window_at(offset // STRETCH * STRETCH, settings)
    output, lse = window_attention(query, key, value, window, offset, scale)
    for found in far:
        more = found.of(heads)
        if more is not None:
            output, lse = merge(output, lse, *more, overwrite=True)
    rows.put(place, output, lse, heads)


def _batches(offset: int, n: int) -> list[list[int]]:
    """Return where the stretches of tokens offset .. n - 1 begin: in one list those that are attended
    to together, whole ones, or a part of one, or the first.
    """
    found: list[list[int]] = []
    together = False
    for begin in range(offset // STRETCH * STRETCH, n, STRETCH):
        whole = begin >= offset and begin + STRETCH <= n
        if whole and together and len(found[-1]) < min(_TOGETHER, _KEYS // n):
            found[-1].append(begin)
        else:
            found.append([begin])
        together = whole and begin > 0
    return found


def _kinds(settings: Sequence[Settings]) -> list[list[int]]:
    """Return the heads whose keys before their windows are attended to together: those with the same
    parts, whatever their windows, and with blocks the same windows.
    """
    found: dict[Settings, list[int]] = {}
    for head, own in enumerate(settings):
        kind = own if own.blocks or own.shared == 1 else own._replace(window=1)
        found.setdefault(kind, []).append(head)
    return list(found.values())


@torch.no_grad()
def _estimate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    settings: Sequence[Settings],
    held: tuple[Tensor, ...],
    scale: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], int]:
    """Return the estimated errors of the last rows ``(R,)`` and their upper bounds, what is held of
    rows afterwards, and for how many rows attention was computed.

    Where the last rows have few sampled ones among them, the latest of those before count with them.

    Args:
        query: ``(R, m, d)``, of the last m tokens.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        output: ``(R, m, d_v)``.
        settings: of each head.
        held: of each head ``(4, h)``, see `Running`.
        scale: factor of the logits.
    """
    n = key.shape[1]
    offset, most = n - query.shape[1], 2 * settings[0].samples
    mean, bound = (each.clone() for each in no_estimate(query))
    fresh = [own[:, own[3] >= n - most * PERIOD] for own in held]
    after, counts = list(held), [0]
    alike = [
        (max(offset, first_not_exact(own)), latest.shape[1])
        for own, latest in zip(settings, fresh, strict=True)
    ]
    for heads, (begin, known) in runs(alike):
        if begin >= n:
            continue
        rows = rows_to_judge(begin, n, most, most - known, settings[0].seed).to(query.device)
        counts.append(len(rows))
        exact = output[heads, :0]
        if len(rows):
            exact = exact_rows(query[heads], key, value, rows, scale, offset)
        new = judged(output[heads], exact, rows, begin, offset)
        places = rows.double().expand(len(exact), -1)
        norms = torch.stack([new.errors, new.exact, new.own, places], 1)
        latest = torch.cat([torch.stack(fresh[heads]), norms], dim=-1)[..., -most:]
        after[heads] = latest.unbind(0)
        errors, exact_norms, own_norms, _ = latest.unbind(1)
        pooled = new._replace(errors=errors, exact=exact_norms, own=own_norms)
        mean[heads], bound[heads] = bound_of(pooled)
        if known and len(rows):  # what has begun to go wrong is not to be hidden by what was right
            bound[heads] = bound[heads].fmax(bound_of(new)[0])
    return mean, bound, tuple(after), max(counts)
