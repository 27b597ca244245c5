"""Attention of query heads that share a key-value head and settings."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..kept import kept
from ..workers import share
from .beyond import Gathered, Shared, attention_beyond
from .columns import column_attention, column_keys
from .correction import corrected
from .estimate import Judged, judged
from .look import FITTED, Looked
from .piece import merge
from .put_down import PutDown, put_down
from .rows import with_gradient
from .sampling import sampled_rows
from .scaled_conv import conv_attention
from .scaled_lowrank import lowrank_far_attention
from .segments import Weighing, segment_keys, segment_length
from .selection import block_keys, heaviest, heavy_blocks, seen_columns
from .settings import Settings
from .window import BLOCK, Window, window_attention

_STRETCH = 4096  # rows that are attended together
_FAR = {"conv": conv_attention, "lowrank": lowrank_far_attention}


class Group(NamedTuple):
    """Attention of R heads of one key-value head."""

    output: Tensor
    """``(R, m, d_v)``."""
    lse: Tensor
    """``(R, m)``."""
    mean: Tensor
    """``(R,)``, the estimated error; 0 before it is estimated."""
    bound: Tensor
    """``(R,)``, its upper bound."""
    parts: tuple[str, ...]
    """Names of what was merged."""
    keys: float
    """Keys of a query, in the mean."""
    rows: int
    """Sampled rows."""
    judged: Judged | None = None
    """What the estimate is to be made of; None for none."""


class Beyond(NamedTuple):
    """Keys before the windows."""

    shared: list[Shared]
    """Those that all blocks of queries share."""
    gathered: list[Gathered]
    """Those that each block of queries takes for itself."""
    parts: tuple[str, ...]
    """Names of what they are."""
    keys: float
    """Keys of a query, in the mean."""


def attend_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Settings,
    scale: float,
    looked: Looked | None,
    estimated: bool,
    last_rows: int = 0,
    into: Tensor | None = None,
) -> Group:
    """Return attention of R heads that share keys.

    Args:
        query: ``(R, n, d)``.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        settings: what to compute.
        scale: factor of the logits.
        looked: what the sampled rows of these heads say; None where all rows see all keys.
        estimated: whether to estimate the error.
        last_rows: of so many of the last rows attention is exact; the estimate is of all others.
        into: ``(R, n, d_v)``, where the output is written to and no gradient is recorded.
    """
    n = query.shape[1]
    window = Window(settings.window, settings.shared)
    known = None
    parts = ["window"]
    keys = float(min(n, settings.window))
    begin = window.begin
    changed = settings.correction or settings.far_field in FITTED  # after it is put down
    measured = estimated and looked is not None and not changed
    rows = put_down(query, key, value, into, measured)
    if looked is None:
        _near_and_columns(rows, query, key, value, window, None, scale)
        output, lse = rows.all()
        return Group(output, lse, *no_estimate(query), tuple(parts), keys, 0)
    columns = heaviest(looked.before, n, settings.sinks, settings.columns)
    count = len(looked.fitted)
    if settings.shared > 1:
        weighing = _weighing(query, looked, window) if settings.key_weights else None
        beyond, known = _beyond(query, key, value, columns, settings, scale, weighing)
        _near_and_beyond(rows, query, key, value, window, beyond, scale)
        parts += beyond.parts
        keys += beyond.keys
    else:
        _near_and_columns(rows, query, key, value, window, columns, scale)
        if columns.shape[-1]:
            parts.append("columns")
            keys += columns.shape[-1]
    output, lse = rows.all()
    if settings.far_field in FITTED:
        with torch.no_grad():
            fitted = sampled_rows(query, key, looked.fitted, scale)
        seen = seen_columns(columns, n, n)
        far = _FAR[settings.far_field](query, key, value, seen, window, scale, fitted)
        output, lse = merge(output, lse, *far, overwrite=True)
        parts.append(settings.far_field)
    found = None
    if settings.correction:
        output, more_rows = corrected(query, key, value, output, begin, scale, settings.seed, known)
        count += more_rows
        parts.append("correction")
    if estimated:
        with torch.no_grad():
            found = judged(output, looked.exact, looked.held, looked.begin, squares=rows.squares())
        count += len(looked.held)
    if last_rows:
        output = _with_last_rows(query, key, value, output, scale, looked.last)
    return Group(output, lse, *no_estimate(query), tuple(parts), float(keys), count, found)


def _weighing(query: Tensor, looked: Looked, window: Window) -> Weighing:
    """Return what weighs keys before the windows, from the rows for fits."""
    rows = looked.fitted
    tokens = -(-query.shape[1] // BLOCK) * BLOCK
    own = query.index_select(1, rows)
    return Weighing(own, window.first(rows)[None], looked.lse, looked.before, tokens)


def _near_and_columns(
    rows: PutDown,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    columns: Tensor | None,
    scale: float,
) -> None:
    """Put down attention to windows of one length for all queries, and to columns before them."""

    def attend(heads: slice) -> None:
        own = query[heads]
        output, lse = window_attention(own, key, value, window, 0, scale)
        if columns is not None and columns.shape[-1]:
            far = column_attention(own, key, value, columns[heads], window, scale)
            output, lse = merge(output, lse, *far, overwrite=True)
        rows.put(0, output, lse, heads)

    share([partial(attend, heads) for heads in rows.apart])


def _with_last_rows(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, scale: float, last: Tensor
) -> Tensor:
    """Return the output ``(R, n, d_v)`` with exact last rows, in place where nothing is recorded."""
    n = query.shape[1]
    begin = n - last.shape[1]
    if torch.is_grad_enabled() and output.requires_grad:
        rows = torch.arange(begin, n, device=query.device)
        known = with_gradient(last, query, key, value, rows, scale)
        return torch.cat([output[:, :begin], known], dim=1)
    output[:, begin:] = last
    return output


def _beyond(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    settings: Settings,
    scale: float,
    weighing: Weighing | None,
) -> tuple[Beyond, Tensor | None]:
    """Return the keys before the windows of all queries, see `keys_beyond`; and exact attention of the
    rows that correct others, if they have chosen blocks.
    """
    n = query.shape[1]
    q = lengthened(query, -(-n // settings.shared) * settings.shared)
    k, v = (lengthened(tensor, -(-n // BLOCK) * BLOCK) for tensor in (key, value))
    window = Window(settings.window, settings.shared)
    first = first_keys(window, 0, q.shape[1], query.device)
    chosen = exact = None
    if settings.blocks:
        with torch.no_grad():
            chosen, exact = heavy_blocks(
                q,
                k,
                columns,
                first.div(BLOCK, rounding_mode="floor"),
                settings.blocks,
                window.shared,
                scale,
                settings.seed,
                real=n,
                value=v if settings.correction else None,
            )
    span = segment_length(n, settings.num_segments) // BLOCK
    return keys_beyond(k, v, n, first[None], columns, chosen, settings, span, scale, weighing), exact


def _near_and_beyond(
    rows: PutDown,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    beyond: Beyond,
    scale: float,
) -> None:
    """Put down attention to the windows and beyond, some rows at a time.

    What is merged is then still in the processor's caches. Where blocks of queries take keys for
    themselves, these are attended to at once, which is fastest in an order of its own.
    """
    n = query.shape[1]
    size, begin = window.shared, window.begin  # what is beyond begins there
    last = n // size * size  # whole blocks of queries up to here
    edges = sorted({0, *range(begin, last, _STRETCH), last, n})
    ends = [-(-edge // size) for edge in edges[1:]]
    everything: tuple[Tensor, Tensor] | None = None
    stretches: list[list[Shared]] = [[]] * len(ends)
    if beyond.gathered:
        whole = lengthened(query, ends[-1] * size)
        everything = attention_beyond(whole, size, beyond.shared, beyond.gathered, scale)
    elif beyond.shared:
        of_parts = (x.stretches(ends) for x in beyond.shared)
        stretches = [list(own) for own in zip(*of_parts, strict=True)]

    def attend(heads: slice, low: int, high: int, shared: list[Shared]) -> None:
        own = query[heads, low:high]
        output, lse = window_attention(own, key[:, :high], value[:, :high], window, low, scale)
        if low >= begin and everything is not None:
            more = (part[heads, low:high] for part in everything)
            output, lse = merge(output, lse, *more, overwrite=True)
        elif low >= begin and shared:
            own = lengthened(own, -(-(high - low) // size) * size)
            found = attention_beyond(own, size, [x.of(heads) for x in shared], [], scale)
            more = (part[:, : high - low] for part in found)
            output, lse = merge(output, lse, *more, overwrite=True)
        rows.put(low, output, lse, heads)

    of_each = list(zip(edges, edges[1:], stretches, strict=False))
    share([partial(attend, heads, *own) for heads in rows.apart for own in of_each])


def nothing(query: Tensor, value: Tensor) -> Group:
    """Return attention of no tokens."""
    output = value.new_zeros((*query.shape[:2], value.shape[-1]))
    return Group(output, query.new_zeros(query.shape[:2]), *no_estimate(query), (), 0.0, 0)


def keys_beyond(
    key: Tensor,
    value: Tensor,
    n: int,
    first: Tensor,
    columns: Tensor,
    chosen: Tensor | None,
    settings: Settings,
    span: int,
    scale: float,
    weighing: Weighing | None,
) -> Beyond:
    """Return the columns, chosen blocks and segments before the windows of blocks of queries.

    Args:
        key: ``(1, b·64, d)``, whole blocks.
        value: ``(1, b·64, d_v)``.
        n: number of keys; what follows is 0.
        first: ``(R or 1, c)``, the first key in the window of each block of queries.
        columns: positions ``(R, ·)``, n or more for none.
        chosen: ``(R, c, B)`` blocks of keys, b for none; None without blocks.
        settings: which parts there are.
        span: blocks of a segment.
        scale: factor of the logits.
        weighing: what weighs the keys of segments; None for equal weights.
    """
    length = key.shape[1]
    before = first.div(BLOCK, rounding_mode="floor")
    seen = seen_columns(columns, n, length)
    shared, gathered, parts = [], list[Gathered](), []
    if columns.shape[-1]:
        shared.append(column_keys(key, value, columns, first))
        parts.append("columns")
    if chosen is not None:
        gathered.append(block_keys(key, value, chosen, seen, settings.strict))
        parts.append("blocks")
    if settings.far_field == "segments":
        elsewhere = seen.clone()
        elsewhere[:, n:] = True
        found = segment_keys(key, value, elsewhere, chosen, before, span, scale, weighing)
        shared.extend(found[0])
        gathered.extend(found[1])
        parts.append("segments")
    keys = float(sum(x.key.shape[1] for x in shared))
    for x in gathered:
        taken = x.taken.shape[2] if x.counts is None else float(x.counts.double().mean())
        keys += taken * x.key.shape[2]
    return Beyond(shared, gathered, tuple(parts), keys)


@kept(64)
def first_keys(window: Window, low: int, high: int, device: torch.device) -> Tensor:
    """Return the first key in the windows of blocks of queries of low .. high; nobody writes to it."""
    return window.first(torch.arange(low, high, window.shared, device=device)).clamp(min=0)


def lengthened(tensor: Tensor, length: int) -> Tensor:
    """Return a tensor ``(R, n, ·)`` with zeros up to some length."""
    more = length - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, 0, 0, more)) if more else tensor


def no_estimate(query: Tensor) -> tuple[Tensor, Tensor]:
    """Return the errors of heads where everything is exact."""
    zero = torch.zeros(len(query), dtype=torch.float64, device=query.device)
    return zero, zero
