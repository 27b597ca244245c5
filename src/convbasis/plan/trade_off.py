"""Error against cost of a whole model: one setting for all heads, and choices head by head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .choice import choose
from .ladder import Measured
from .plan import HeadPlan
from .settings import HeadSetting

_HALVINGS = 10  # of the budget, from what no budget allows
_TOLERANCES = tuple(2.0 ** (step / 2) for step in range(-4, 5))  # over the plan's


class Place(NamedTuple):
    """Where a way to set all heads stands."""

    limit: float
    """What it was chosen by: a budget in nats, or a tolerance; the setting's number for all heads."""
    cost: float
    """Mean time of the heads over that of exact attention."""
    error: float
    """Predicted KL in nats, or without sensitivities the root mean square of the heads' bounds."""


def place_of(
    heads: Sequence[Sequence[HeadPlan]], predicted_kl: float | None, limit: float = 0.0
) -> Place:
    """Return where chosen heads stand.

    Args:
        heads: for each layer.
        predicted_kl: of all their errors, in nats; None if it was not predicted.
        limit: what they were chosen by.
    """
    flat = [head for layer in heads for head in layer]
    error = _root_mean_square([head.error for head in flat]) if predicted_kl is None else predicted_kl
    return Place(limit, sum(head.cost for head in flat) / len(flat), error)


def one_setting_for_all(
    measured: Sequence[Sequence[Measured]],
    costs: Sequence[float],
    sensitivities: Sequence[Sequence[float]] | None,
) -> list[Place]:
    """Return for each setting of the ladder where a model stands whose heads all have it.

    Args:
        measured: for each text, for each layer.
        costs: of each setting, over that of exact attention.
        sensitivities: for each layer and head, the KL of a relative error of 1; None if not measured.
    """
    places = []
    for index, cost in enumerate(costs):
        if sensitivities is None:
            error = _root_mean_square([x for row in _worst(measured, "bounds", index) for x in row])
        else:
            error = sum(
                effect * x * x
                for row, effects in zip(_worst(measured, "errors", index), sensitivities, strict=True)
                for x, effect in zip(row, effects, strict=True)
            )
        places.append(Place(index, cost, error))
    return places


def choices(
    measured: Sequence[Sequence[Measured]],
    costs: Sequence[float],
    ladder: Sequence[HeadSetting],
    tolerance: float,
    sensitivities: Sequence[Sequence[float]] | None,
    fallback: float | None = None,
) -> list[Place]:
    """Return where `choose` leads: at several budgets, or without sensitivities at several tolerances.

    Budgets halve from what the tolerance alone allows; tolerances lie around the given one.

    Args:
        measured: for each text, for each layer.
        costs: of each setting, over that of exact attention.
        ladder: the settings.
        tolerance: the largest 95 % bound of a head's relative error.
        sensitivities: as in `one_setting_for_all`.
        fallback: as in `choose`.

    Returns:
        `Place`, from the largest limit on, without those that are as the one before.

    Complexity: some hundred passes over layers, settings and heads.
    """
    found = []
    if sensitivities is None:
        for step in sorted(_TOLERANCES, reverse=True):
            limit = None if fallback is None else step * fallback
            own = choose(measured, costs, ladder, step * tolerance, fallback=limit)
            found.append(place_of(own.heads, None, step * tolerance))
    else:
        given = (measured, costs, ladder, tolerance)
        free = choose(*given, None, sensitivities, fallback=fallback).predicted_kl or 0.0
        for halving in range(_HALVINGS + 1):
            budget = free / 2**halving
            own = choose(*given, budget, sensitivities, fallback=fallback)
            found.append(place_of(own.heads, own.predicted_kl, budget))
    return [
        place for index, place in enumerate(found) if index == 0 or place[1:] != found[index - 1][1:]
    ]


def _worst(measured: Sequence[Sequence[Measured]], name: str, index: int) -> list[list[float]]:
    """Return for each layer and head the largest of all texts, of one setting."""
    return [
        [max(own) for own in zip(*(getattr(layer, name)[index] for layer in texts), strict=True)]
        for texts in zip(*measured, strict=True)
    ]


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
