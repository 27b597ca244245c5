"""The scale of a map of numbers: linear or logarithmic, from its least to its greatest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SPREAD = 100.0
"""From this ratio of greatest to least on, a scale is logarithmic."""


@dataclass(frozen=True)
class Scale:
    """Where numbers lie between the lightest and the deepest colour."""

    low: float
    high: float
    log: bool

    def position(self, value: float) -> float:
        """Return 0 for low to 1 for high; what lies beneath a logarithmic scale is 0."""
        if self.log:
            if value <= self.low:
                return 0.0
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0

    def value(self, position: float) -> float:
        """Return the number at a position."""
        if self.log:
            return float(self.low * (self.high / self.low) ** position)
        return self.low + position * (self.high - self.low)


def scale_of(values: Sequence[float]) -> Scale:
    """Return a scale for these numbers: logarithmic if none is negative and the others spread far."""
    if not values:
        return Scale(0.0, 0.0, log=False)
    low, high = min(values), max(values)
    positive = [value for value in values if value > 0]
    if low >= 0 and positive and high >= _SPREAD * min(positive):
        return Scale(min(positive), high, log=True)
    return Scale(low, high, log=False)
