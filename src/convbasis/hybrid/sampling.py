"""Exact attention of a few sampled queries: what columns, weights and estimates are made from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kept import kept

_PERIOD = 64  # rows after which those for fits repeat
_TOGETHER = 16  # rows that are computed over the keys up to the last of them, and summed together


class SampledRows(NamedTuple):
    """Exact attention of some queries of R heads that share their keys."""

    rows: Tensor
    """``(s,)`` positions, increasing."""
    weights: Tensor
    """``(R, s, n)`` softmax weights; 0 after the row."""
    lse: Tensor
    """``(R, s)``."""

    def of(self, heads: slice) -> SampledRows:
        """Return those of some of the heads."""
        return SampledRows(self.rows, self.weights[heads], self.lse[heads])

    def mass_before(self, first: Tensor) -> Tensor:
        """Return the weight of each key ``(R, n)`` in rows that have it before first ``(s,)``.

        `first` increases with the rows.
        """
        found = self.weights.new_zeros((len(self.weights), self.weights.shape[-1]))
        for own, stops in zip(self.weights.split(_TOGETHER, 1), first.split(_TOGETHER), strict=True):
            least, most = (max(0, int(stop)) for stop in (stops[0], stops[-1]))
            found[:, :least] += own[..., :least].sum(1)
            # Only where some of the rows end there is a mask: it would cost more than the sums.
            keys = torch.arange(least, most, device=first.device)
            found[:, least:most] += own[..., least:most].where(keys < stops[:, None], 0.0).sum(1)
        return found


def own_rows(rows: Tensor, parity: int, seed: int) -> Tensor:
    """Return rows, each moved within its pair (2i, 2i + 1) to the one of a parity.

    Rows of the two parities are never the same: those of 0 are for fits, those of 1 for estimates.
    Which of a pair is which is random, and the opposite 32 rows later: no kind of row, such as every
    second one, is left out of either.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(0, 2, (_PERIOD // 4,), generator=generator)
    sides = torch.cat([half, 1 - half]).to(rows.device)
    pairs = rows.div(2, rounding_mode="floor")
    return 2 * pairs + (sides[pairs % len(sides)] + parity) % 2


@kept(256)
def spread_rows(begin: int, end: int, count: int, parity: int, seed: int) -> Tensor:
    """Return about `count` rows of begin .. end - 1, one at random in each equal stretch.

    They are `own_rows` of a parity. Heads share what is returned: nobody writes to it.
    """
    generator = torch.Generator().manual_seed(2 * seed + parity)
    count = min(count, (end - begin) // 2)
    if count < 1:
        return torch.empty(0, dtype=torch.int64)
    place = torch.arange(count) + torch.rand(count, generator=generator)
    rows = own_rows(begin + (place * ((end - begin) / count)).long(), parity, seed)
    rows = own_rows(rows + 2 * (rows < begin).long() - 2 * (rows >= end).long(), parity, seed)
    return rows[(rows >= begin) & (rows < end)].unique()


def some_rows(begin: int, end: int, count: int, parity: int, seed: int) -> Tensor:
    """Return `spread_rows`, the last row where there would be none."""
    rows = spread_rows(begin, end, count, parity, seed)
    return rows if len(rows) else torch.tensor([end - 1])


def sampled_rows(
    query: Tensor, key: Tensor, rows: Tensor, scale: float, offset: int = 0
) -> SampledRows:
    """Return exact attention weights of some rows, in O(s n d) time and R·s·n numbers.

    Args:
        query: ``(R, m, d)``, tokens offset .. offset + m - 1.
        key: ``(1, n, d)``.
        rows: ``(s,)`` positions, increasing.
        scale: factor of the logits.
        offset: position of the first query.
    """
    weights = query.new_zeros((len(query), len(rows), key.shape[1]))
    lse = query.new_empty(weights.shape[:2])
    low = 0
    for part in rows.split(_TOGETHER):
        high, end = low + len(part), int(part[-1]) + 1
        own = query.index_select(1, part - offset).flatten(0, 1) * scale
        logits = (own @ key[0, :end].t()).unflatten(0, (-1, len(part)))
        first = int(part[0])  # what follows a row
        later = torch.arange(first, end, device=key.device) > part[:, None]
        logits[..., first:].masked_fill_(later, -torch.inf)
        # The exponential by itself is very slow on processors where it is too small for the dtype.
        found = logits.softmax(-1)
        weights[:, low:high, :end] = found
        lse[:, low:high] = logits.amax(-1) - found.amax(-1).log()
        low = high
    return SampledRows(rows, weights, lse)
