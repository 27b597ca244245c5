"""Strictly causal choices: what a query sees is chosen from what came before, in stretches of tokens.

The columns of a stretch and the weights of keys in it come from sampled rows of the stretches before
it, the blocks of a block of queries from rows of the block before. All places are absolute, and each
choice is made from the same numbers in the same shapes whatever the number of tokens: a prompt may come
in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..workers import share
from .beyond import attention_beyond
from .columns import column_attention
from .estimate import Judged, judged
from .group import (
    Beyond,
    Group,
    first_keys,
    keys_beyond,
    lengthened,
    no_estimate,
)
from .joined import joined
from .look import in_order
from .piece import merge
from .put_down import PutDown, put_down
from .rows import exact_rows
from .sampling import own_rows, sampled_rows, some_rows
from .segments import Weighing, segment_length
from .selection import heaviest, heavy_blocks
from .settings import Settings
from .window import BLOCK, Window, window_attention

T = TypeVar("T")

STRETCH = 512  # tokens that share their columns and segments
# Sampled rows of a stretch, of those that a whole prompt has.
_SHARE = 8
_TOGETHER = 8  # stretches that are attended together
# Tokens of which one is a row for estimates, once there are as many as a whole prompt has, and before.
_PERIOD, _FIRST_PERIOD = 32, 8


class Running(NamedTuple):
    """What the choices of later tokens are made from, of R heads of one key-value head."""

    mass: Tensor
    """``(R, s·512)``, weights of keys a block and more before the sampled rows of whole stretches,
    summed over them."""
    queries: Tensor
    """``(R, q, d)``, the last queries: of the stretch that is not over, and of the last blocks."""
    first: int
    """Position of the first of them."""
    rows: Tensor
    """``(r,)`` positions of the sampled rows; none if no head weighs keys."""
    sampled: Tensor
    """``(R, r, d)``, their queries."""
    lse: Tensor
    """``(R, r)``, their log-sum-exp."""
    held: Tensor
    """``(3, R, h)`` float64, the norms of errors, of exact attention and of our own in the latest rows
    for estimates."""

    def numbers(self) -> int:
        """Return how many numbers these are."""
        tensors = (self.mass, self.queries, self.rows, self.sampled, self.lse, self.held)
        return sum(tensor.numel() for tensor in tensors)

    def earlier(self, heads: slice | list[int], low: int, high: int) -> Tensor:
        """Return the queries of tokens low .. high - 1, which are among the last, in some heads."""
        return self.queries[heads, low - self.first : high - self.first]


def at_the_start(query: Tensor) -> Running:
    """Return what is known before the first of queries ``(R, m, d)``."""
    nothing, none = query.new_zeros((len(query), 0)), query.new_zeros((len(query), 0, query.shape[-1]))
    rows = torch.empty(0, dtype=torch.int64, device=query.device)
    held = torch.empty((3, len(query), 0), dtype=torch.float64, device=query.device)
    return Running(nothing, none, 0, rows, none, nothing, held)


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
    weighed = any(own.columns or own.key_weights for own in settings)
    rows, sampled = put_down(query, key, value, into), 0
    alike, kinds = _runs(settings), _kinds(settings)
    parts, keys = ["window"], 0.0
    for begins in _batches(offset, n):
        before = []
        for begin in begins:
            before.append(known)
            end = begin + STRETCH
            if end <= n and weighed:
                more = _stretch_rows(begin, settings[0], query.device)
                known = _weighed(known, key[:, :end].detach(), more, settings, scale)
                sampled += len(more)
        low, high = max(offset, begins[0]), min(n, begins[-1] + STRETCH)
        own = query[:, low - offset : high - offset]
        given = key[:, :high], value[:, :high]
        far = share(
            [
                partial(_beyond, own[in_order(heads)], *given, heads, settings, begins, before, scale)
                for heads in kinds
            ]
        )
        share(
            [
                partial(
                    _put_down, rows, own[heads], *given, heads, each, _of(far, heads), offset, scale
                )
                for heads, each in alike
            ]
        )
        for each_far in far:
            parts += [name for name in each_far.parts if name not in parts]
            keys += each_far.keys * len(each_far.heads) * (high - low)
    output, lse = rows.all()
    found = None
    if estimated:
        found, more_rows = _judged(query, key, value, output, settings, running.held, scale)
        sampled += more_rows
    if found is not None:
        held = torch.stack([found.errors, found.exact, found.own])
        known = known._replace(held=held)
    window = sum(own.window for own in settings) / len(settings)
    per_query = min(n, window) + keys / (len(query) * m)
    kept = min(n // STRETCH * STRETCH, max(0, n // BLOCK - 1) * BLOCK)
    left = known._replace(queries=known.earlier(slice(None), kept, n).clone(), first=kept)
    unknown = no_estimate(query)
    return Group(output, lse, *unknown, tuple(parts), per_query, sampled, found), left


def _batches(offset: int, n: int) -> list[list[int]]:
    """Return where the stretches of tokens offset .. n - 1 begin: in one list those that are attended
    to together, whole ones, or a part of one.
    """
    found: list[list[int]] = []
    together = False
    for begin in range(offset // STRETCH * STRETCH, n, STRETCH):
        whole = begin >= offset and begin + STRETCH <= n
        if whole and together and len(found[-1]) < _TOGETHER:
            found[-1].append(begin)
        else:
            found.append([begin])
        together = whole
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


def _runs(values: Sequence[T]) -> list[tuple[slice, T]]:
    """Return values that follow each other and are equal, each with where it stands."""
    found: list[tuple[slice, T]] = []
    for place, value in enumerate(values):
        if found and found[-1][1] == value:
            found[-1] = slice(found[-1][0].start, place + 1), value
        else:
            found.append((slice(place, place + 1), value))
    return found


def _of_runs(values: Sequence[T], function: Callable[[slice, T], Tensor]) -> Tensor:
    """Return what a function gives for the heads of each run, together."""
    return joined([function(heads, own) for heads, own in _runs(values)])


def _counted(window: int) -> Window:
    """Return the window before which the keys of a sampled row count: of a block, where the window of
    attention is longer, since what a row has there lies beyond the windows of the next stretch.
    """
    return Window(min(window, BLOCK), BLOCK)


@torch.no_grad()
def _weighed(
    running: Running,
    key: Tensor,
    rows: Tensor,
    settings: Sequence[Settings],
    scale: float,
) -> Running:
    """Return what is known with the sampled rows of the stretch that ends with the last key.

    Args:
        running: what is known without them.
        key: ``(1, n, d)``.
        rows: ``(r,)`` positions, increasing.
        settings: of each head.
        scale: factor of the logits.
    """
    exact = sampled_rows(running.queries, key, rows, scale, running.first)
    more = _of_runs(
        [_counted(own.window) for own in settings],
        lambda heads, window: exact.of(heads).mass_before(window.first(rows)),
    )
    running = running._replace(mass=lengthened(running.mass[..., None], key.shape[1])[..., 0] + more)
    if not any(own.key_weights for own in settings):
        return running
    return running._replace(
        rows=torch.cat([running.rows, rows]),
        sampled=torch.cat([running.sampled, running.queries[:, rows - running.first]], dim=1),
        lse=torch.cat([running.lse, exact.lse], dim=1),
    )


class _Far(NamedTuple):
    """Attention of some heads to keys before their windows."""

    heads: list[int]
    """Numbers of the heads."""
    output: Tensor | None
    """``(R, m, d_v)``; None where there are no such keys."""
    lse: Tensor | None
    """``(R, m)``."""
    parts: tuple[str, ...] = ()
    """Names of what these keys are."""
    keys: float = 0.0
    """Keys of a query, in the mean."""


def _of(far: Sequence[_Far], heads: slice) -> tuple[Tensor, Tensor] | None:
    """Return what heads, which follow each other and are alike, see before their windows."""
    for found in far:
        if heads.start in found.heads:
            if found.output is None or found.lse is None:
                return None
            low = found.heads.index(heads.start)
            part = slice(low, low + heads.stop - heads.start)
            return found.output[part], found.lse[part]
    return None


def _put_down(
    rows: PutDown,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: slice,
    settings: Settings,
    far: tuple[Tensor, Tensor] | None,
    offset: int,
    scale: float,
) -> None:
    """Put down attention of the last tokens in some heads: to their windows, and what is before them.

    Args:
        rows: of all heads, where attention goes.
        query: ``(R, m, d)``.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        heads: which these are.
        settings: theirs.
        far: output and log-sum-exp of keys before the windows; None for none.
        offset: token of the first of all rows.
        scale: factor of the logits.
    """
    low = key.shape[1] - query.shape[1]
    window = Window(settings.window, settings.shared)
    output, lse = window_attention(query, key, value, window, low, scale)
    if far is not None:
        output, lse = merge(output, lse, *far, overwrite=True)
    rows.put(low - offset, output, lse, heads)


def _beyond(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: list[int],
    settings: Sequence[Settings],
    begins: list[int],
    before: Sequence[Running],
    scale: float,
) -> _Far:
    """Return attention of the last tokens, of one or more stretches, to keys before their windows.

    Args:
        query: ``(R, m, d)``.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        heads: which these are.
        settings: of all heads.
        begins: where the stretches begin.
        before: what is known before each.
        scale: factor of the logits.
    """
    low, high = key.shape[1] - query.shape[1], key.shape[1]
    own = settings[heads[0]]
    windows = [Window(settings[head].window, own.shared) for head in heads]
    if high <= min(window.begin for window in windows):
        return _Far(heads, None, None)
    if own.shared == 1:  # nothing but the first tokens
        if not own.sinks:
            return _Far(heads, None, None)
        columns = torch.arange(min(own.sinks, high), device=query.device).expand(len(query), -1)
        found = column_attention(query, key, value, columns, windows[0], scale, low)
        return _Far(heads, *found, ("columns",), columns.shape[-1])
    spans = [segment_length(begin + STRETCH, own.num_segments) // BLOCK for begin in begins]
    outputs, sums, keys = [], [], 0.0
    parts: tuple[str, ...] = ()
    for part, span in _runs(spans):
        first, end = max(low, begins[part.start]), min(high, begins[part.stop - 1] + STRETCH)
        output, lse, beyond = _of_stretches(
            query[:, first - low : end - low],
            key[:, :end],
            value[:, :end],
            heads,
            own,
            windows,
            begins[part],
            before[part],
            span,
            scale,
        )
        outputs.append(output)
        sums.append(lse)
        parts = beyond.parts
        keys += beyond.keys * (end - first) / (high - low)
    return _Far(heads, joined(outputs, 1), joined(sums, 1), parts, keys)


def _of_stretches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: list[int],
    settings: Settings,
    windows: Sequence[Window],
    begins: Sequence[int],
    before: Sequence[Running],
    span: int,
    scale: float,
) -> tuple[Tensor, Tensor, Beyond]:
    """Return the same for stretches with segments of so many blocks: each of them is one more head.

    Args:
        query: ``(R, m, d)``, of whole stretches, or of a part of one.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        heads: which these are.
        settings: theirs, but for windows.
        windows: of each.
        begins: where the stretches begin.
        before: what is known before each.
        span: blocks of a segment.
        scale: factor of the logits.
    """
    low, high = key.shape[1] - query.shape[1], key.shape[1]
    count, number = len(query), len(begins)
    # Whole blocks of queries and keys.
    edge, last = low // BLOCK * BLOCK, -(-high // BLOCK) * BLOCK
    blocks = torch.nn.functional.pad(query, (0, 0, low - edge, last - high))
    blocks = blocks.unflatten(1, (number, -1)).flatten(0, 1)
    keys, values = (lengthened(tensor, last) for tensor in (key, value))
    first = torch.stack([first_keys(window, edge, last, query.device) for window in windows])
    first = first.unflatten(1, (number, -1))
    columns = [heaviest(known.mass[heads], last, settings.sinks, settings.columns) for known in before]
    chosen = None
    if settings.blocks:
        part_of = [(max(edge, begin), min(last, begin + STRETCH)) for begin in begins]
        of_stretches = [
            _chosen(known, heads, keys, own, of, part, settings, scale)
            for known, own, of, part in zip(before, columns, first[0], part_of, strict=True)
        ]
        chosen = _together(of_stretches, last // BLOCK)
    weighing = None
    if settings.key_weights:
        weighing = _weighing(heads, windows, begins, before)
    beyond = keys_beyond(
        keys,
        values,
        high,
        first.flatten(0, 1),
        _together(columns, last),
        chosen,
        settings,
        span,
        scale,
        weighing,
    )
    output, lse = attention_beyond(blocks, BLOCK, beyond.shared, beyond.gathered, scale)
    part = slice(low - edge, high - edge)
    output, lse = (x.unflatten(0, (count, number)).flatten(1, 2)[:, part] for x in (output, lse))
    return output, lse, beyond


@torch.no_grad()
def _chosen(
    running: Running,
    heads: list[int],
    key: Tensor,
    columns: Tensor,
    first: Tensor,
    part: tuple[int, int],
    settings: Settings,
    scale: float,
) -> Tensor:
    """Return the blocks of keys that blocks of queries of a stretch choose, ``(R, c, B)``, b for none.

    Args:
        running: what is known before the stretch, and the queries of the block before.
        heads: which these are.
        key: ``(1, b·64, d)``.
        columns: ``(R, ·)``, seen already.
        first: ``(c,)``, the first key in the window of each block of queries.
        part: tokens of these blocks, from and to.
        settings: of the heads.
        scale: factor of the logits.
    """
    low, high = part
    alone = int(low == 0)  # nobody is there to choose for the first block
    earlier = running.earlier(heads, low + (alone - 1) * BLOCK, high - BLOCK)
    total = key.shape[1] // BLOCK
    if not earlier.shape[1]:
        return torch.full((len(heads), alone, 1), total, device=key.device)
    # One block at a time: the same numbers in chunks of any size.
    found = heavy_blocks(
        earlier,
        key,
        columns,
        first[alone:].div(BLOCK, rounding_mode="floor"),
        settings.blocks,
        BLOCK,
        scale,
        settings.seed,
        first=low // BLOCK + alone - 1,
        together=1,
        each=True,
    ).blocks
    return torch.nn.functional.pad(found, (0, 0, alone, 0), value=total)


def _together(of_stretches: Sequence[Tensor], padding: float) -> Tensor:
    """Return tensors ``(R, ..., p)`` of stretches as one, ``(R·stretches, ..., p)``, all as long."""
    longest = max(tensor.shape[-1] for tensor in of_stretches)
    equal = [
        torch.nn.functional.pad(tensor, (0, longest - tensor.shape[-1]), value=padding)
        if tensor.shape[-1] < longest
        else tensor
        for tensor in of_stretches
    ]
    return torch.stack(equal, 1).flatten(0, 1)


def _weighing(
    heads: list[int], windows: Sequence[Window], begins: Sequence[int], before: Sequence[Running]
) -> Weighing:
    """Return what weighs the keys of segments in each of the heads and stretches."""
    last, number = before[-1], len(before)
    rows = torch.stack([_counted(window.tokens).first(last.rows) for window in windows])
    known = torch.tensor([len(each.rows) for each in before], device=rows.device)
    counts = torch.arange(len(last.rows), device=rows.device) < known[:, None]
    first = rows[:, None].where(counts, 0).flatten(0, 1)
    tokens = torch.tensor([begin + STRETCH for begin in begins], device=rows.device)
    return Weighing(
        last.sampled[heads].repeat_interleave(number, 0),
        first,
        last.lse[heads].repeat_interleave(number, 0),
        _together([each.mass[heads] for each in before], 0.0),
        tokens.repeat(len(heads))[:, None],
    )


def _stretch_rows(begin: int, settings: Settings, device: torch.device) -> Tensor:
    """Return the sampled rows of a stretch, for fits; they depend on its place and the seed alone."""
    generator = torch.Generator().manual_seed((settings.seed * 0x9E3779B1 + begin) % (1 << 63))
    count = max(1, min(settings.samples // _SHARE, STRETCH // 2))
    places = torch.randperm(STRETCH // 2, generator=generator)[:count].sort().values
    return own_rows(begin + 2 * places, 0, settings.seed).to(device)


@torch.no_grad()
def _judged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    settings: Sequence[Settings],
    held: Tensor,
    scale: float,
) -> tuple[Judged | None, int]:
    """Return what estimates of the last rows are made of, those of earlier rows among it where the last
    ones are few, and for how many rows attention was computed; None where all rows are exact.

    Args:
        query: ``(R, m, d)``, of the last m tokens.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        output: ``(R, m, d_v)``.
        settings: of each head.
        held: ``(3, R, h)``, what is known of earlier rows.
        scale: factor of the logits.
    """
    m, n = query.shape[1], key.shape[1]
    offset, most = n - m, 2 * settings[0].samples
    begin = max(offset, min(Window(own.window, own.shared).begin for own in settings))
    if begin >= n:
        return None, 0
    missing = min(most - held.shape[-1], m // _FIRST_PERIOD)
    count = min(most, max(missing, n // _PERIOD - offset // _PERIOD))
    rows = torch.empty(0, dtype=torch.int64)
    if count or not held.shape[-1]:
        rows = some_rows(begin, n, max(1, count), 1, settings[0].seed)
    rows = rows.to(query.device)
    exact = output[:, :0]
    if len(rows):
        exact = exact_rows(query, key, value, rows, scale, offset)
    own = judged(output, exact, rows, begin, offset)
    earlier = held[..., max(0, held.shape[-1] + len(rows) - most) :]
    errors, norms, ours = (
        torch.cat(parts, dim=1) for parts in zip(earlier, (own.errors, own.exact, own.own), strict=True)
    )
    return own._replace(errors=errors, exact=norms, own=ours), len(rows)
