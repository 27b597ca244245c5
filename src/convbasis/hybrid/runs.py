"""Values that follow each other and are equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def runs(values: Sequence[T]) -> list[tuple[slice, T]]:
    """Return values that follow each other and are equal, each with where it stands."""
    found: list[tuple[slice, T]] = []
    for place, value in enumerate(values):
        if found and found[-1][1] == value:
            found[-1] = slice(found[-1][0].start, place + 1), value
        else:
            found.append((slice(place, place + 1), value))
    return found
