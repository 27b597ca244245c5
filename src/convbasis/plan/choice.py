"""Which setting of a ladder each head gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .ladder import Measured
from .plan import HeadPlan
from .settings import HeadSetting


def choose(
    measured: Sequence[Sequence[Measured]],
    costs: Sequence[float],
    ladder: Sequence[HeadSetting],
    tolerance: float,
) -> tuple[tuple[HeadPlan, ...], ...]:
    """Return for every head the cheapest setting whose error is within the tolerance on every text.

    Args:
        measured: for each text, for each layer.
        costs: of each setting, over that of exact attention.
        ladder: the settings.
        tolerance: the largest 95 % bound of a head's relative error.

    Returns:
        for each layer, for each head; exact where no setting that costs less than exact attention is
        good enough.
    """
    by_cost = sorted(range(len(ladder)), key=costs.__getitem__)
    layers = []
    for layer in zip(*measured, strict=True):
        worst = torch.tensor([text.bounds for text in layer]).amax(0)  # (settings, heads)
        layers.append(
            tuple(_head(own, by_cost, ladder, costs, tolerance) for own in worst.t().tolist())
        )
    return tuple(layers)


def _head(
    bounds: Sequence[float],
    by_cost: list[int],
    ladder: Sequence[HeadSetting],
    costs: Sequence[float],
    tolerance: float,
) -> HeadPlan:
    for index in by_cost:
        if costs[index] < 1.0 and bounds[index] <= tolerance:
            return HeadPlan(ladder[index], bounds[index], costs[index])
    return HeadPlan(None)
