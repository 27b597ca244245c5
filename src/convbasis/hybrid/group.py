"""Attention of the query heads that share one key-value head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .beyond import Gathered, Shared, attention_beyond
from .columns import column_attention, column_keys
from .correction import corrected
from .estimate import error_bound
from .piece import merge
from .rows import exact_rows
from .sampling import SampledRows, mass_before, sampled_rows, spread_rows
from .scaled_conv import conv_attention
from .scaled_lowrank import lowrank_far_attention
from .segments import segment_keys
from .selection import block_keys, heaviest, heavy_blocks, seen_columns
from .settings import Settings
from .window import BLOCK, Window, window_attention

_STRETCH = 2048  # rows that are attended together


class Group(NamedTuple):
    """Attention of the R heads of one key-value head."""

    output: Tensor
    """``(R, m, d_v)``."""
    lse: Tensor
    """``(R, m)``."""
    mean: Tensor
    """``(R,)``, the estimated error."""
    bound: Tensor
    """``(R,)``, its upper bound."""
    parts: tuple[str, ...]
    """Names of what was merged."""
    keys: float
    """Keys of a query, in the mean."""
    rows: int
    """Sampled rows."""


class Beyond(NamedTuple):
    """Keys before the windows."""

    shared: list[Shared]
    """Those that all blocks of queries share."""
    gathered: list[Gathered]
    """Those that each block of queries takes for itself."""
    parts: tuple[str, ...]
    """Names of what they are."""
    keys: float
    """Keys of a query, in the mean."""


def attend_group(
    query: Tensor, key: Tensor, value: Tensor, settings: Settings, scale: float, estimated: bool
) -> Group:
    """Return attention of R heads ``(R, n, d)`` that share key and value ``(1, n, ·)``."""
    n = query.shape[1]
    window = Window(settings.window, settings.shared)
    known = None
    parts = ["window"]
    keys = float(min(n, settings.window))
    begin = window.begin
    if begin >= n:
        output, lse = window_attention(query, key, value, window, 0, scale)
        return Group(output, lse, *no_estimate(query), tuple(parts), keys, 0)
    with torch.no_grad():
        sampled, mass, rows = _fitted(query, key, settings, scale, begin, window)
        columns = heaviest(mass, n, settings.sinks, settings.columns)
    if settings.shared > 1:
        weighing = sampled if settings.key_weights else None
        beyond, known = _beyond(query, key, value, columns, settings, scale, weighing)
        output, lse = _near_and_beyond(query, key, value, window, beyond, scale)
        parts += beyond.parts
        keys += beyond.keys
    else:
        output, lse = window_attention(query, key, value, window, 0, scale)
        if columns.shape[-1]:
            far = column_attention(query, key, value, columns, window, scale)
            output, lse = merge(output, lse, *far, overwrite=True)
            parts.append("columns")
            keys += columns.shape[-1]
    if settings.far_field == "conv" and sampled is not None:
        seen = seen_columns(columns, n, n)
        output, lse = merge(
            output, lse, *conv_attention(query, key, value, seen, window, scale, sampled)
        )
        parts.append("conv")
    if settings.far_field == "lowrank" and sampled is not None:
        seen = seen_columns(columns, n, n)
        far = lowrank_far_attention(query, key, value, seen, window, scale, sampled)
        output, lse = merge(output, lse, *far)
        parts.append("lowrank")
    mean, bound = no_estimate(query)
    if settings.correction:
        output, more_rows = corrected(query, key, value, output, begin, scale, settings.seed, known)
        rows += more_rows
        parts.append("correction")
    if estimated:
        mean, bound, held = estimate(query, key, value, output, settings, scale, begin)
        rows += held
    return Group(output, lse, mean, bound, tuple(parts), float(keys), rows)


def _beyond(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    settings: Settings,
    scale: float,
    sampled: SampledRows | None,
) -> tuple[Beyond, Tensor | None]:
    """Return the keys before the windows of all queries, see `keys_beyond`; and exact attention of the
    rows that correct others, if they have chosen blocks.
    """
    n = query.shape[1]
    q = lengthened(query, -(-n // settings.shared) * settings.shared)
    k, v = (lengthened(tensor, -(-n // BLOCK) * BLOCK) for tensor in (key, value))
    chosen = exact = None
    if settings.blocks:
        window = Window(settings.window, settings.shared)
        with torch.no_grad():
            before = blocks_before(window, 0, q.shape[1], query.device)
            chosen, exact = heavy_blocks(
                q,
                k,
                columns,
                before,
                settings.blocks,
                window.shared,
                scale,
                settings.seed,
                real=n,
                value=v if settings.correction else None,
            )
    return keys_beyond(q, k, v, n, 0, columns, chosen, settings, scale, sampled), exact


def _near_and_beyond(
    query: Tensor, key: Tensor, value: Tensor, window: Window, beyond: Beyond, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention to the windows and beyond, and its log-sum-exp.

    Some rows at a time, so that what is merged is still in the processor's caches; all rows at once
    where blocks of queries take keys for themselves, which is fastest in an order of its own.
    """
    n = query.shape[1]
    step = -(-n // window.shared) * window.shared if beyond.gathered else _STRETCH
    stretches = zip(*(x.stretches(step // window.shared) for x in beyond.shared), strict=True)
    outputs, sums = [], []
    for low in range(0, n, step):
        high = min(n, low + step)
        own = query[:, low:high]
        output, lse = window_attention(own, key[:, :high], value[:, :high], window, low, scale)
        shared = next(stretches, ())
        if high > window.begin and (shared or beyond.gathered):
            own = lengthened(own, -(-(high - low) // window.shared) * window.shared)
            more = attention_beyond(own, window.shared, shared, beyond.gathered, scale)
            seen = (x[:, : high - low] for x in more)
            output, lse = merge(output, lse, *seen, overwrite=True)
        outputs.append(output)
        sums.append(lse)
    if len(outputs) == 1:
        return outputs[0], sums[0]
    return torch.cat(outputs, dim=1), torch.cat(sums, dim=1)


def nothing(query: Tensor, value: Tensor) -> Group:
    """Return attention of no tokens."""
    output = value.new_zeros((*query.shape[:2], value.shape[-1]))
    return Group(output, query.new_zeros(query.shape[:2]), *no_estimate(query), (), 0.0, 0)


def keys_beyond(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n: int,
    offset: int,
    columns: Tensor,
    chosen: Tensor | None,
    settings: Settings,
    scale: float,
    sampled: SampledRows | None,
) -> Beyond:
    """Return the columns, chosen blocks and segments before the windows of blocks of queries.

    Args:
        query: ``(R, c·w, d)``, whole blocks, of w = settings.shared queries, from token offset on.
        key: ``(1, b·64, d)``, whole blocks.
        value: ``(1, b·64, d_v)``.
        n: number of keys; what follows is 0.
        offset: position of the first query, at the edge of a block.
        columns: positions ``(R, ·)``, n or more for none.
        chosen: ``(R, c, B)`` blocks of keys, b for none; None without blocks.
        settings: which parts there are.
        scale: factor of the logits.
        sampled: what weighs the keys of segments; None for equal weights.
    """
    window = Window(settings.window, settings.shared)
    length = key.shape[1]
    begins = torch.arange(offset, offset + query.shape[1], settings.shared, device=query.device)
    before = blocks_before(window, offset, offset + query.shape[1], query.device)
    seen = seen_columns(columns, n, length)
    shared, gathered, parts = [], list[Gathered](), []
    if columns.shape[-1]:
        shared.append(column_keys(key, value, columns, window.first(begins).clamp(min=0)))
        parts.append("columns")
    if chosen is not None:
        gathered.append(block_keys(key, value, chosen, seen))
        parts.append("blocks")
    if settings.far_field == "segments":
        elsewhere = seen.clone()
        elsewhere[:, n:] = True
        segments = settings.num_segments
        found = segment_keys(
            query, key, value, elsewhere, chosen, before, segments, scale, sampled, window
        )
        shared.extend(found[0])
        gathered.extend(found[1])
        parts.append("segments")
    keys = float(sum(x.key.shape[1] for x in shared))
    for x in gathered:
        taken = x.taken.shape[2] if x.counts is None else float(x.counts.double().mean())
        keys += taken * x.key.shape[2]
    return Beyond(shared, gathered, tuple(parts), keys)


def blocks_before(window: Window, low: int, high: int, device: torch.device) -> Tensor:
    """Return how many blocks of keys lie before the window of each block of queries of low .. high."""
    begins = torch.arange(low, high, window.shared, device=device)
    return window.first(begins).clamp(min=0).div(BLOCK, rounding_mode="floor")


def lengthened(tensor: Tensor, length: int) -> Tensor:
    """Return a tensor ``(R, n, ·)`` with zeros up to some length."""
    more = length - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, 0, 0, more)) if more else tensor


def no_estimate(query: Tensor) -> tuple[Tensor, Tensor]:
    """Return the errors of heads where everything is exact."""
    zero = torch.zeros(len(query), dtype=torch.float64, device=query.device)
    return zero, zero


def estimate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    settings: Settings,
    scale: float,
    begin: int,
) -> tuple[Tensor, Tensor, int]:
    """Return the estimated error of the last rows, its upper bound, and the number of rows it took.

    Args:
        query: ``(R, m, d)``, of the last m tokens.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        output: ``(R, m, d_v)``.
        settings: number of rows and seed.
        scale: factor of the logits.
        begin: the first row that is not exact.
    """
    n = key.shape[1]
    offset = n - query.shape[1]
    with torch.no_grad():
        rows = _rows(max(begin, offset), n, 2 * settings.samples, settings.seed, 1).to(query.device)
        exact = exact_rows(query, key, value, rows, scale, offset)
        return *error_bound(output, exact, rows, begin, offset), len(rows)


def _rows(begin: int, end: int, count: int, seed: int, parity: int) -> Tensor:
    """Return sampled rows of begin .. end - 1, one at least."""
    rows = spread_rows(begin, end, count, parity, seed)
    return rows if len(rows) else torch.tensor([end - 1])


def _fitted(
    query: Tensor, key: Tensor, settings: Settings, scale: float, begin: int, window: Window
) -> tuple[SampledRows | None, Tensor, int]:
    """Return what fits are made from: exact rows, if a fit needs them, the weights of keys before the
    windows ``(R, n)`` in the same rows, if columns need them, and the number of those rows.
    """
    whole = settings.key_weights or settings.far_field in ("conv", "lowrank")
    if not (whole or settings.columns):
        return None, query.new_zeros((len(query), 0)), 0
    rows = _rows(begin, key.shape[1], settings.samples, settings.seed, 0).to(query.device)
    first = window.first(rows)
    if not whole:
        return None, mass_before(query, key, rows, first, scale), len(rows)
    sampled = sampled_rows(query, key, rows, scale)
    return sampled, sampled.mass_before(first), len(rows)
