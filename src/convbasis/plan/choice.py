"""Which setting of a ladder each head gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ladder import Measured
from .plan import HeadPlan
from .settings import HeadSetting

_HALVINGS = 40
# How bounds change from the texts of a calibration to a text of another kind: mean and standard
# deviation of the logarithm of their ratio, where they are not far below the tolerance
# (`benchmarks/pretrained.py bounds`).
_DRIFT, _SPREAD = 0.15, 0.6


class Chosen(NamedTuple):
    """The settings of all heads."""

    heads: tuple[tuple[HeadPlan, ...], ...]
    """For each layer."""
    predicted_kl: float | None
    """KL(exact || approximate) that their errors add up to, in nats; None if not asked for."""


def choose(
    measured: Sequence[Sequence[Measured]],
    costs: Sequence[float],
    ladder: Sequence[HeadSetting],
    tolerance: float,
    budget: float | None = None,
    sensitivities: Sequence[Sequence[float]] | None = None,
    *,
    fallback: float | None = None,
) -> Chosen:
    """Return for every head the cheapest setting whose error is within the tolerance on every text.

    With a budget, heads whose errors matter more to the model than what they save get dearer settings,
    until the predicted KL is within it: for each head the least cost + λ · sensitivity · error², λ as
    small as the budget allows. Where heads fall back, the time of exact attention is added to a
    setting's, weighed by the chance that its bound exceeds the limit in a text of another kind.

    Args:
        measured: for each text, for each layer.
        costs: of each setting, over that of exact attention.
        ladder: the settings.
        tolerance: the largest 95 % bound of a head's relative error.
        budget: the largest predicted KL, in nats per token; None for any.
        sensitivities: for each layer and head, the KL of a relative error of 1; wanted with a budget.
        fallback: the bound beyond which a prompt computes a head again exactly; None if it never does.

    Returns:
        `Chosen`; exact where no setting that costs less than exact attention is good enough.
    """
    # Exact attention is the last setting: (layers, settings + 1, heads).
    bounds, errors = (
        torch.tensor([[[*getattr(layer, name)] for layer in text] for text in measured])
        .double()
        .amax(0)
        for name in ("bounds", "errors")
    )
    nothing = torch.zeros_like(bounds[:, :1])
    bounds, errors = (torch.cat([x, nothing], dim=1) for x in (bounds, errors))
    price = torch.tensor([*costs, 1.0], dtype=torch.float64)[:, None]
    exact = (torch.arange(len(price)) == len(costs))[:, None]
    allowed = (bounds <= tolerance) & ((price < 1.0) | exact)
    if fallback is not None:
        price = price + chance_beyond(bounds, fallback).masked_fill(exact, 0.0)
    if sensitivities is None:
        harm = torch.zeros_like(errors)
    else:
        harm = torch.tensor(sensitivities, dtype=torch.float64)[:, None] * errors.square()

    def cheapest(weight: float) -> Tensor:
        return (price + weight * harm).masked_fill(~allowed, torch.inf).argmin(1, keepdim=True)

    def total(chosen: Tensor) -> float:
        return float(harm.gather(1, chosen).sum())

    chosen = cheapest(0.0)
    if budget is not None and total(chosen) > budget:
        low, high = 0.0, 1.0
        while total(cheapest(high)) > budget:
            low, high = high, 2.0 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if total(cheapest(middle)) > budget else (low, middle)
        chosen = cheapest(high)
    heads = tuple(
        tuple(
            HeadPlan(None)
            if index == len(costs)
            else HeadPlan(ladder[index], float(bounds[layer, index, head]), costs[index])
            for head, index in enumerate(own)
        )
        for layer, own in enumerate(chosen[:, 0].tolist())
    )
    return Chosen(heads, None if sensitivities is None else total(chosen))


def chance_beyond(bounds: Tensor, limit: float) -> Tensor:
    """Return how often bounds of some calibration are beyond a limit in a text of another kind, if
    their ratio has the logarithm of a normal distribution.

    Args:
        bounds: any shape.
        limit: positive.
    """
    return torch.special.ndtr((bounds.clamp(min=1e-300).log() - math.log(limit) + _DRIFT) / _SPREAD)
