"""Which backend computes a product, by a small model of its cost.

The time of a backend is modelled as a sum of amounts of work times seconds per unit: entries times
logarithm that are transformed, complex entries that are turned, floating-point operations of matrix
products, entries that are passed over, sums, matrices multiplied, chunks of work, and calls. They
follow from the shapes alone; the seconds per unit are constants of a machine, built in or fitted by
``convbasis tune``. The same shapes always get the same choice.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ..dispatch import check_backend
from .lengths import fast_length
from .partition import Sizes
from .rates import Rates, rates
from .spectra import FEW_PIECES, column_step, group_blocks

DEFAULT_MAX_BYTES = 1 << 30
"""Working memory of the transforms, in bytes, where the caller names none."""

_LARGEST_TRANSFORM = 1 << 18
# The part of a first block's rows that drown beside its last ones, where values are of a size; they are
# evaluated one by one, in float64, at the cost of so many entries laid out.
_LOST = 0.036
_LOST_COST = 7.0
_CHUNK = 1 << 17  # entries that are transformed at a time
_DIRECT_BLOCK = 1 << 18  # entries that direct evaluation lays out at a time
_CACHED = 1 << 20  # entries that the processor's caches hold
_CACHED_ROW = 1 << 15  # entries of one transform that the processor's own cache holds


class Work(NamedTuple):
    """What is to be computed."""

    n: int
    """Tokens."""
    k: int
    """Segments."""
    columns: int
    """Columns of x."""
    d: int
    """Head dimension that kernels are made from; 0 where they are given."""
    longest: int
    """Tokens of the longest segment."""
    heads: int
    """Matrices."""
    dtype: torch.dtype
    """To work in."""
    device: str = "cpu"
    """Type of the device."""


class Choice(NamedTuple):
    """What computes it."""

    backend: str
    reason: str
    sizes: Sizes | None = None


def choose(backend: str, work: Work) -> Choice:
    """Return what runs: the backend asked for, or the one with the least modelled time.

    Args:
        backend: one of `BACKENDS`.
        work: what is to be computed.

    Raises:
        InputError: the backend is not known.
    """
    check_backend(backend)
    if backend in ("reference", "direct", "fft"):
        return Choice(backend, "requested")
    return _least(backend, work, rates(work.device, torch.get_num_threads()))


class Times(NamedTuple):
    """Modelled seconds of the best partition, and of direct evaluation."""

    partitioned: float
    direct: float
    sizes: Sizes


@functools.lru_cache(maxsize=1024)
def _times(work: Work, table: Rates) -> Times:
    partitioned, sizes = min(
        ((cost(partitioned_amounts(work, sizes), table), sizes) for sizes in candidates(work)),
        key=lambda pair: pair[0],
    )
    return Times(partitioned, cost(direct_amounts(work), table), sizes)


def least_partition(work: Work) -> Times:
    """Return the best partition for a product, its modelled time, and that of direct evaluation."""
    return _times(work, rates(work.device, torch.get_num_threads()))


@functools.lru_cache(maxsize=1024)
def _least(backend: str, work: Work, table: Rates) -> Choice:
    """Return the choice between partitions and, for ``"auto"``, backends: the least modelled time."""
    seconds, direct, sizes = _times(work, table)
    chosen = f"pieces of {sizes.piece}, transforms of {sizes.transform}"
    if backend == "partitioned":
        return Choice(backend, f"requested; {chosen}", sizes)
    others = {
        "direct": direct,
        "fft": cost(fft_amounts(work), table),
    }
    best = min(others, key=lambda name: others[name])
    about = f"n = {work.n}, k = {work.k}"
    if others[best] < seconds:
        return Choice(best, f"least modelled time for {about}")
    return Choice("partitioned", f"least modelled time for {about}; {chosen}", sizes)


def candidates(work: Work) -> list[Sizes]:
    """Return the partitions that are worth a look; at least one."""
    found: list[Sizes] = []
    length = 32
    while True:
        for transform in (length, length // 2 * 3):
            piece = min(work.longest, transform // 2)
            sizes = Sizes(max(1, piece), transform)
            # Segments of several pieces want blocks as long as pieces. A block that is much of the
            # sequence would lose too large a part of its rows.
            fits = piece == work.longest or transform == length
            if fits and (not found or 4 * sizes.block <= work.n):
                found.append(sizes)
        if length >= min(_LARGEST_TRANSFORM, 4 * work.n):
            return found
        length *= 2


class Amounts(NamedTuple):
    """Amounts of work of one call."""

    transformed: float
    """Entries times the logarithm to base 2 of the length."""
    turned: float
    """Complex entries copied with their order changed."""
    flops: float
    """Floating-point operations of matrix products."""
    passed: float
    """Entries read and written once."""
    matrices: float
    """Small matrices multiplied."""
    chunks: float
    """Pieces of work, some operations each."""
    calls: float
    """Heads: what each costs whatever its size."""
    laid: float
    """Entries of matrices laid out."""
    summed: float
    """Complex entries multiplied and added one by one."""
    streamed: float
    """Entries read and written once that are too many for the caches."""

    def of_heads(self, heads: int) -> Amounts:
        """Return the work of so many heads."""
        return Amounts(*(heads * amount for amount in self))


def cost(amounts: Amounts, table: Rates) -> float:
    """Return the modelled seconds."""
    return sum(amount * rate for amount, rate in zip(amounts, table, strict=True))


def partitioned_amounts(work: Work, sizes: Sizes) -> Amounts:
    """Return the work of partitioned convolution."""
    n, k, c, d = work.n, max(1, work.k), max(1, work.columns), work.d
    blocks = -(-n // sizes.block)
    levels = max(1, -(-work.longest // sizes.piece))
    pieces = k if levels == 1 else min(k * levels, n // sizes.piece + k)
    item = work.dtype.itemsize
    parts = -(-c // column_step(pieces, sizes.bins, c, item, DEFAULT_MAX_BYTES))
    visible = (pieces + 1) / 2
    kept = 2 * item * sizes.bins * blocks * visible <= DEFAULT_MAX_BYTES // 2
    # Windows whose spectra are too many to be kept are made again for each part of the columns.
    again = 1 if kept else parts
    windows = again * blocks * (k + 1) / 2
    rows = (pieces + blocks) * c
    group = group_blocks(2 * item * sizes.bins * max(-(-c // parts), int(visible)), turned=True)
    group = min(blocks, group)
    share = min(1.0, 0.5 + 0.5 * group / blocks)  # of the matrix that is not above the diagonal
    length = sizes.transform
    chunks = (max(1.0, pieces * c * length / _CHUNK) if c * length < _CHUNK else pieces) + sum(
        math.ceil(blocks / max(1.0, size // (width * length)))
        for size, width in ((2 * _CHUNK, visible), (_CHUNK, c))
    )
    gathered = 0.0 if levels == 1 else again * blocks * visible
    few = pieces <= FEW_PIECES
    multiplied = sizes.bins * blocks * c * pieces
    far = 1.0 + 0.25 * max(0.0, math.log2(length / _CACHED_ROW))
    read_again = blocks / group * visible * sizes.bins * c  # the pieces, for each group of blocks
    if few:
        share = 0.5 * (1 + 1 / blocks)
    return Amounts(
        (rows + windows) * length * math.log2(length),
        sizes.bins * (2 * gathered if few else rows + windows + 6 * gathered),
        (0.0 if few else 8.0 * multiplied * share) + again * n * d * (k + 1),
        (2 * rows + 2 * windows) * length * far + 3 * n * c + (0.0 if few else read_again),
        0.0 if few else sizes.bins * blocks / group,
        chunks + (blocks if levels > 1 else 0),
        1.0,
        _LOST_COST * (_LOST * sizes.block) ** 2 / 2 if d else 0.0,
        multiplied * share if few else 0.0,
        0.0,
    ).of_heads(work.heads)


def direct_amounts(work: Work) -> Amounts:
    """Return the work of direct evaluation."""
    n, c = work.n, work.columns
    step = max(1.0, min(n, _DIRECT_BLOCK / n))
    entries = n * (n + step) / 2
    blocks = math.ceil(n / step)
    one = Amounts(
        0.0,
        0.0,
        2.0 * entries * c + 2.0 * work.k * n * work.d,
        6.0 * work.k * n,
        0.0,
        0.5 * blocks,
        0.5,
        entries,
        0.0,
        0.0,
    )
    return one.of_heads(work.heads)


def fft_amounts(work: Work) -> Amounts:
    """Return the work of one transform of full length per segment."""
    n, k, c = work.n, work.k, work.columns
    length = fast_length(n + work.longest)
    rows = k * c + c + k
    return Amounts(
        rows * length * math.log2(length),
        rows * length / 2,
        2.0 * n * work.d * k,
        6.0 * k * n * math.log2(n + 1) if work.d else 0.0,  # the normaliser
        0.0,
        40.0 + 4.0 * k,
        1.0,
        0.0,
        0.0,
        3.0 * rows * length * min(1.0, c * length / _CACHED),
    ).of_heads(work.heads)
