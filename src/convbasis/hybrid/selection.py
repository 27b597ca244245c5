"""Which keys get exact attention beside the window: columns for a head, blocks for a block of queries.

No choice carries a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kept import kept
from .beyond import Gathered
from .sampling import own_rows
from .window import BLOCK

# Rows of a block of queries that choose its blocks of keys, and blocks of queries that choose together.
_ROWS, _TOGETHER = 4, 8
# How many times its share of the blocks of keys a block of queries can get.
_SPREAD = 4


class HeavyBlocks(NamedTuple):
    """Blocks of keys for each block of queries."""

    blocks: Tensor
    """``(R, c, B)`` block numbers, increasing, b for none."""
    exact: Tensor | None
    """``(R, c, 4, d_v)``, exact attention in the rows that chose; 0 where there was nothing to choose.
    None unless it was asked for."""


def heaviest(mass: Tensor, n: int, sinks: int, count: int) -> Tensor:
    """Return the first tokens and the keys with the most weight, ``(R, c)``.

    Args:
        mass: ``(R, p)``, weights of the first p <= n keys, 0 for none.
        n: number of keys; the position that stands for no key.
        sinks: number of first tokens.
        count: number of columns.
    """
    length = mass.shape[-1] if count else 0
    mass = mass[:, :length].index_fill(-1, torch.arange(min(sinks, length), device=mass.device), 0.0)
    taken = mass.topk(min(count, length), dim=-1)
    return with_first(taken.values, taken.indices, n, sinks)


def with_first(mass: Tensor, places: Tensor, n: int, sinks: int) -> Tensor:
    """Return the first tokens and chosen keys, in order, n for those without weight, ``(R, c)``.

    Args:
        mass: ``(R, p)``, weights of the chosen keys.
        places: ``(R, p)``, their positions.
        n: number of keys.
        sinks: number of first tokens.
    """
    first = torch.arange(min(sinks, n), device=mass.device).expand(len(mass), -1)
    return torch.cat([first, places.masked_fill(mass <= 0, n)], dim=-1).sort(-1).values


def seen_columns(columns: Tensor, n: int, length: int) -> Tensor:
    """Return which keys are among the columns, bool ``(R, length)``, length >= n."""
    seen = torch.zeros((len(columns), length + 1), dtype=torch.bool, device=columns.device)
    return seen.scatter_(1, columns.masked_fill(columns >= n, length), True)[:, :length]


def heavy_blocks(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    before: Tensor,
    count: int,
    size: int,
    scale: float,
    seed: int,
    first: int = 0,
    together: int = _TOGETHER,
    each: bool = False,
    real: int | None = None,
    value: Tensor | None = None,
) -> HeavyBlocks:
    """Return for each block of queries the blocks of keys before its window with the most weight.

    The weights are those of exact attention in a few rows of each block of queries, columns left out:
    O(n^2 d r / size) time for r = 4 rows of each. A head's blocks of queries share what they may take:
    those whose weight is spread over many blocks of keys get up to four times as many as `count`, at
    the cost of the others.

    Args:
        query: ``(R, c·size, d)``, whole blocks, which choose.
        key: ``(1, b·64, d)``, whole blocks; keys past the end are never seen.
        columns: positions ``(R, ·)`` that are seen already, or past the end.
        before: ``(c,)``, the blocks of keys among which each block of queries chooses, increasing.
        count: blocks for each block of queries, in the mean; more than there are mean all.
        size: queries of a block.
        scale: factor of the logits.
        seed: of the rows that are looked at.
        first: number of the first block of queries.
        together: blocks of queries that choose in one product.
        each: give `count` to every block of queries, whatever the others need.
        real: rows that are queries, the first ones; all by default.
        value: ``(1, b·64, d_v)``, for exact attention of the rows that choose.
    """
    heads, blocks = len(query), query.shape[1] // size
    places = rows_of_blocks(size, seed, blocks, query.shape[1] if real is None else real)
    places = places.to(query.device)
    own = query[:, places] * scale  # (R, c, 4, d)
    rows = places + first * size
    total = key.shape[1] // BLOCK
    keep = min(count if each else _SPREAD * count, total)
    found = torch.full((heads, blocks, keep), total, dtype=torch.int64, device=query.device)
    weight = torch.zeros((heads, blocks, keep), dtype=query.dtype, device=query.device)
    exact = None if value is None else query.new_zeros((*own.shape[:3], value.shape[-1]))
    numbers = torch.arange(total, device=query.device)
    for low in range(0, blocks, together):
        high = min(blocks, low + together)
        most = int(before[high - 1])
        if most == 0:
            continue
        begin, end = (first + low) * size, min((first + high) * size, key.shape[1])
        logits = own[:, low:high].flatten(0, 2) @ key[0, :end].t()
        logits = logits.view(heads, high - low, -1, end)
        later = torch.arange(begin, end, device=query.device) > rows[low:high, :, None]
        logits[..., begin:].masked_fill_(later, -torch.inf)
        weights = logits.softmax(-1)
        if exact is not None and value is not None:
            exact[:, low:high] = (weights.flatten(0, 2) @ value[0, :end]).view(*weights.shape[:3], -1)
        far = weights[..., : most * BLOCK]
        for head in range(heads):
            taken = columns[head]
            far[head].index_fill_(-1, taken[taken < most * BLOCK], 0.0)
        mass = far.unflatten(-1, (most, BLOCK)).sum(-1).sum(2)
        mass.masked_fill_(numbers[:most] >= before[low:high, None], 0.0)
        best = mass.topk(min(keep, most), dim=-1)
        found[:, low:high, : best.indices.shape[-1]] = best.indices
        weight[:, low:high, : best.indices.shape[-1]] = best.values
    if not each:
        budget = int(before.clamp(max=count).sum())
        heaviest = weight.flatten(1).topk(min(budget, weight[0].numel()), dim=-1)
        weight = torch.zeros_like(weight).flatten(1).scatter_(1, heaviest.indices, heaviest.values)
        weight = weight.view(found.shape)
    found = found.masked_fill_(weight <= 0, total).sort(-1).values
    if not each:
        found = found[..., : max(1, int((found < total).sum(-1).max()))]
    return HeavyBlocks(found, exact)


@kept(32)
def rows_of_blocks(size: int, seed: int, blocks: int, real: int) -> Tensor:
    """Return rows that stand for each block of queries, ``(blocks, 4)``, increasing: rows for fits.

    Rows past the last real one are replaced by the last, or the one before it. Nobody writes to them.
    """
    generator = torch.Generator().manual_seed(seed)
    places = 2 * torch.randperm(size // 2, generator=generator)[:_ROWS].sort().values
    rows = torch.arange(blocks)[:, None] * size + own_rows(places, 0, seed)
    last = own_rows(torch.tensor([real - 1, max(0, real - 3)]), 0, seed)
    return rows.clamp(max=int(last[last < real].max()) if bool((last < real).any()) else 0)


def block_keys(
    key: Tensor, value: Tensor, chosen: Tensor, seen: Tensor, alike: bool = False
) -> Gathered:
    """Return chosen blocks of keys as keys of blocks of queries, without those that are seen already.

    Args:
        key: ``(1, b·64, d)``.
        value: ``(1, b·64, d_v)``.
        chosen: ``(R, c, B)``, b for none.
        seen: ``(R, b·64)``.
        alike: whether all blocks of queries take B blocks, hidden ones among them, so that what one
            takes says nothing about another.
    """
    total = key.shape[1] // BLOCK
    bias = torch.zeros(seen.shape, dtype=key.dtype, device=key.device).masked_fill_(seen, -torch.inf)
    bias = torch.nn.functional.pad(bias, (0, BLOCK), value=-torch.inf).unflatten(1, (total + 1, BLOCK))
    heads = torch.arange(len(chosen), device=key.device)[:, None, None]
    return Gathered(
        key.unflatten(1, (total, BLOCK)),
        value.unflatten(1, (total, BLOCK)),
        chosen.clamp(max=total - 1),
        bias[heads, chosen].flatten(2),
        None if alike else (chosen < total).sum(-1),
    )
