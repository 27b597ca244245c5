"""Segments that depend on the position alone, so that a longer sequence keeps those it had."""

from __future__ import annotations

import functools
import math

from ..checks import check_nonnegative, check_positive_int


def segment_starts(n: int, segment_length: int, growth: float = 0.0) -> list[int]:
    """Return the first tokens of the segments of a sequence.

    A segment that begins at token s has ``max(segment_length, floor(growth · sqrt(s)))`` tokens.
    Without growth their number is n / segment_length, and attention costs O(n^2 d / segment_length);
    with it the number is about 2 sqrt(n) / growth, and attention costs O(n^1.5 d / growth).

    Args:
        n: tokens.
        segment_length: the least length of a segment, in tokens.
        growth: tokens by which it grows, for each unit of the square root of the position.

    Returns:
        ascending starts, the first one 0; those of a longer sequence begin with the same.

    Raises:
        InputError: (a ValueError) an argument that is no such number.

    Source:
        Ours, beyond the paper; docs/training.md.

    Example:
        >>> import convbasis as cb
        >>> cb.nn.segment_starts(20, 4, growth=2.0)
        [0, 4, 8, 13]
    """
    check_positive_int("n", n, "a number of tokens")
    length = check_positive_int("segment_length", segment_length, "a number of tokens")
    return list(_starts(int(n), length, check_nonnegative("growth", growth)))


@functools.lru_cache(maxsize=256)
def _starts(n: int, length: int, growth: float) -> tuple[int, ...]:
    if growth == 0.0:
        return tuple(range(0, n, length))
    starts, start = [], 0
    while start < n:
        starts.append(start)
        start += max(length, math.floor(growth * math.sqrt(start)))
    return tuple(starts)
