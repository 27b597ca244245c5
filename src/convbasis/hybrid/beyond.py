"""Attention of blocks of queries to keys before their windows, each block to a list of its own.

A list holds keys that all blocks of queries share (columns, means of segments) and keys that are
gathered for each (chosen blocks of keys). What one block of queries does not see has a bias of -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .piece import piece_attention
from .window import BLOCK

# Entries of gathered keys and values at a time: they stay in the processor's caches.
_ENTRIES = 1 << 19


class Shared(NamedTuple):
    """The same keys for all blocks of queries of a head."""

    key: Tensor
    """``(R, p, d)``."""
    value: Tensor
    """``(R, p, d_v)``."""
    bias: Tensor
    """``(R, c, p)``."""


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


def attention_beyond(
    query: Tensor, shared: Sequence[Shared], gathered: Sequence[Gathered], scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention over all of these keys, which are disjoint, and its log-sum-exp.

    Args:
        query: ``(R, c·64, d)``, whole blocks.
        shared: keys for all blocks of queries.
        gathered: keys for each.
        scale: factor of the logits.

    Returns:
        output ``(R, c·64, d_v)`` and lse ``(R, c·64)``; -inf for a block of queries that sees none.
    """
    heads, count = len(query), query.shape[1] // BLOCK
    queries = query.unflatten(1, (count, BLOCK))
    if not gathered:
        key, value = (
            _joined(parts, 1)[None].expand(count, -1, -1, -1)
            for parts in ([x.key for x in shared], [x.value for x in shared])
        )
        bias = _joined([x.bias for x in shared], 2).transpose(0, 1)[:, :, None]
        output, lse = piece_attention(queries.transpose(0, 1), key, value, scale, bias)
        return output.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)
    keys_each = sum(x.key.shape[1] for x in shared) + sum(x.bias.shape[2] for x in gathered)
    width = gathered[0].key.shape[-1] + gathered[0].value.shape[-1]
    together = max(1, _ENTRIES // (keys_each * width))
    outputs, sums = [], []
    for head in range(heads):
        for low in range(0, count, together):
            part = slice(low, min(count, low + together))
            taken = [x.taken[head, part] for x in gathered]
            keys = [x.key[head].expand(part.stop - low, -1, -1) for x in shared]
            keys += [_taken(x.key, own, head) for x, own in zip(gathered, taken, strict=True)]
            values = [x.value[head].expand(part.stop - low, -1, -1) for x in shared]
            values += [_taken(x.value, own, head) for x, own in zip(gathered, taken, strict=True)]
            biases = [x.bias[head, part] for x in shared] + [x.bias[head, part] for x in gathered]
            output, lse = piece_attention(
                queries[head, part, None],
                _joined(keys, 1)[:, None],
                _joined(values, 1)[:, None],
                scale,
                _joined(biases, 1)[:, None, None],
            )
            outputs.append(output.flatten(0, 2))
            sums.append(lse.flatten())
    shape = (heads, -1)
    return torch.cat(outputs).unflatten(0, shape), torch.cat(sums).unflatten(0, shape)


def _taken(pool: Tensor, index: Tensor, head: int) -> Tensor:
    """Return what some blocks of queries take from a pool, ``(c, B·u, ·)``."""
    own = pool[head if len(pool) > 1 else 0]
    return own.index_select(0, index.flatten()).view(len(index), -1, own.shape[-1])


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
