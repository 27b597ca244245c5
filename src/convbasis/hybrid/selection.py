"""Which keys get exact attention beside the window: columns for a head, blocks for a block of queries.

No choice carries a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .beyond import Gathered
from .sampling import SampledRows, own_rows
from .window import BLOCK, Window

# Rows of a block of queries that choose its blocks of keys, and blocks of queries that choose together.
_ROWS, _TOGETHER = 4, 16


def heavy_columns(
    sampled: SampledRows | None,
    window: Window,
    n: int,
    heads: int,
    sinks: int,
    count: int,
    device: torch.device,
) -> Tensor:
    """Return the first tokens and the columns with the most weight before the windows, ``(R, c)``."""
    mass = torch.zeros((heads, 0), device=device)
    if sampled is not None and count:
        mass = sampled.mass_before(window.first(sampled.rows))
    return heaviest(mass, n, sinks, count)


def heaviest(mass: Tensor, n: int, sinks: int, count: int) -> Tensor:
    """Return the first tokens and the keys with the most weight, ``(R, c)``.

    Args:
        mass: ``(R, p)``, weights of the first p <= n keys, 0 for none.
        n: number of keys; the position that stands for no key.
        sinks: number of first tokens.
        count: number of columns.
    """
    first = torch.arange(min(sinks, n), device=mass.device).expand(len(mass), -1)
    if not count or not mass.shape[-1]:
        return first
    mass = mass.index_fill(-1, first[0, : mass.shape[-1]], 0.0)
    taken = mass.topk(min(count, mass.shape[-1]), dim=-1)
    heavy = taken.indices.masked_fill(taken.values <= 0, n)
    return torch.cat([first, heavy], dim=-1).sort(-1).values


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
    scale: float,
    seed: int,
    first: int = 0,
    together: int = _TOGETHER,
) -> Tensor:
    """Return for each block of queries the blocks of keys before its window with the most weight.

    The weights are those of exact attention in a few rows of each block of queries, columns left out:
    O(n^2 d / 16) time.

    Args:
        query: ``(R, c·64, d)``, whole blocks, which choose; rows past the end are 0.
        key: ``(1, b·64, d)``, whole blocks; keys past the end are never seen.
        columns: positions ``(R, ·)`` that are seen already, or past the end.
        before: ``(c,)``, the blocks of keys among which each block of queries chooses, increasing.
        count: blocks for each block of queries; more than there are mean all.
        scale: factor of the logits.
        seed: of the rows that are looked at.
        first: number of the first block of queries.
        together: blocks of queries that choose in one product.

    Returns:
        ``(R, c, B)`` block numbers, B at most count, b for none.
    """
    generator = torch.Generator().manual_seed(seed)
    places = 2 * torch.randperm(BLOCK // 2, generator=generator)[:_ROWS].sort().values
    places = own_rows(places, 0, seed).to(query.device)
    own = query.unflatten(1, (-1, BLOCK))[:, :, places] * scale
    heads, blocks = own.shape[:2]
    total = key.shape[1] // BLOCK
    count = min(count, total)
    found = torch.full((heads, blocks, count), total, dtype=torch.int64, device=query.device)
    hidden = above_diagonal(places)
    for low in range(0, blocks, together):
        high = min(blocks, low + together)
        most = int(before[high - 1])
        if most == 0:
            continue
        logits = own[:, low:high].flatten(1, 2).flatten(0, 1) @ key[0, : (first + high) * BLOCK].t()
        logits = logits.view(heads, high - low, len(places), -1)
        for index in range(high - low):  # what follows a row
            begin = (first + low + index) * BLOCK
            logits[:, index, :, begin : begin + BLOCK].masked_fill_(hidden, -torch.inf)
            logits[:, index, :, begin + BLOCK :] = -torch.inf
        weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        everything = weights.sum(-1, keepdim=True)
        far = weights[..., : most * BLOCK]
        for head in range(heads):
            taken = columns[head]
            far[head].index_fill_(-1, taken[taken < most * BLOCK], 0.0)
        mass = far.unflatten(-1, (most, BLOCK)).sum(-1).div_(everything).sum(2)
        mass.masked_fill_(torch.arange(most, device=query.device) >= before[low:high, None], -1.0)
        best = mass.topk(min(count, most), dim=-1)
        found[:, low:high, : best.indices.shape[-1]] = best.indices.masked_fill(best.values <= 0, total)
    return found.sort(-1).values


def above_diagonal(places: Tensor) -> Tensor:
    """Return which keys of a block follow the rows at some places of it, bool ``(rows, 64)``."""
    return torch.arange(BLOCK, device=places.device) > places[:, None]


def block_keys(key: Tensor, value: Tensor, chosen: Tensor, seen: Tensor) -> Gathered:
    """Return chosen blocks of keys as keys of blocks of queries, without those that are seen already.

    Args:
        key: ``(1, b·64, d)``.
        value: ``(1, b·64, d_v)``.
        chosen: ``(R, c, B)``, b for none.
        seen: ``(R, b·64)``.
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
    )
