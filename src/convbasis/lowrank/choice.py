"""Which degree, and in how many coordinates: the fewest features that keep a tolerance."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .features import feature_count, truncation_error

_LARGEST_DEGREE = 40


class Choice(NamedTuple):
    """What is computed, and how wrong it may be."""

    degree: int
    """Of the polynomial."""
    rank: int
    """Coordinates of queries and keys that are kept."""
    error: float
    """Bound of a row's error, relative to the largest norm of a value."""


def output_error(bound: float, rest: float, degree: int, eps: float) -> float:
    """Return how wrong a row may be, relative to the largest norm of a value.

    Every weight is off by a factor between ``(1 - t) e^-rest`` and ``(1 + t) e^rest``, so that the
    normalised weights are off by tanh((atanh t + rest) / 2) in total variation (F6). In t is what the
    polynomial leaves out, and rounding: terms as large as ``e^bound`` cancel to ``e^-bound``.

    Args:
        bound: of the absolute logits that the polynomial is given.
        rest: of those that are left out.
        degree: of the polynomial.
        eps: of the dtype that is computed in.
    """
    relative = truncation_error(bound, degree) + rounding_error(bound, eps)
    if relative >= 1.0:
        return math.inf
    return 2.0 * math.tanh((math.atanh(relative) + rest) / 2.0)


def rounding_error(bound: float, eps: float) -> float:
    """Return how wrong rounding makes a weight of exp(-bound), relative to it."""
    return eps * math.exp(2.0 * bound) if bound < 350.0 else math.inf


def bounds(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[tuple[float, float]]:
    """Return, for each number of coordinates, the bounds of the logits kept and left out.

    Args:
        query: `largest_norms` of the queries.
        key: of the keys.
    """
    kept, left = ((x * y).flatten(0, -2).amax(0).tolist() for x, y in zip(query, key, strict=True))
    return list(zip(kept, left, strict=True))


def least_features(
    found: list[tuple[float, float]],
    tolerance: float,
    most: int,
    only: int | None,
    dtype: torch.dtype,
    where: str,
) -> Choice:
    """Return the choice with the fewest features that keeps the tolerance.

    Args:
        found: from `bounds`.
        tolerance: largest `output_error`.
        most: the largest number of features.
        only: the number of coordinates to keep; None for any.
        dtype: that is computed in.
        where: names the alternatives in a refusal.

    Raises:
        InputError: none does.
    """
    eps = torch.finfo(dtype).eps
    best: tuple[int, Choice] | None = None
    for rank, (bound, rest) in enumerate(found, start=1):
        if only not in (None, rank):
            continue
        for degree in range(2, _LARGEST_DEGREE + 1, 2):
            count = feature_count(rank, degree)
            if count > (most if best is None else best[0] - 1):
                break
            error = output_error(bound, rest, degree, eps)
            if error <= tolerance:
                best = count, Choice(degree, rank, error)
                break
    if best is None:
        head_dim, largest = only or len(found), found[-1][0]
        degrees = (g for g in range(2, 400, 2) if output_error(largest, 0.0, g, 0.0) <= tolerance)
        wanted = next(degrees, None)
        needs = (
            "no degree below 400 is enough"
            if wanted is None
            else f"degree {wanted} and {feature_count(head_dim, wanted):.3g} features would be needed"
        )
        if rounding_error(largest, eps) > tolerance:
            needs += f", and more digits than {dtype} has"
        raise InputError(
            f"the logits may be as large as {largest:.3g} in absolute value (norms of queries times "
            f"norms of keys, scaled): for tolerance {tolerance:g} in {head_dim} dimensions {needs}, "
            f"max_features={most}; low-rank attention is for small logits: {where}"
        )
    return best[1]
