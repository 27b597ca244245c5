"""Strictly causal choices: what a query sees is chosen from what came before, in stretches of tokens.

The columns of a stretch and the weights of keys in it come from sampled rows of the stretches before
it, the blocks of a block of queries from rows of the block before. All places are absolute, and each
choice is made from the same numbers in the same shapes whatever the number of tokens: a prompt may come
in chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
from .piece import merge
from .rows import exact_rows
from .sampling import own_rows, sampled_rows, some_rows
from .segments import Weighing
from .selection import heaviest, heavy_blocks
from .settings import Settings
from .window import BLOCK, Window, window_attention

STRETCH = 512  # tokens that share their columns and segments
# Sampled rows of a stretch, of those that a whole prompt has.
_SHARE = 8


class Running(NamedTuple):
    """What the choices of later tokens are made from, of R heads of one key-value head."""

    sampled: Weighing
    """The sampled rows of whole stretches, with keys a block and more before them; nothing but the mass
    of keys without key weights."""
    queries: Tensor
    """``(R, q, d)``, the last queries: of the stretch that is not over, and of the last blocks."""

    def numbers(self) -> int:
        """Return how many numbers these are."""
        return self.queries.numel() + sum(tensor.numel() for tensor in self.sampled)


def at_the_start(query: Tensor) -> Running:
    """Return what is known before the first of queries ``(R, m, d)``."""
    nothing, none = query.new_zeros((len(query), 0)), query.new_zeros((len(query), 0, query.shape[-1]))
    first = torch.empty(0, dtype=torch.int64, device=query.device)
    return Running(Weighing(none, first, nothing, nothing), none)


def attend_strictly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Settings,
    scale: float,
    estimated: bool,
    running: Running,
) -> tuple[Group, Running]:
    """Return attention of R heads that share keys, each row from its own and earlier tokens alone.

    Args:
        query: ``(R, m, d)``, of the last m tokens.
        key: ``(1, n, d)``, of all tokens.
        value: ``(1, n, d_v)``.
        settings: far_field is "none" or "segments".
        scale: factor of the logits.
        estimated: whether to estimate the error.
        running: what the tokens before have left.

    Returns:
        the attention, and what these tokens leave.
    """
    m, n = query.shape[1], key.shape[1]
    offset = n - m
    window = Window(settings.window, settings.shared)
    output, lse = window_attention(query, key, value, window, offset, scale)
    queries = query.detach()
    if running.queries.shape[1]:
        queries = torch.cat([running.queries, queries], dim=1)
    first = n - queries.shape[1]
    known = running._replace(queries=queries)
    pieces, parts, keys, rows = [], ["window"], 0.0, 0
    for begin in range(offset // STRETCH * STRETCH, n, STRETCH):
        end = begin + STRETCH
        low, high = max(offset, begin, window.begin), min(n, end)
        if low < high:
            columns = heaviest(known.sampled.mass, end, settings.sinks, settings.columns)
            own = (query, key, value, known, columns, settings, scale)
            more, more_lse, names, count = _far_rows(*own, low, high)
            pieces.append((low, high, more, more_lse))
            parts += [name for name in names if name not in parts]
            keys += count * (high - low)
        if n >= end and (settings.columns or settings.key_weights):
            more_rows = _stretch_rows(begin, settings, query.device)
            found = _weigh(known, key[:, :end].detach(), more_rows, first, settings, scale)
            known = known._replace(sampled=found)
            rows += len(more_rows)
    output, lse = _merged(output, lse, pieces, offset)
    mean, bound = no_estimate(query)
    if estimated and n > window.begin:
        mean, bound, held = _estimate(query, key, value, output, settings, scale, window.begin)
        rows += held
    per_query = min(n, settings.window) + keys / m
    kept = min(n // STRETCH * STRETCH, max(0, n // BLOCK - 1) * BLOCK)
    left = known._replace(queries=queries[:, kept - first :].clone())
    return Group(output, lse, mean, bound, tuple(parts), per_query, rows), left


def _counted(settings: Settings) -> Window:
    """Return the window before which the keys of a sampled row count: of a block, where the window of
    attention is longer, since what a row has there lies beyond the windows of the next stretch.
    """
    return Window(min(settings.window, BLOCK), settings.shared)


@torch.no_grad()
def _weigh(
    running: Running, key: Tensor, rows: Tensor, first: int, settings: Settings, scale: float
) -> Weighing:
    """Return the sampled rows so far with those of the stretch that ends with the last key.

    Args:
        running: what is known without them.
        key: ``(1, n, d)``.
        rows: ``(r,)`` positions, increasing.
        first: position of the first of the last queries.
        settings: window, and whether keys are weighed.
        scale: factor of the logits.
    """
    exact = sampled_rows(running.queries, key, rows, scale, first)
    before = _counted(settings).first(rows)
    so_far = running.sampled
    mass = lengthened(so_far.mass[..., None], key.shape[1])[..., 0] + exact.mass_before(before)
    if not settings.key_weights:
        return so_far._replace(mass=mass)
    return Weighing(
        torch.cat([so_far.query, running.queries[:, rows - first]], dim=1),
        torch.cat([so_far.first, before]),
        torch.cat([so_far.lse, exact.lse], dim=1),
        mass,
    )


def _far_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    running: Running,
    columns: Tensor,
    settings: Settings,
    scale: float,
    low: int,
    high: int,
) -> tuple[Tensor, Tensor, tuple[str, ...], float]:
    """Return attention of rows low .. high - 1 of a stretch to keys before their windows.

    Returns:
        output ``(R, high - low, d_v)``, lse, names of the parts, and keys of a query.
    """
    n = key.shape[1]
    offset = n - query.shape[1]
    rows = query[:, low - offset : high - offset]
    window = Window(settings.window, settings.shared)
    if settings.shared == 1:
        if not columns.shape[-1]:
            nothing = rows.new_full(rows.shape[:2], -torch.inf)
            return rows.new_zeros((*rows.shape[:2], value.shape[-1])), nothing, (), 0
        known = (key[:, :high], value[:, :high])
        found = column_attention(rows, *known, columns, window, scale, low)
        return *found, ("columns",), columns.shape[-1]
    # Whole blocks of queries, and of keys up to the end of the stretch.
    edge, last = low // BLOCK * BLOCK, -(-high // BLOCK) * BLOCK
    end = -(-high // STRETCH) * STRETCH
    blocks = torch.nn.functional.pad(rows, (0, 0, low - edge, last - high))
    known_key, known_value = (lengthened(tensor[:, :high], end) for tensor in (key, value))
    first = first_keys(window, edge, last, query.device)
    chosen = None
    if settings.blocks:
        with torch.no_grad():
            begin = n - running.queries.shape[1]
            earlier = running.queries[:, edge - BLOCK - begin : last - BLOCK - begin]
            # One block at a time: the same numbers in chunks of any size.
            chosen = heavy_blocks(
                earlier,
                known_key,
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
    weighing = running.sampled if settings.key_weights else None
    beyond = keys_beyond(
        known_key, known_value, high, first, columns, chosen, settings, scale, weighing
    )
    output, lse = attention_beyond(blocks, BLOCK, beyond.shared, beyond.gathered, scale)
    part = slice(low - edge, high - edge)
    return output[:, part], lse[:, part], beyond.parts, beyond.keys


def _merged(
    output: Tensor, lse: Tensor, pieces: list[tuple[int, int, Tensor, Tensor]], offset: int
) -> tuple[Tensor, Tensor]:
    """Return rows from offset on with what the last of them see before their windows."""
    if not pieces:
        return output, lse
    near = pieces[0][0] - offset  # rows that see nothing before their windows
    more = merge(
        output[:, near:],
        lse[:, near:],
        torch.cat([piece[2] for piece in pieces], dim=1),
        torch.cat([piece[3] for piece in pieces], dim=1),
    )
    if not near:
        return more
    return torch.cat([output[:, :near], more[0]], dim=1), torch.cat([lse[:, :near], more[1]], dim=1)


def _stretch_rows(begin: int, settings: Settings, device: torch.device) -> Tensor:
    """Return the sampled rows of a stretch, for fits; they depend on its place and the seed alone."""
    generator = torch.Generator().manual_seed((settings.seed * 0x9E3779B1 + begin) % (1 << 63))
    count = max(1, min(settings.samples // _SHARE, STRETCH // 2))
    places = torch.randperm(STRETCH // 2, generator=generator)[:count].sort().values
    return own_rows(begin + 2 * places, 0, settings.seed).to(device)


def _estimate(
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
        rows = some_rows(max(begin, offset), n, 2 * settings.samples, 1, settings.seed).to(query.device)
        exact = exact_rows(query, key, value, rows, scale, offset)
        return *error_bound(output, exact, rows, begin, offset), len(rows)
