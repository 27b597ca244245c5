"""All heads of a batch, in pieces of work, and what is known about the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..workers import run_all, watched
from ..workspace import take
from .estimate import Judged, bound_of
from .exact import attend_exactly
from .group import Group, attend_group, no_estimate, nothing
from .joined import joined
from .look import FITTED, Look, Looked, first_sampled, in_order
from .running import Running, at_the_start
from .settings import Settings
from .strict import attend_strictly
from .window import Window

_TOGETHER = 4  # heads of one piece of work on a processor, at most
_OF_HEADS = ("output", "lse", "mean", "bound")  # what a group knows of each of its heads


class HybridDispatch(NamedTuple):
    """What one call computed."""

    parts: tuple[str, ...]
    """Names of the parts that were merged, in any sequence."""
    keys_per_query: float
    """Keys with exact logits, in the mean over queries; segments count one each."""
    sampled_rows: int
    """Rows of exact attention, for fits and estimate together, in the longest sequence."""


class HybridStats(NamedTuple):
    """Attention output with what is known about it."""

    output: Tensor
    """``(B, H, n, d_v)``, dtype of the query."""
    lse: Tensor
    """``(B, H, n)`` natural log of the normaliser, of the keys that count; -inf at padding."""
    error_estimate: Tensor
    """``(B, H)`` float64, upper bound at 95 % confidence of the relative error of a head's output
    against exact attention, in the Euclidean norm; 0 where everything is exact. Where one row in
    twenty may be off by more than half of its norm, it is at least as large as that. Errors of fewer
    rows may go unseen. In a chunk it is about the latest rows, see `HybridState`."""
    dispatch: HybridDispatch
    """What ran."""
    error_mean: Tensor
    """``(B, H)`` float64, the estimate itself."""


class Together(NamedTuple):
    """Heads of one sequence that share keys: one piece of work."""

    sequence: int
    """Its number in the batch."""
    heads: list[int]
    """Numbers of query heads."""
    settings: tuple[Settings, ...]
    """What each of them computes, all the same unless choices are strict; none for exact attention, of
    which nothing is recorded."""

    @property
    def strict(self) -> bool:
        """Whether choices are strict."""
        return bool(self.settings) and self.settings[0].strict


def attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Settings,
    scale: float,
    mask: Tensor | None,
    estimated: bool,
    running: Sequence[Running | None] | None = None,
) -> tuple[HybridStats, list[Running | None]]:
    """Attend with all heads of all sequences by the same settings.

    Args:
        query: ``(B, H, m, d)``, of the last m tokens.
        key: ``(B, H_kv, n, d)``.
        value: ``(B, H_kv, n, d_v)``.
        settings: what to compute.
        scale: factor of the logits.
        mask: ``(B, n)`` of real tokens, for m = n; None for all.
        estimated: whether to estimate errors.
        running: what strict choices are made from, as returned for the tokens before; None at first.

    Returns:
        the attention, and what the choices of later tokens are made from, None unless strict.
    """
    batch, heads = query.shape[:2]
    own = [settings] * heads
    pieces = [piece for b in range(batch) for piece in pieces_of_work(query, key, b, own)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    into = None if recorded else query.new_empty((*query.shape[:3], value.shape[-1]))
    groups, after = attend_pieces(query, key, value, pieces, scale, mask, estimated, running, into)
    output, lse, mean, bound = (
        joined(parts) for parts in ([getattr(group, name) for group in groups] for name in _OF_HEADS)
    )
    ran = [group for group in groups if group.parts]
    dispatch = HybridDispatch(
        tuple(dict.fromkeys(part for group in ran for part in group.parts)),
        sum(group.keys * len(group.lse) for group in ran)
        / max(1, sum(len(group.lse) for group in ran)),
        max((group.rows for group in ran), default=0),
    )
    of_batch = (batch, heads)
    stats = HybridStats(
        output.unflatten(0, of_batch) if into is None else into,
        lse.unflatten(0, of_batch),
        bound.view(of_batch),
        dispatch,
        mean.view(of_batch),
    )
    return stats, after


def pieces_of_work(
    query: Tensor, key: Tensor, sequence: int, settings: Sequence[Settings | None]
) -> list[Together]:
    """Return the heads of a sequence, each with what shares its work; those without settings left out.

    Heads that share keys and settings are one piece. On a processor these are few heads, so that there
    is a piece for each thread, and one head where a far field holds numbers for each of its keys and
    samples. Where choices are strict all heads that share keys are: they share their sampled rows, and
    what is known of them stays together from chunk to chunk.
    """
    sharing = query.shape[1] // key.shape[1]
    few = max(1, min(_TOGETHER, sum(map(bool, settings)) // torch.get_num_threads()))
    alike: dict[tuple[Any, ...], list[int]] = {}
    for head, own in enumerate(settings):
        if own is not None:
            kind = (own.samples, own.seed) if own.strict else own
            alike.setdefault((head // sharing, kind), []).append(head)
    found: list[Together] = []
    for heads in alike.values():
        own = settings[heads[0]]
        most = sharing
        if own is not None and not own.strict and query.device.type == "cpu":
            most = 1 if own.far_field in FITTED else few
        parts = (heads[low : low + most] for low in range(0, len(heads), most))
        found.extend(
            Together(sequence, part, tuple(each for head in part if (each := settings[head])))
            for part in parts
        )
    return found


def attend_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Sequence[Together],
    scale: float,
    mask: Tensor | None,
    estimated: bool,
    running: Sequence[Running | None] | None = None,
    into: Tensor | None = None,
    last_rows: int = 0,
    tolerance: float | None = None,
) -> tuple[list[Group], list[Running | None]]:
    """Return the attention of each piece of work; those of a sequence run at the same time, in this
    order, one sequence after the other.

    Other arguments, and what is returned beside, are those of `attend_heads`. Outputs are written to
    `into` ``(B, H, m, d_v)``, where it is given and no gradient is recorded. The last `last_rows` real
    tokens of each sequence are exact, unless choices are strict. With a `tolerance`, heads whose bound
    exceeds it are attended to again, exactly, and that is what is in `into` then, which must be given,
    for tensors that `serves_exactly` accepts; what is returned of these heads stays.

    Returns:
        for each piece output ``(R, m, d_v)`` in the dtype of the query, none where it is written
        elsewhere, and lse ``(R, m)``; 0 and -inf at padding.
    """
    found: dict[int, tuple[Group, Running | None]] = {}
    for b in sorted({piece.sequence for piece in pieces}):
        numbers = [number for number, piece in enumerate(pieces) if piece.sequence == b]
        sequence = _Sequence(
            query[b],
            key[b],
            value[b],
            scale,
            None if mask is None else _real(mask[b]),
            estimated,
            last_rows,
            None if into is None else into[b],
            tolerance,
        )
        before = [None if running is None else running[number] for number in numbers]
        with torch.autocast(query.device.type, enabled=False):
            done = sequence.attend([pieces[number] for number in numbers], before)
        for number, each in zip(numbers, done, strict=True):
            found[number] = each
    in_order = [found[number] for number in range(len(pieces))]
    return [group for group, _ in in_order], [after for _, after in in_order]


@dataclass
class _Sequence:
    """The heads of one sequence: first what their sampled rows say, then each piece of work."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    real: Tensor | None
    estimated: bool
    last_rows: int
    into: Tensor | None
    tolerance: float | None

    def attend(
        self, pieces: Sequence[Together], running: Sequence[Running | None]
    ) -> list[tuple[Group, Running | None]]:
        """Return the attention of each piece, and what strict choices go on from."""
        tensors = (self.query, self.key, self.value)
        keys, values = self._own("key", self.key), self._own("value", self.value)
        queries = self._own("query", self.query)
        sharing = len(queries) // len(keys)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, piece in enumerate(pieces):
            if not piece.settings or piece.strict:
                continue
            own = piece.settings[0]
            window = Window(own.window, own.shared)
            if window.begin < queries.shape[1]:
                begin = first_sampled(window, queries.shape[1])
                kind = (piece.heads[0] // sharing, begin, own.samples, own.seed)
                alike.setdefault(kind, []).append(number)
        for numbers in alike.values():  # heads that follow each other are looked at without a copy
            numbers.sort(key=lambda number: pieces[number].heads)
        looks = [
            Look(
                queries[in_order([head for number in numbers for head in pieces[number].heads])],
                keys[kind[0], None],
                values[kind[0], None],
                [own for number in numbers for own in pieces[number].settings],
                self.scale,
                self.estimated,
                self.last_rows,
            )
            for kind, numbers in alike.items()
        ]
        jobs = [job for look in looks for job in look.jobs]
        done = iter(run_all(jobs[::-1], tensors)[::-1])  # of each look the dearest first
        told = {}
        for look, numbers in zip(looks, alike.values(), strict=True):
            found, low = look.found([next(done) for _ in look.jobs]), 0
            for number in numbers:
                members = slice(low, low + len(pieces[number].heads))
                told[number], low = found.of(members), members.stop

        def attend(
            piece: Together, looked: Looked | None = None, running: Running | None = None
        ) -> tuple[Group, Running | None]:
            of_keys = piece.heads[0] // sharing
            known = keys[of_keys, None], values[of_keys, None]
            return self._attend(piece, queries[in_order(piece.heads)], known, looked, running)

        given = ((piece, told.get(number), running[number]) for number, piece in enumerate(pieces))
        groups = run_all([partial(attend, *each) for each in given], tensors)
        groups = self._judge(pieces, groups)
        run_all([partial(attend, piece) for piece in self._again(pieces, groups)], tensors)
        return groups

    @torch.no_grad()
    def _judge(
        self, pieces: Sequence[Together], groups: list[tuple[Group, Running | None]]
    ) -> list[tuple[Group, Running | None]]:
        """Return the groups of the pieces with the estimates of their errors: heads of which equally
        many rows were looked at are judged at once."""
        alike: dict[int, list[tuple[int, Judged]]] = {}
        for number, (group, _) in enumerate(groups):
            if group.judged is not None:
                alike.setdefault(group.judged.errors.shape[1], []).append((number, group.judged))
        for own in alike.values():
            found = bound_of(Judged.joined([judged for _, judged in own]))
            counts = [len(pieces[number].heads) for number, _ in own]
            parts = (x.split(counts) for x in found)
            for (number, _), mean, bound in zip(own, *parts, strict=True):
                group, after = groups[number]
                groups[number] = group._replace(mean=mean, bound=bound, judged=None), after
        return groups

    def _again(
        self, pieces: Sequence[Together], groups: Sequence[tuple[Group, Running | None]]
    ) -> list[Together]:
        """Return the heads that are to be exact after all."""
        if self.tolerance is None:
            return []
        return [
            Together(piece.sequence, [head], ())
            for piece, (group, _) in zip(pieces, groups, strict=True)
            for head, bound in zip(piece.heads, group.bound.tolist(), strict=True)
            if piece.settings and not bound <= self.tolerance
        ]

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """Return real tokens ``(H, n, ·)``: a model's heads lie between each other's, and after one
        copy all that follows is faster."""
        work = compute_dtype(tensor.dtype)
        if self.real is None and tensor.is_contiguous() and tensor.dtype == work:
            return tensor
        chosen = tensor if self.real is None else tensor.index_select(1, self.real)
        if self._must_stay():
            return chosen.to(work).contiguous()
        return take(f"hybrid {name}", chosen.shape, work, chosen.device).copy_(chosen)

    def _must_stay(self) -> bool:
        """Whether copies are wanted later: graphs keep them, and what watches operators may."""
        tensors = (self.query, self.key, self.value)
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return recorded or torch.compiler.is_compiling() or watched()

    def _attend(
        self,
        piece: Together,
        query: Tensor,
        known: tuple[Tensor, Tensor],
        looked: Looked | None,
        running: Running | None,
    ) -> tuple[Group, Running | None]:
        members = in_order(piece.heads)
        # Without a detour where rows go as they are.
        room = self.into[members] if self.into is not None and isinstance(members, slice) else None
        if room is not None and (self.real is not None or room.dtype != query.dtype):
            room = None
        after = None
        if not query.shape[1]:
            found = nothing(query, known[1])
        elif not piece.settings:
            exactly = attend_exactly(query, *known, self.scale, room)
            found = Group(*exactly, *no_estimate(query), (), 0.0, 0)
        elif not piece.strict:
            found = attend_group(
                query,
                *known,
                piece.settings[0],
                self.scale,
                looked,
                self.estimated,
                self.last_rows,
                room,
            )
        else:
            so_far = at_the_start(query) if running is None else running
            found, after = attend_strictly(
                query, *known, piece.settings, self.scale, self.estimated, so_far, room
            )
        if room is not None:
            return found._replace(output=found.output[:0]), after
        output, lse = found.output.to(self.query.dtype), found.lse
        if self.real is not None:
            output, lse = (
                part.new_full((len(part), self.query.shape[1], *part.shape[2:]), padding).index_copy(
                    1, self.real, part
                )
                for part, padding in ((output, 0.0), (lse, -torch.inf))
            )
        if self.into is not None:
            self.into[members] = output
        return found._replace(output=output if self.into is None else output[:0], lse=lse), after


def _real(row: Tensor) -> Tensor | None:
    """Return the positions of real tokens, None if all are."""
    return None if bool(row.all()) else row.nonzero()[:, 0]
