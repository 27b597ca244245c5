"""What exchanging spectra over ranks costs the busiest rank; and whether columns cost more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from .cost import COMPLEX, TRANSFORM, Load, attention_load, headers, told_to_others
from .grid import grid_for
from .shares import Sizes
from .strips import Strip, numbers_between

_DOUBLE = 8  # bytes of a number of a spectrum; a frequency has two
_BACKWARD = 2.0  # each product takes two, and each transform one


def spectra_load(
    n: int,
    ranks: int,
    *,
    heads: int,
    head_dim: int,
    segments: int,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    batch: int = 1,
    itemsize: int = 4,
    starts: Sequence[int] | None = None,
    key_bias: bool = False,
) -> Load:
    """Return what `convbasis.distributed.conv_basis_attention` with ``layout="spectra"`` costs a rank.

    Args:
        n: tokens, spread evenly.
        ranks: number of processes.
        heads: query heads.
        head_dim: of queries and keys.
        segments: of each head.
        kv_heads: heads by default.
        value_dim: head_dim by default.
        batch: sequences.
        itemsize: bytes of a number of the inputs; spectra are of float64.
        starts: of the segments; uniform ones by default.
        key_bias: whether there are biases of keys, so that values are different in each head.

    Complexity: O(segments · blocks + ranks²) time, blocks are about as many as segments or ranks.
    """
    kv_heads, width = kv_heads or heads, value_dim or head_dim
    value_heads, columns = heads if key_bias else kv_heads, width + 1
    if starts is None:
        starts = range(0, n, -(-n // segments))
    grid = grid_for(n, ranks, tuple(starts), heads, value_heads, columns)
    lengths = [n * (rank + 1) // ranks - n * rank // ranks for rank in range(ranks)]
    of_logits = _moved(grid.lag_strips([(slice(0, 1), list(grid.starts))]), lengths)
    of_tokens = _moved(grid.token_strips(1, 1), lengths)
    lags, cuts = ([len(own) for own in each] for each in (grid.lag_rows, grid.cuts))
    factors = [heads * lags[r] + value_heads * columns * cuts[r] for r in range(ranks)]
    products = grid.each * heads * columns
    every, others = sum(factors), ranks - 1
    met = sum((high - low) * pieces for low, high, pieces in grid.row_groups())
    first = itemsize * kv_heads * head_dim * -(-segments // ranks) * others
    by_token = kv_heads * width + (heads if key_bias else 0)
    own_tokens = heads * (head_dim + width) + kv_heads * (head_dim + width)
    loads = []
    for rank, length in enumerate(lengths):
        part = grid.frequencies(rank)
        own = part.stop - part.start
        rest = grid.bins - own
        moved = [heads * of_logits[way][rank] + by_token * of_tokens[way][rank] for way in (0, 1)]
        back = [heads * width * of_tokens[way][rank] for way in (1, 0)]
        told = heads * (2 if key_bias else 1)
        told += heads * lags[rank] + value_heads * (2 * cuts[rank] + 1)
        forward = 2 * (factors[rank] * rest + products * others * own) + told * others
        backward = 2 * (products * rest + (every - factors[rank]) * own)
        rows = factors[rank] + products
        spectra = rows * grid.transform + 2 * own * (every + ranks * products)
        matrix = 2 * own * heads * met
        working = TRANSFORM * grid.transform * math.log2(grid.transform) * rows
        working += COMPLEX * own * heads * met * columns
        tokens = grid.block * (heads * lags[rank] + grid.each * (kv_heads + heads) * width)
        loads.append(
            Load(
                batch * (itemsize * (moved[0] + back[0]) + _DOUBLE * forward + first)
                + _DOUBLE * others
                + told_to_others(ranks, 11 if key_bias else 10),
                batch * (itemsize * (moved[1] + back[1]) + _DOUBLE * backward + first)
                + headers(ranks, 7 if key_bias else 6),
                batch * working,
                batch * (length * own_tokens + tokens + (spectra + matrix) * _DOUBLE // itemsize),
            )
        )
    found = Load(*(max(column) for column in zip(*loads, strict=True)))
    return found._replace(backward=_BACKWARD)


@lru_cache(maxsize=64)
def spectra_pay(
    n: int,
    ranks: int,
    sizes: Sizes,
    head_dim: int,
    starts: tuple[int, ...],
    itemsize: int,
    key_bias: bool,
) -> bool:
    """Return whether spectra take fewer bytes than value columns and logits, and no more operations.

    Args:
        n: tokens.
        ranks: number of processes.
        sizes: of the attention.
        head_dim: of queries and keys.
        starts: of the segments.
        itemsize: bytes of a number of the inputs.
        key_bias: whether there are biases of keys.
    """
    heads, kv_heads, width = sizes
    known = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": width}
    known |= {"segments": len(starts), "itemsize": itemsize}
    columns = attention_load(n, ranks, layout="columns", exchange="logits", **known)
    spectra = spectra_load(n, ranks, starts=starts, key_bias=key_bias, **known)
    fewer = spectra.sent_forward < columns.sent_forward
    return fewer and spectra.operations <= columns.operations


def _moved(wanted: Sequence[Sequence[Strip]], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return how many numbers each rank sends to others and gets from them."""
    between = numbers_between(wanted, lengths)
    ranks = range(len(lengths))
    sent = [sum(between[rank]) - between[rank][rank] for rank in ranks]
    got = [sum(row[rank] for row in between) - between[rank][rank] for rank in ranks]
    return sent, got
