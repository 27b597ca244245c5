"""Lengths for which a fast Fourier transform is fast."""

from __future__ import annotations

_ODD_FACTORS = (1, 3, 5, 7, 9, 15)


def fast_length(minimum: int) -> int:
    """Return the smallest m·2^a >= minimum with m in {1, 3, 5, 7, 9, 15}.

    A transform of prime length costs about 11 to 16 times one of these. Lengths above 2 are even,
    as real transforms want them.

    >>> [fast_length(n) for n in (1, 2, 11, 97, 1000, 4099)]
    [1, 2, 12, 112, 1024, 4608]
    """
    if minimum <= 2:
        return max(minimum, 1)
    return min(odd << max(1, (-(-minimum // odd) - 1).bit_length()) for odd in _ODD_FACTORS)
