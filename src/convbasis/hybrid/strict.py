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
from .estimate import error_bound
from .group import (
    Group,
    first_keys,
    keys_beyond,
    lengthened,
    no_estimate,
)
from .joined import joined
from .piece import merge
from .put_down import PutDown, put_down
from .rows import exact_rows
from .sampling import own_rows, sampled_rows, some_rows
from .segments import Weighing
from .selection import heaviest, heavy_blocks
from .settings import Settings
from .window import BLOCK, Window, window_attention

T = TypeVar("T")

STRETCH = 512  # tokens that share their columns and segments
# Sampled rows of a stretch, of those that a whole prompt has.
_SHARE = 8
# Rows for the estimate: one of so many, as far as there are at least so many.
_PERIOD, _LEAST = 16, 32


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

    def numbers(self) -> int:
        """Return how many numbers these are."""
        tensors = (self.mass, self.queries, self.rows, self.sampled, self.lse)
        return sum(tensor.numel() for tensor in tensors)

    def earlier(self, heads: slice, low: int, high: int) -> Tensor:
        """Return the queries of tokens low .. high - 1, which are among the last, in some heads."""
        return self.queries[heads, low - self.first : high - self.first]

    def weighing(self, heads: slice, settings: Settings) -> Weighing:
        """Return what weighs the keys of segments in some of the heads."""
        first = _counted(settings).first(self.rows)
        return Weighing(self.sampled[heads], first, self.lse[heads], self.mass[heads])


def at_the_start(query: Tensor) -> Running:
    """Return what is known before the first of queries ``(R, m, d)``."""
    nothing, none = query.new_zeros((len(query), 0)), query.new_zeros((len(query), 0, query.shape[-1]))
    rows = torch.empty(0, dtype=torch.int64, device=query.device)
    return Running(nothing, none, 0, rows, none, nothing)


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
    alike = _runs(settings)
    parts, keys = ["window"], 0.0
    for begin in range(offset // STRETCH * STRETCH, n, STRETCH):
        end = begin + STRETCH
        low, high = max(offset, begin), min(n, end)
        jobs = [
            partial(_attend, rows, query[heads], key, value, known, heads, own, scale, low, high)
            for heads, own in alike
        ]
        for (names, count), (heads, _) in zip(share(jobs), alike, strict=True):
            parts += [name for name in names if name not in parts]
            keys += count * (heads.stop - heads.start)
        if high == end and weighed:
            more = _stretch_rows(begin, settings[0], query.device)
            known = _weighed(known, key[:, :end].detach(), more, settings, scale)
            sampled += len(more)
    output, lse = rows.all()
    mean, bound = no_estimate(query)
    if estimated:
        mean, bound, held = _estimate(query, key, value, output, settings, scale)
        sampled += held
    window = sum(own.window for own in settings) / len(settings)
    per_query = min(n, window) + keys / (len(query) * m)
    kept = min(n // STRETCH * STRETCH, max(0, n // BLOCK - 1) * BLOCK)
    left = known._replace(queries=known.earlier(slice(None), kept, n).clone(), first=kept)
    return Group(output, lse, mean, bound, tuple(parts), per_query, sampled), left


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


def _counted(settings: Settings) -> Window:
    """Return the window before which the keys of a sampled row count: of a block, where the window of
    attention is longer, since what a row has there lies beyond the windows of the next stretch.
    """
    return Window(min(settings.window, BLOCK), BLOCK)


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
        [_counted(own) for own in settings],
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


def _attend(
    rows: PutDown,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    running: Running,
    heads: slice,
    settings: Settings,
    scale: float,
    low: int,
    high: int,
) -> tuple[tuple[str, ...], float]:
    """Put down attention of tokens low .. high - 1 of a stretch, in some heads.

    Args:
        rows: of all heads, where attention goes.
        query: ``(R, m, d)``, of the last m tokens.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        running: what is known of the stretches before.
        heads: which these are.
        settings: theirs.
        scale: factor of the logits.
        low: first token.
        high: end of them.

    Returns:
        names of what they see before their windows, and how many keys, in all of these tokens.
    """
    offset = key.shape[1] - query.shape[1]
    window = Window(settings.window, settings.shared)
    own, known = query[:, low - offset : high - offset], (key[:, :high], value[:, :high])
    output, lse = window_attention(own, *known, window, low, scale)
    begin = max(low, window.begin)
    if begin >= high:
        rows.put(low - offset, output, lse, heads)
        return (), 0.0
    near = begin - low  # rows that see nothing before their windows
    if near:
        rows.put(low - offset, output[:, :near], lse[:, :near], heads)
    far, far_lse, names, count = _beyond(own[:, near:], *known, running, heads, settings, scale)
    merged = merge(output[:, near:], lse[:, near:], far, far_lse, overwrite=True)
    rows.put(begin - offset, *merged, heads)
    return names, count * (high - begin)


def _beyond(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    running: Running,
    heads: slice,
    settings: Settings,
    scale: float,
) -> tuple[Tensor, Tensor, tuple[str, ...], float]:
    """Return attention of the last tokens, all of one stretch, to keys before their windows.

    Returns:
        output ``(R, m, d_v)``, lse, names of the parts, and keys of a query.
    """
    high = key.shape[1]
    low, end = high - query.shape[1], -(-high // STRETCH) * STRETCH
    columns = heaviest(running.mass[heads], end, settings.sinks, settings.columns)
    window = Window(settings.window, settings.shared)
    if settings.shared == 1:
        if not columns.shape[-1]:
            nothing = query.new_full(query.shape[:2], -torch.inf)
            return query.new_zeros((*query.shape[:2], value.shape[-1])), nothing, (), 0
        found = column_attention(query, key, value, columns, window, scale, low)
        return *found, ("columns",), columns.shape[-1]
    # Whole blocks of queries, and of keys up to the end of the stretch.
    edge, last = low // BLOCK * BLOCK, -(-high // BLOCK) * BLOCK
    blocks = torch.nn.functional.pad(query, (0, 0, low - edge, last - high))
    keys, values = (lengthened(tensor, end) for tensor in (key, value))
    first = first_keys(window, edge, last, query.device)
    chosen = None
    if settings.blocks:
        with torch.no_grad():
            earlier = running.earlier(heads, edge - BLOCK, last - BLOCK)
            # One block at a time: the same numbers in chunks of any size.
            chosen = heavy_blocks(
                earlier,
                keys,
                columns,
                first.div(BLOCK, rounding_mode="floor"),
                settings.blocks,
                BLOCK,
                scale,
                settings.seed,
                first=edge // BLOCK - 1,
                together=1,
                each=True,
            ).blocks
    weighing = running.weighing(heads, settings) if settings.key_weights else None
    beyond = keys_beyond(keys, values, high, first, columns, chosen, settings, scale, weighing)
    output, lse = attention_beyond(blocks, BLOCK, beyond.shared, beyond.gathered, scale)
    part = slice(low - edge, high - edge)
    return output[:, part], lse[:, part], beyond.parts, beyond.keys


def _stretch_rows(begin: int, settings: Settings, device: torch.device) -> Tensor:
    """Return the sampled rows of a stretch, for fits; they depend on its place and the seed alone."""
    generator = torch.Generator().manual_seed((settings.seed * 0x9E3779B1 + begin) % (1 << 63))
    count = max(1, min(settings.samples // _SHARE, STRETCH // 2))
    places = torch.randperm(STRETCH // 2, generator=generator)[:count].sort().values
    return own_rows(begin + 2 * places, 0, settings.seed).to(device)


@torch.no_grad()
def _estimate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    settings: Sequence[Settings],
    scale: float,
) -> tuple[Tensor, Tensor, int]:
    """Return the estimated errors of the last rows ``(R,)``, their upper bounds, and the number of rows
    that it took.

    Args:
        query: ``(R, m, d)``, of the last m tokens.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        output: ``(R, m, d_v)``.
        settings: of each head.
        scale: factor of the logits.
    """
    m, n = query.shape[1], key.shape[1]
    offset, most = n - m, 0
    found = []
    begins = [max(offset, Window(own.window, own.shared).begin) for own in settings]
    count = min(2 * settings[0].samples, max(_LEAST, m // _PERIOD))
    for heads, begin in _runs(begins):
        if begin >= n:
            found.append(no_estimate(query[heads]))
            continue
        rows = some_rows(begin, n, count, 1, settings[0].seed).to(query.device)
        exact = exact_rows(query[heads], key, value, rows, scale, offset)
        found.append(error_bound(output[heads], exact, rows, begin, offset))
        most = max(most, len(rows))
    mean, bound = (joined(parts) for parts in zip(*found, strict=True))
    return mean, bound, most
