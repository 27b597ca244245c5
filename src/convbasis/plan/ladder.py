"""The ladder: settings of a head from cheap to dear, measured on what a layer was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as _exact

from ..hybrid import HybridStats, hybrid_attention_stats
from ..hybrid.window import BLOCK
from ..timing import seconds_on
from .settings import ConcreteSetting, HeadSetting, Size


def default_ladder(length: int) -> tuple[HeadSetting, ...]:
    """Return the settings that calibration tries, for prompts of about `length` tokens.

    Windows and columns grow with the square root of the prompt, blocks too. Settings whose windows hold
    all of such a prompt, of less than some 1,100 tokens, are left out, but for the first.
    """

    def tokens(count: int) -> Size:
        return Size(count, length, 0.5, 64)

    def number(count: int) -> Size:
        return Size(count, length, 0.5)

    columns = Size(60, length, 0.5, 4)

    def setting(window: int, blocks: int = 0, **others: Any) -> HeadSetting:
        return HeadSetting(tokens(window), 4, columns, number(blocks) if blocks else 0, **others)

    segments: dict[str, Any] = {"far_field": "segments", "key_weights": True}
    least, *others = (
        setting(128),
        setting(256),
        setting(320, **segments),
        setting(576, **segments),
        setting(960, **segments),
        setting(192, 3, correction=True),
    )
    return least, *(own for own in others if own.at(length).window + 2 * BLOCK < length)


class Measured(NamedTuple):
    """A layer's heads with every setting of a ladder."""

    bounds: list[list[float]]
    """For each setting and head the 95 % bound of the relative error, as a prompt's run finds it."""
    errors: list[list[float]]
    """For each setting and head the true relative error."""


class Costs(NamedTuple):
    """What the settings of a ladder cost on this machine."""

    lengths: list[int]
    """Prompt lengths, increasing: powers of two, and the calibrated length."""
    costs: list[list[float]]
    """For each length and setting, its time for the heads of one layer, estimates included, over that
    of exact attention."""


@torch.no_grad()
def measure(
    query: Tensor, key: Tensor, value: Tensor, scale: float, ladder: Sequence[HeadSetting], seed: int
) -> Measured:
    """Return the errors of every setting of a ladder for the heads of one layer.

    Args:
        query: ``(1, H, n, d)``.
        key: ``(1, H_kv, n, d)``.
        value: ``(1, H_kv, n, d_v)``.
        scale: factor of the logits.
        ladder: settings.
        seed: of everything sampled.
    """
    n = query.shape[2]
    exact = _exact(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    norms = torch.linalg.vector_norm(exact[0].double(), dim=(-1, -2)).clamp(min=1e-300)
    bounds, errors = [], []
    for setting in ladder:
        stats = _hybrid(query, key, value, setting.at(n), scale, seed)
        off = torch.linalg.vector_norm((stats.output - exact)[0].double(), dim=(-1, -2))
        bounds.append(stats.error_estimate[0].tolist())
        errors.append((off / norms).tolist())
    return Measured(bounds, errors)


@torch.no_grad()
def measure_costs(
    query: Tensor, key: Tensor, value: Tensor, scale: float, ladder: Sequence[HeadSetting]
) -> Costs:
    """Return the costs of every setting of a ladder, at powers of two and at full length.

    The tensors are those of `measure`; shorter prompts are their beginnings. Times are the least of
    three that take turns: what else runs on a machine only ever adds to them.
    """
    whole = query.shape[2]
    lengths = [*(1 << power for power in range(9, whole.bit_length()) if 1 << power < whole), whole]
    costs = []
    for n in lengths:
        own = [tensor[:, :, :n].contiguous() for tensor in (query, key, value)]
        times = [[float("inf")] * (len(ladder) + 1)]
        for _ in range(3):
            exact = _seconds(_exact, *own, is_causal=True, scale=scale, enable_gqa=True)
            times.append([exact, *(_seconds(_hybrid, *own, step.at(n), scale, 0) for step in ladder)])
        exact, *ours = map(min, zip(*times, strict=True))
        costs.append([seconds / exact for seconds in ours])
    return Costs(lengths, costs)


def _hybrid(
    query: Tensor, key: Tensor, value: Tensor, sizes: ConcreteSetting, scale: float, seed: int
) -> HybridStats:
    return hybrid_attention_stats(
        query, key, value, **sizes._asdict(), scale=scale, enable_gqa=True, seed=seed
    )


def _seconds(run: Callable[..., object], query: Tensor, *inputs: Any, **options: Any) -> float:
    begin = seconds_on(query.device)
    run(query, *inputs, **options)
    return seconds_on(query.device) - begin
