"""Attention of blocks of queries to keys before their windows, each block to a list of its own.

A list holds keys that all blocks of queries share (columns, means of segments) and keys that are
gathered for each (chosen blocks of keys). What one block of queries does not see has a bias of -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..workers import share, watched
from ..workspace import take
from .joined import joined
from .piece import piece_attention

# Entries of gathered keys and values at a time: they stay in the processor's caches.
_ENTRIES = 1 << 19


class Shared(NamedTuple):
    """The same keys for all blocks of queries of a head, in the order of tokens."""

    key: Tensor
    """``(R, p, d)``."""
    value: Tensor
    """``(R, p, d_v)``."""
    bias: Tensor
    """``(R, c, p)``."""

    def of(self, heads: slice) -> Shared:
        """Return the keys of some of the heads."""
        return Shared(self.key[heads], self.value[heads], self.bias[heads])

    def stretches(self, ends: Sequence[int]) -> list[Shared]:
        """Return for each stretch of blocks of queries, up to these ends, the keys that it may see."""
        places = torch.arange(1, self.bias.shape[-1] + 1, device=self.bias.device)
        stops = ((self.bias > -torch.inf) * places).amax((0, 2)).tolist()
        found = []
        for low, high in zip([0, *ends[:-1]], ends, strict=True):
            stop = max(stops[low:high], default=0)
            own = self.bias[:, low:high, :stop]
            found.append(Shared(self.key[:, :stop], self.value[:, :stop], own))
        return found


class Gathered(NamedTuple):
    """Keys that each block of queries takes from a pool, u at a time."""

    key: Tensor
    """``(R or 1, b, u, d)``."""
    value: Tensor
    """``(R or 1, b, u, d_v)``."""
    taken: Tensor
    """``(R, c, B)``, what each takes."""
    bias: Tensor
    """``(R, c, B·u)``."""
    counts: Tensor | None = None
    """``(R, c)``, how many of them each takes, the first ones; None if all take B."""


def attention_beyond(
    query: Tensor, size: int, shared: Sequence[Shared], gathered: Sequence[Gathered], scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention over all of these keys, which are disjoint, and its log-sum-exp.

    Args:
        query: ``(R, c·size, d)``, whole blocks.
        size: queries of a block.
        shared: keys for all blocks of queries.
        gathered: keys for each.
        scale: factor of the logits.

    Returns:
        output ``(R, c·size, d_v)`` and lse ``(R, c·size)``; -inf for a block of queries that sees none.
    """
    heads, count = len(query), query.shape[1] // size
    queries = query.unflatten(1, (count, size))
    if not gathered:
        key, value = (
            joined(parts, 1)[None].expand(count, -1, -1, -1)
            for parts in ([x.key for x in shared], [x.value for x in shared])
        )
        bias = joined([x.bias for x in shared], 2).transpose(0, 1)[:, :, None]
        output, lse = piece_attention(queries.transpose(0, 1), key, value, scale, bias)
        return output.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)
    found = share(
        [
            partial(
                _of_head,
                queries[head],
                [Shared(*(tensor[head] for tensor in x)) for x in shared],
                [_own(x, head) for x in gathered],
                scale,
            )
            for head in range(heads)
        ]
    )
    outputs, sums = ([part.flatten(0, 1) for part in parts] for parts in zip(*found, strict=True))
    if heads == 1:
        return outputs[0][None], sums[0][None]
    return torch.stack(outputs), torch.stack(sums)


def _own(x: Gathered, head: int) -> Gathered:
    """Return what one head's blocks of queries take, without the dimension of heads."""
    pool = head if len(x.key) > 1 else 0
    counts = None if x.counts is None else x.counts[head]
    return Gathered(x.key[pool], x.value[pool], x.taken[head], x.bias[head], counts)


def _of_head(
    query: Tensor, shared: list[Shared], gathered: list[Gathered], scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention of the blocks of queries ``(c, size, d)`` of one head.

    Those that take as many keys are computed together.
    """
    if shared:
        gathered = [_with_shared(shared, gathered[0]), *gathered[1:]]
    count = len(query)
    counts = [
        x.counts if x.counts is not None else x.taken.new_full((count,), x.taken.shape[1])
        for x in gathered
    ]
    order = counts[0].argsort(descending=True)
    taken_by = torch.stack(counts)[:, order].tolist()
    width = gathered[0].key.shape[-1] + gathered[0].value.shape[-1]
    outputs = query.new_zeros((*query.shape[:2], gathered[0].value.shape[-1]))
    sums = query.new_full(query.shape[:2], -torch.inf)
    low = 0
    while low < count:
        takes = [max(each[low:]) for each in taken_by]
        keys_each = sum(each * x.key.shape[1] for each, x in zip(takes, gathered, strict=True))
        if not keys_each:
            break  # none of the rest sees any
        high = min(count, low + max(1, _ENTRIES // (keys_each * width)))
        part, low = order[low:high], high
        keys, values, biases = [], [], []
        for number, (x, each) in enumerate(zip(gathered, takes, strict=True)):
            own = x.taken[part, :each].flatten()
            keys.append(_picked(f"keys {number}", x.key, own).view(len(part), -1, x.key.shape[-1]))
            values.append(
                _picked(f"values {number}", x.value, own).view(len(part), -1, x.value.shape[-1])
            )
            biases.append(x.bias[part, : each * x.key.shape[1]])
        output, lse = piece_attention(
            query[part, None],
            joined(keys, 1)[:, None],
            joined(values, 1)[:, None],
            scale,
            joined(biases, 1)[:, None, None],
        )
        outputs.index_copy_(0, part, output[:, 0])
        sums.index_copy_(0, part, lse[:, 0])
    return outputs, sums


def _with_shared(shared: list[Shared], gathered: Gathered) -> Gathered:
    """Return keys of a pool with those that all blocks of queries share: these take them first.

    They are entries of the pool like the others, so that one copy brings all.
    """
    pool, span = gathered.key.shape[:2]
    number = sum(len(x.key) for x in shared)
    more = -(-number // span)
    fill = more * span - number

    def pooled(name: str, own: Tensor, parts: list[Tensor]) -> Tensor:
        together = torch.nn.functional.pad(joined(parts, 0), (0, 0, 0, fill))
        both = [own, together.unflatten(0, (more, span))]
        return torch.cat(both, out=_room(name, own, pool + more))

    count = len(gathered.taken)
    first = torch.arange(pool, pool + more, device=gathered.taken.device).expand(count, -1)
    bias = torch.nn.functional.pad(joined([x.bias for x in shared], 1), (0, fill), value=-torch.inf)
    counts = gathered.counts
    return Gathered(
        pooled("key pool", gathered.key, [x.key for x in shared]),
        pooled("value pool", gathered.value, [x.value for x in shared]),
        torch.cat([first, gathered.taken], dim=1),
        torch.cat([bias, gathered.bias], dim=1),
        None if counts is None else counts + more,
    )


def _picked(name: str, pool: Tensor, own: Tensor) -> Tensor:
    return torch.index_select(pool, 0, own, out=_room(name, pool, len(own)))


def _room(name: str, pool: Tensor, count: int) -> Tensor | None:
    """Return room for so many entries like those of a pool, which the next call overwrites; None where
    they must stay: graphs keep them, and what watches operators may.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or watched():
        return None
    return take(f"hybrid {name}", (count, *pool.shape[1:]), pool.dtype, pool.device)
