"""What a call over ranks costs the busiest rank: bytes that it sends, operations, memory; and when.

Bytes follow from the shapes alone. Operations are those of the partition that takes the fewest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..convolve.choice import Work, candidates, partitioned_amounts
from ..hybrid.window import BLOCK, Window
from .halo import halo_begin
from .ranks import HEADER_BYTES
from .shares import Piece, Sizes, length_of, shares, whole_heads

TRANSFORM = 2.5  # operations of a real transform, for each entry and binary digit of its length
COMPLEX = 8.0  # of a complex multiplication and addition
_BACKWARD = 3.0  # products that the gradients take, as in attention/cost.py
_EXACT_BACKWARD = 2.5  # of exact attention, whose logits are made once more
FIELD = 8  # bytes of an integer


class Load(NamedTuple):
    """Of the busiest rank."""

    sent_forward: int
    """Bytes to other ranks."""
    sent_backward: int
    """Bytes to other ranks."""
    operations: float
    """Floating-point operations forward."""
    numbers: int
    """Of inputs, output and what is held over all tokens; exchanges hold twice as many for a moment."""
    backward: float = _BACKWARD
    """How many times the operations forward the backward pass takes."""


class Machine(NamedTuple):
    """Assumptions about a rank."""

    operations: float
    """That it does in a second, in such work."""
    bytes: float
    """That it sends in a second while others do too."""
    latency: float = 20e-6
    """Seconds of an exchange of nothing."""

    def seconds(self, load: Load, *, backward: bool, exchanges: int = 3) -> tuple[float, float]:
        """Return the time of a call: one after the other, and with exchanges hidden behind work.

        Args:
            load: see `attention_load`.
            backward: with the backward pass.
            exchanges: for each direction.
        """
        factor = 1.0 + load.backward if backward else 1.0
        sent = load.sent_forward + (load.sent_backward if backward else 0)
        working = load.operations * factor / self.operations
        moving = sent / self.bytes + self.latency * exchanges * (2 if backward else 1)
        return working + moving, max(working, moving)


def attention_load(
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
    layout: str = "auto",
    exchange: str = "auto",
) -> Load:
    """Return what `convbasis.distributed.conv_basis_attention` costs the busiest rank.

    Args:
        n: tokens, spread evenly.
        ranks: number of processes.
        heads: query heads.
        head_dim: of queries and keys.
        segments: uniform ones, of each head.
        kv_heads: heads by default.
        value_dim: head_dim by default.
        batch: sequences.
        itemsize: bytes of a number.
        layout: see there, as exchange.
        exchange: with ``"auto"`` the dtype is taken for no half type.

    Complexity: O(heads + ranks²) time.
    """
    kv_heads, width = kv_heads or heads, value_dim or head_dim
    lengths = [n * (rank + 1) // ranks - n * rank // ranks for rank in range(ranks)]
    sizes = Sizes(heads, kv_heads, width)
    pieces = shares(layout, sizes, ranks)
    few = segments <= head_dim and not whole_heads(layout, sizes, ranks)
    by_segment = few if exchange == "auto" else exchange == "logits"

    def wanted(own: list[Piece]) -> int:
        """Return the numbers of each token that a rank needs."""
        found = 0
        for piece in own:
            kept = length_of(piece.kv_heads)
            logits = segments * length_of(piece.heads) if by_segment else 0
            keys = 0 if by_segment else head_dim * (length_of(piece.heads) + kept)
            found += logits + keys + kept * length_of(piece.columns)
        return found

    def made(own: list[Piece]) -> int:
        """Return the numbers of each token that a rank computes."""
        return sum(length_of(piece.heads) * length_of(piece.columns) for piece in own)

    needs, makes = [wanted(own) for own in pieces], [made(own) for own in pieces]
    first = kv_heads * head_dim * -(-segments // ranks) * (ranks - 1) if by_segment else 0
    inner = segments if by_segment else head_dim
    own_tokens = heads * (head_dim + width) + kv_heads * (head_dim + width)
    loads = []
    for rank, length in enumerate(lengths):
        others = [other for other in range(ranks) if other != rank]
        elsewhere = sum(lengths[other] for other in others)
        forward = length * sum(needs[other] for other in others) + elsewhere * makes[rank] + first
        backward = length * sum(makes[other] for other in others) + elsewhere * needs[rank] + first
        loads.append(
            Load(
                batch * itemsize * forward + told_to_others(ranks, 4 if by_segment else 3),
                batch * itemsize * backward + headers(ranks, 3 if by_segment else 2),
                batch * sum(_operations(n, piece, inner, segments) for piece in pieces[rank]),
                batch * (length * own_tokens + n * (needs[rank] + makes[rank])),
            )
        )
    return Load(*(max(column) for column in zip(*loads, strict=True)))


def hybrid_load(
    n: int,
    ranks: int,
    *,
    heads: int,
    head_dim: int,
    window: int,
    columns: int,
    kv_heads: int | None = None,
    sinks: int = 4,
    samples: int = 64,
    batch: int = 1,
    itemsize: int = 4,
) -> Load:
    """Return what `convbasis.distributed.hybrid_attention` with ``layout="tokens"`` costs a rank.

    Args:
        n: tokens, spread evenly, more of them in a rank than the window has.
        ranks: number of processes.
        heads: query heads.
        head_dim: of queries, keys and values.
        window: tokens.
        columns: of each head.
        kv_heads: heads by default.
        sinks: first tokens.
        samples: rows.
        batch: sequences.
        itemsize: bytes of a number.
    """
    kv_heads = kv_heads or heads
    others, length = ranks - 1, -(-n // ranks)
    shape = Window(window, BLOCK if columns else 1)
    firsts = [n * rank // ranks for rank in range(ranks)]
    halo = max(first - halo_begin(first, shape) for first in firsts) * kv_heads * 2 * head_dim
    # All columns may be of one rank; those that it has go to all others.
    distant = (sinks + columns) * heads * 2 * head_dim * min(1, others)
    weighing = heads * (samples * (1 + head_dim / ranks) + columns) * others
    numbers = itemsize * (halo + distant * others + weighing) + FIELD * heads * columns * others
    keys = window + sinks + columns
    work = 4.0 * length * heads * keys * head_dim + 4.0 * samples * length * heads * head_dim
    held = length * 2 * (heads + kv_heads) * head_dim + halo
    return Load(
        int(batch * numbers) + told_to_others(ranks, 7),
        batch * itemsize * (halo + distant) + headers(ranks, 2),
        batch * work,
        batch * held,
        _EXACT_BACKWARD,
    )


def ring_load(
    n: int,
    ranks: int,
    *,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    batch: int = 1,
    itemsize: int = 4,
) -> Load:
    """Return what exact causal attention in a ring costs a rank, its work dealt out evenly.

    Every rank sends keys and values, and in the backward pass their gradients too, ranks - 1 times.

    Source:
        Ring attention (arXiv 2310.01889).
    """
    kv_heads = kv_heads or heads
    length = -(-n // ranks)
    sent = batch * itemsize * (ranks - 1) * length * kv_heads * 2 * head_dim
    operations = batch * 2.0 * n * n * head_dim * heads / ranks
    held = batch * length * 4 * (heads + kv_heads) * head_dim
    return Load(sent, 2 * sent, operations, held, _EXACT_BACKWARD)


def headers(ranks: int, exchanges: int) -> int:
    """Return the bytes that a rank sends before what it exchanges, so that all know what comes."""
    return exchanges * HEADER_BYTES * (ranks - 1)


def told_to_others(ranks: int, exchanges: int) -> int:
    """Return those of the handshake, which is one of the exchanges, and of the headers of all."""
    return headers(ranks, exchanges) + 4 * FIELD * (ranks - 1)


def _operations(n: int, piece: Piece, inner: int, segments: int) -> float:
    """Return those of one piece: of the partition that takes the fewest."""
    longest = -(-n // segments)
    columns = length_of(piece.columns) + 1
    work = Work(n, segments, columns, inner, longest, length_of(piece.heads), torch.float32)
    found = []
    for sizes in candidates(work):
        amounts = partitioned_amounts(work, sizes)
        found.append(amounts.flops + TRANSFORM * amounts.transformed + COMPLEX * amounts.summed)
    return min(found)
