"""Exact attention of sampled rows: what choices, fits and estimates of heads are made of.

The rows of all heads that share a key go through one product with the keys. Which rows they are depends
on the number of tokens and, roughly, on the window: heads with other settings have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kept import kept
from .rows import Part, attend_part, in_parts
from .sampling import some_rows
from .settings import Settings
from .window import Window

FITTED = ("conv", "lowrank")  # far fields with factors that sampled rows determine
# Rows for fits, rows for estimates and last rows that go over the keys of the last of them.
_WEIGHED, _ATTENDED, _LATEST = 16, 32, 64
_LONGEST_KEPT = 1 << 15  # tokens of a prompt whose masks are kept for the next head


class Looked(NamedTuple):
    """What sampled rows of R heads say."""

    begin: int
    """Rows are sampled from here on; those before are exact in any case."""
    fitted: Tensor
    """``(s,)`` rows for fits, increasing; none if no head needs them."""
    lse: Tensor
    """``(R, s)``, of the rows for fits; none if no key weights are wanted."""
    before: Tensor
    """``(R, n)``, weights of keys, summed over the rows for fits that have them before their window."""
    held: Tensor
    """``(e,)`` rows for estimates, increasing; none if there is no estimate."""
    exact: Tensor
    """``(R, e, d_v)``, attention of the rows for estimates."""
    last: Tensor
    """``(R, l, d_v)``, attention of the last rows."""

    def of(self, heads: slice) -> Looked:
        """Return what is said of some of the heads."""
        lse, before = self.lse[heads], self.before[heads]
        exact, last = self.exact[heads], self.last[heads]
        return Looked(self.begin, self.fitted, lse, before, self.held, exact, last)


class _Edge(NamedTuple):
    """Which keys count in each row of a part."""

    low: int
    """Keys that count in all rows, the first ones."""
    high: int
    """Keys that count in the last row."""
    counted: Tensor
    """``(s, high - low)``, 1 for what counts, 0 for what does not."""


def first_sampled(window: Window, n: int) -> int:
    """Return where the rows begin that heads sample: one of few places, at or before the first row that
    is not exact. At least half of all sampled rows are after that.
    """
    begin = window.begin
    found = max(edge for edge in (0, n // 8, n // 4) if edge <= begin)
    while 2 * begin >= n + found and n - found > 1:
        found = (n + found) // 2
    return found


def in_order(heads: list[int]) -> slice | list[int]:
    """Return what picks heads, in their order: a slice, without a copy, if they are evenly spaced."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if step < 1:
        return heads
    every = range(heads[0], heads[-1] + 1, step)
    return slice(every.start, every.stop, step) if heads == [*every] else heads


def rows_for_fits(window: Window, n: int, samples: int, seed: int) -> Tensor:
    """Return the rows from which a head of n tokens is fitted, one at least; nobody writes to them."""
    return some_rows(first_sampled(window, n), n, samples, 0, seed)


class Look:
    """How the sampled rows of R heads are looked at: jobs that do not depend on each other."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        settings: Sequence[Settings],
        scale: float,
        estimated: bool,
        last_rows: int,
    ) -> None:
        """Plan the jobs.

        Args:
            query: ``(R, n, d)``.
            key: ``(1, n, d)``.
            value: ``(1, n, d_v)``.
            settings: of each head; all sample from the same row on, equally many, with the same seed.
            scale: factor of the logits.
            estimated: whether errors are to be estimated.
            last_rows: whose attention is wanted too.

        Complexity: O((s + e) n (d + d_v)) time for each head, O(n) memory.
        """
        n = query.shape[1]
        samples, seed = settings[0].samples, settings[0].seed
        self._query, self._value = query, value
        self._begin = first_sampled(Window(settings[0].window, settings[0].shared), n)
        rows = _Rows(self._begin, n, samples, seed, query.dtype, query.device)
        kinds: dict[Window, list[int]] = {}
        for head, own in enumerate(settings):
            if own.columns or own.key_weights or own.far_field in FITTED:
                kinds.setdefault(Window(own.window, own.shared), []).append(head)
        self._kinds = [(in_order(heads), _edges(window, rows)) for window, heads in kinds.items()]
        self._fits = _parts(rows, "fitted") if kinds else []
        self._held = _parts(rows, "held") if estimated else []
        latest = _Rows(max(0, n - last_rows), n, 0, 0, query.dtype, query.device)
        self._last = _parts(latest, "last") if last_rows else []
        given = (query, key, value, scale)
        weighed = any(own.key_weights for own in settings)
        self.jobs: list[Callable[[], Any]] = [
            *(
                partial(_weigh, query, key, scale, part, self._kinds, at, weighed)
                for at, part in enumerate(self._fits)
            ),
            *(partial(_attend, *given, part) for part in (*self._held, *self._last)),
        ]
        """Functions without arguments."""

    def found(self, done: Sequence[Any]) -> Looked:
        """Return what the results of the jobs, in their order, say together."""
        fits, held = len(self._fits), len(self._held)
        query, heads = self._query, len(self._query)
        before = query.new_zeros((heads, query.shape[1] if fits else 0))
        for _, masses in done[:fits]:
            for (members, _), mass in zip(self._kinds, masses, strict=True):
                before[members, : mass.shape[-1]] += mass
        nothing = self._value.new_zeros((heads, 0, self._value.shape[-1]))
        return Looked(
            self._begin,
            _rows_of(self._fits, query.device),
            torch.cat([query.new_zeros((heads, 0)), *(lse for lse, _ in done[:fits])], dim=1),
            before,
            _rows_of(self._held, query.device),
            torch.cat([nothing, *done[fits : fits + held]], dim=1),
            torch.cat([nothing, *done[fits + held :]], dim=1),
        )


def _rows_of(parts: Sequence[Part], device: torch.device) -> Tensor:
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([nothing, *(part.rows for part in parts)])


class _Rows(NamedTuple):
    """Which rows are sampled, and what masks are made of."""

    begin: int
    n: int
    samples: int
    seed: int
    dtype: torch.dtype
    device: torch.device


def _make_parts(rows: _Rows, what: str) -> list[Part]:
    """Return the rows for fits or for estimates, one at least, or the last ones; nobody writes to what
    they hold."""
    if what == "last":
        own = torch.arange(rows.begin, rows.n, device=rows.device)
        return in_parts(own, _LATEST, rows.dtype)
    count, parity, size = {
        "fitted": (rows.samples, 0, _WEIGHED),
        "held": (2 * rows.samples, 1, _ATTENDED),
    }[what]
    own = some_rows(rows.begin, rows.n, count, parity, rows.seed)
    # Masks of long prompts are not kept, and an accelerator attends to few rows of a head slowly.
    masked = what == "held" and rows.device.type == "cpu" and rows.n <= _LONGEST_KEPT
    return in_parts(own.to(rows.device), size, rows.dtype, masked=masked)


def _make_edges(window: Window, rows: _Rows) -> list[_Edge]:
    """Return for each part of the rows for fits which keys count: those before the window."""
    found = []
    for part in _parts(rows, "fitted"):
        stops = window.first(part.rows).clamp(min=0)
        low, high = int(stops[0]), int(stops[-1])
        counted = (torch.arange(low, high, device=rows.device) < stops[:, None]).to(rows.dtype)
        found.append(_Edge(low, high, counted))
    return found


# Those of a prompt, for its heads and layers.
_kept_parts, _kept_edges = kept(8)(_make_parts), kept(12)(_make_edges)


def _parts(rows: _Rows, what: str) -> list[Part]:
    return (_kept_parts if rows.n <= _LONGEST_KEPT else _make_parts)(rows, what)


def _edges(window: Window, rows: _Rows) -> list[_Edge]:
    return (_kept_edges if rows.n <= _LONGEST_KEPT else _make_edges)(window, rows)


@torch.no_grad()
def _weigh(
    query: Tensor,
    key: Tensor,
    scale: float,
    part: Part,
    kinds: Sequence[tuple[slice | list[int], Sequence[_Edge]]],
    place: int,
    weighed: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the log-sum-exp ``(R, s)`` of some rows, ``(R, 0)`` if it is not wanted, and for each kind
    of head the weights of the keys ``(heads, ·)`` that count, summed over the rows.
    """
    own = (query[:, part.rows] * scale).flatten(0, 1)
    logits = (own @ key[0, : part.end].t()).unflatten(0, (len(query), -1))
    logits[..., part.common :] += part.hidden
    # The exponential by itself is very slow on processors where it is too small for the dtype.
    weights = logits.softmax(-1)
    lse = logits.amax(-1) - weights.amax(-1).log() if weighed else logits.new_empty((len(query), 0))
    total, found = weights.sum(1), []
    for members, edges in kinds:
        low, high, counted = edges[place]
        mass = total[members, :low]
        if low < high:
            rest = (weights[members, :, low:high] * counted).sum(1)
            mass = torch.cat([mass, rest], dim=1)
        found.append(mass)
    return lse, found


@torch.no_grad()
def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, part: Part) -> Tensor:
    """Return attention of some rows, ``(R, s, d_v)``."""
    return attend_part(query, key, value, scale, part)
