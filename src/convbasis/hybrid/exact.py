"""Exact attention of heads among approximated ones: a thread for each, in stretches that are shared."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..workers import share
from .piece import causal_attention, merge, piece_attention
from .put_down import put_down

_STRETCH = 2048  # rows of one part of the work


def serves_exactly(query: Tensor, value: Tensor) -> bool:
    """Whether `attend_exactly` is the way for such tensors, on a processor."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and query.shape[-1] == value.shape[-1]
    )


@torch.no_grad()
def attend_exactly(
    query: Tensor, key: Tensor, value: Tensor, scale: float, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return exact causal attention of R heads, and its log-sum-exp; nothing is recorded.

    Args:
        query: ``(R, m, d)``, of the last m tokens.
        key: ``(1, n, d)``.
        value: ``(1, n, d)``.
        scale: factor of the logits.
        into: ``(R, m, d)``, where the output is written to; None for memory of its own.

    Complexity: O(m n d) time, O(n d) memory.
    """
    rows = put_down(query, key, value, into)
    m, offset = query.shape[1], key.shape[1] - query.shape[1]
    keys, values = (x[None].expand(-1, len(query), -1, -1) for x in (key, value))

    def attend(low: int) -> None:
        high = min(m, low + _STRETCH)
        first, last = offset + low, offset + high
        own = query[None, :, low:high]
        output, lse = causal_attention(own, keys[:, :, first:last], values[:, :, first:last], scale)
        if first:
            more = piece_attention(own, keys[:, :, :first], values[:, :, :first], scale)
            output, lse = merge(output, lse, *more, overwrite=True)
        rows.put(low, output[0], lse[0])

    # The dearest first: then all threads end at about the same time.
    share([partial(attend, low) for low in reversed(range(0, m, _STRETCH))])
    return rows.all()
