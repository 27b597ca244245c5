"""What strictly causal choices are made from: sampled rows of the stretches of tokens that are over.

All places are absolute, and what a stretch leaves is made of the same numbers in the same shapes
however many tokens come at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kept import kept
from .group import lengthened
from .joined import joined
from .runs import runs
from .sampling import own_rows, sampled_rows, some_rows
from .segments import Weighing
from .settings import Settings
from .window import BLOCK, Window

STRETCH = 512  # tokens that share their columns and segments; the first of them are exact
# Sampled rows of a stretch, of those that a whole prompt has.
_SHARE = 8
# Tokens of which one is a row for estimates, and until there are as many as a whole prompt has.
PERIOD, _FIRST_PERIOD = 32, 8
_DRAWN = 1021  # periods after which places of rows for estimates repeat


class Running(NamedTuple):
    """What the choices of later tokens are made from, of R heads of one key-value head."""

    mass: Tensor
    """``(R, s·512)``, weights of keys a block and more before the sampled rows of whole stretches,
    summed over them."""
    queries: Tensor
    """``(R, q, d)``, the last queries: of the stretch that is not over, and of the last blocks."""
    first: int
    """Position of the first of them."""
    rows: Tensor
    """``(r,)`` positions of the sampled rows; none if no head weighs keys."""
    sampled: Tensor
    """``(R, r, d)``, their queries."""
    lse: Tensor
    """``(R, r)``, their log-sum-exp."""
    held: tuple[Tensor, ...]
    """For each head ``(4, h)`` float64: of the latest rows for estimates the norms of errors, of exact
    attention and of our own, and their positions."""

    def numbers(self) -> int:
        """Return how many numbers these are."""
        tensors = (self.mass, self.queries, self.rows, self.sampled, self.lse, *self.held)
        return sum(tensor.numel() for tensor in tensors)

    def earlier(self, heads: slice | list[int], low: int, high: int) -> Tensor:
        """Return the queries of tokens low .. high - 1, which are among the last, in some heads."""
        return self.queries[heads, low - self.first : high - self.first]


def at_the_start(query: Tensor) -> Running:
    """Return what is known before the first of queries ``(R, m, d)``."""
    nothing, none = query.new_zeros((len(query), 0)), query.new_zeros((len(query), 0, query.shape[-1]))
    rows = torch.empty(0, dtype=torch.int64, device=query.device)
    held = torch.empty((4, 0), dtype=torch.float64, device=query.device)
    return Running(nothing, none, 0, rows, none, nothing, (held,) * len(query))


@torch.no_grad()
def with_stretch(
    running: Running,
    key: Tensor,
    settings: Sequence[Settings],
    scale: float,
) -> Running:
    """Return what is known with the sampled rows of the stretch that ends with the last key.

    Args:
        running: what is known without them.
        key: ``(1, n, d)``.
        settings: of each head.
        scale: factor of the logits.
    """
    rows = stretch_rows(key.shape[1] - STRETCH, settings[0], key.device)
    exact = sampled_rows(running.queries, key, rows, scale, running.first)
    windows = runs([_counted(own.window) for own in settings])
    more = joined([exact.of(heads).mass_before(own.first(rows)) for heads, own in windows])
    running = running._replace(mass=lengthened(running.mass[..., None], key.shape[1])[..., 0] + more)
    if not any(own.weighs_keys for own in settings):
        return running
    return running._replace(
        rows=torch.cat([running.rows, rows]),
        sampled=torch.cat([running.sampled, running.queries[:, rows - running.first]], dim=1),
        lse=torch.cat([running.lse, exact.lse], dim=1),
    )


def window_at(begin: int, settings: Settings) -> Window:
    """Return the window in the stretch that begins there. Of the first one nothing is known: where
    there is more than a window and first tokens, it sees all keys.
    """
    first = begin == 0 and settings.shared > 1
    return Window(STRETCH if first else settings.window, settings.shared)


def first_not_exact(settings: Settings) -> int:
    """Return the first row that has keys before its window."""
    begin = Window(settings.window, settings.shared).begin
    return begin if settings.shared == 1 else max(begin, STRETCH)


def rows_of_a_stretch(settings: Settings) -> int:
    """Return how many rows of each stretch are sampled."""
    return max(1, min(settings.samples // _SHARE, STRETCH // 2))


def stretch_rows(begin: int, settings: Settings, device: torch.device) -> Tensor:
    """Return the sampled rows of a stretch, for fits; they depend on its place and the seed alone."""
    generator = torch.Generator().manual_seed((settings.seed * 0x9E3779B1 + begin) % (1 << 63))
    places = torch.randperm(STRETCH // 2, generator=generator)[: rows_of_a_stretch(settings)]
    places = places.sort().values
    return own_rows(begin + 2 * places, 0, settings.seed).to(device)


def rows_to_judge(begin: int, end: int, most: int, missing: int, seed: int) -> Tensor:
    """Return the rows of begin .. end - 1 for estimates: one at random in each long period of tokens,
    in each short one as far as rows are missing. If none is there they are one row at least.

    They are rows that no fit has, but for a last token alone.

    Args:
        begin: first token.
        end: end of them.
        most: rows, at most.
        missing: how many there are too few before.
        seed: of the rows.
    """
    edge = begin // PERIOD * PERIOD + missing * _FIRST_PERIOD
    early = _in_periods(begin, min(end, edge), _FIRST_PERIOD, seed)
    rows = torch.cat([early, _in_periods(max(begin, edge), end, PERIOD, seed)])
    if len(rows) > most or begin < edge < end:  # evenly, so that no part counts for more
        return some_rows(begin, end, min(most, len(rows)), 1, seed)
    if not len(rows) and missing == most:
        return some_rows(begin, end, 1, 1, seed)
    return rows


def _in_periods(begin: int, end: int, period: int, seed: int) -> Tensor:
    """Return one row of each period, as far as it is among begin .. end - 1, a row for estimates."""
    places = _places(period, seed)
    periods = torch.arange(begin // period, max(begin // period, -(-end // period)))
    rows = own_rows(periods * period + 2 * places[periods % _DRAWN], 1, seed)
    return rows[(rows >= begin) & (rows < end)]


@kept(8)
def _places(period: int, seed: int) -> Tensor:
    """Return a pair of rows at random in each period, by number; nobody writes to it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, period // 2, (_DRAWN,), generator=generator)


def _counted(window: int) -> Window:
    """Return the window before which the keys of a sampled row count: of a block, where the window of
    attention is longer, since what a row has there lies beyond the windows of the next stretch.
    """
    return Window(min(window, BLOCK), BLOCK)


def weighing_of(
    heads: list[int], windows: Sequence[Window], begins: Sequence[int], before: Sequence[Running]
) -> Weighing:
    """Return what weighs the keys of segments in each of the heads and stretches."""
    last, number = before[-1], len(before)
    rows = torch.stack([_counted(window.tokens).first(last.rows) for window in windows])
    known = torch.tensor([len(each.rows) for each in before], device=rows.device)
    counts = torch.arange(len(last.rows), device=rows.device) < known[:, None]
    first = rows[:, None].where(counts, 0).flatten(0, 1)
    tokens = torch.tensor([begin + STRETCH for begin in begins], device=rows.device)
    return Weighing(
        last.sampled[heads].repeat_interleave(number, 0),
        first,
        last.lse[heads].repeat_interleave(number, 0),
        stacked([each.mass[heads] for each in before], 0.0),
        tokens.repeat(len(heads))[:, None],
    )


def stacked(of_stretches: Sequence[Tensor], padding: float) -> Tensor:
    """Return tensors ``(R, ..., p)`` of stretches as one, ``(R·stretches, ..., p)``, all as long."""
    longest = max(tensor.shape[-1] for tensor in of_stretches)
    equal = [
        torch.nn.functional.pad(tensor, (0, longest - tensor.shape[-1]), value=padding)
        if tensor.shape[-1] < longest
        else tensor
        for tensor in of_stretches
    ]
    return torch.stack(equal, 1).flatten(0, 1)
