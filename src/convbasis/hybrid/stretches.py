"""Attention of stretches of tokens to keys before their windows, by what is known before each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .beyond import attention_beyond
from .columns import column_attention
from .group import Beyond, first_keys, keys_beyond, lengthened
from .joined import joined
from .running import STRETCH, Running, first_not_exact, stacked, weighing_of
from .runs import runs
from .segments import segment_length
from .selection import heaviest, heavy_blocks
from .settings import Settings
from .window import BLOCK, Window


class Far(NamedTuple):
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

    def of(self, heads: slice) -> tuple[Tensor, Tensor] | None:
        """Return output and log-sum-exp of heads that follow each other, all or none of these."""
        if heads.start not in self.heads or self.output is None or self.lse is None:
            return None
        low = self.heads.index(heads.start)
        part = slice(low, low + heads.stop - heads.start)
        return self.output[part], self.lse[part]


def attend_stretches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: list[int],
    settings: Sequence[Settings],
    begins: list[int],
    before: Sequence[Running],
    scale: float,
) -> Far:
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
    not_exact = min(first_not_exact(settings[head]) for head in heads)
    if high <= not_exact:
        return Far(heads, None, None)
    if own.shared == 1:  # nothing but the first tokens
        if not own.sinks:
            return Far(heads, None, None)
        columns = torch.arange(min(own.sinks, high), device=query.device).expand(len(query), -1)
        found = column_attention(query, key, value, columns, windows[0], scale, low)
        return Far(heads, *found, ("columns",), columns.shape[-1])
    spans = [segment_length(begin + STRETCH, own.num_segments) // BLOCK for begin in begins]
    outputs, sums, keys = [], [], 0.0
    parts: tuple[str, ...] = ()
    for part, span in runs(spans):
        first, end = max(low, begins[part.start]), min(high, begins[part.stop - 1] + STRETCH)
        if end <= not_exact:  # nothing is before any window yet
            outputs.append(query.new_zeros((len(query), end - first, value.shape[-1])))
            sums.append(query.new_full((len(query), end - first), -torch.inf))
            continue
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
    return Far(heads, joined(outputs, 1), joined(sums, 1), parts, keys)


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
        chosen = stacked(of_stretches, last // BLOCK)
    weighing = None
    if settings.weighs_keys:
        weighing = weighing_of(heads, windows, begins, before)
    beyond = keys_beyond(
        keys,
        values,
        high,
        first.flatten(0, 1),
        stacked(columns, last),
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
    # One block at a time: the same numbers in chunks of any size.
    return heavy_blocks(
        running.earlier(heads, low - BLOCK, high - BLOCK),
        key,
        columns,
        first.div(BLOCK, rounding_mode="floor"),
        settings.blocks,
        BLOCK,
        scale,
        settings.seed,
        first=low // BLOCK - 1,
        together=1,
        each=True,
    ).blocks
