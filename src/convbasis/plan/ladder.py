"""The ladder: settings of a head from cheap to dear, measured on what a layer was given."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as _exact

from ..hybrid import HybridStats, hybrid_attention_stats
from .settings import ConcreteSetting, HeadSetting, Size

_T = TypeVar("_T")


def default_ladder(length: int) -> tuple[HeadSetting, ...]:
    """Return the settings that calibration tries, for prompts of about `length` tokens.

    Windows and columns grow with the square root of the prompt, blocks too.
    """

    def tokens(count: int) -> Size:
        return Size(count, length, 0.5, 64)

    def number(count: int) -> Size:
        return Size(count, length, 0.5)

    columns = Size(60, length, 0.5, 4)

    def setting(window: int, blocks: int = 0, **others: Any) -> HeadSetting:
        return HeadSetting(tokens(window), 4, columns, number(blocks) if blocks else 0, **others)

    segments: dict[str, Any] = {"far_field": "segments", "key_weights": True}
    return (
        setting(128),
        setting(256),
        setting(256, **segments),
        setting(512, **segments),
        setting(768, **segments),
        setting(256, 4, **segments),
        setting(512, 8, **segments),
        setting(256, 16, correction=True),
    )


class Measured(NamedTuple):
    """A layer's heads with every setting of a ladder."""

    bounds: list[list[float]]
    """For each setting and head the 95 % bound of the relative error, as a prompt's run finds it."""
    errors: list[list[float]]
    """For each setting and head the true relative error."""
    costs: list[float]
    """Time of each setting for all heads, estimates included, over that of exact attention."""


@torch.no_grad()
def measure(
    query: Tensor, key: Tensor, value: Tensor, scale: float, ladder: Sequence[HeadSetting], seed: int
) -> Measured:
    """Return errors and cost of every setting of a ladder for the heads of one layer.

    Args:
        query: ``(1, H, n, d)``.
        key: ``(1, H_kv, n, d)``.
        value: ``(1, H_kv, n, d_v)``.
        scale: factor of the logits.
        ladder: settings.
        seed: of everything sampled.
    """
    n = query.shape[2]
    exact, whole = _timed(_exact, query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    norms = torch.linalg.vector_norm(exact[0].double(), dim=(-1, -2)).clamp(min=1e-300)
    bounds, errors, costs = [], [], []
    for setting in ladder:
        stats, seconds = _timed(_hybrid, query, key, value, setting.at(n), scale, seed)
        off = torch.linalg.vector_norm((stats.output - exact)[0].double(), dim=(-1, -2))
        bounds.append(stats.error_estimate[0].tolist())
        errors.append((off / norms).tolist())
        costs.append(seconds / whole)
    return Measured(bounds, errors, costs)


@torch.no_grad()
def crossover(query: Tensor, key: Tensor, value: Tensor, scale: float, setting: HeadSetting) -> int:
    """Return the longest measured prompt, a power of two, for which a setting does not pay; 0 for none.

    The tensors are those of `measure`; shorter prompts are their beginnings.
    """
    longest, n = 0, 512
    while n <= query.shape[2]:
        own = [tensor[:, :, :n].contiguous() for tensor in (query, key, value)]
        ratios = []
        for _ in range(3):
            exact = _timed(_exact, *own, is_causal=True, scale=scale, enable_gqa=True)[1]
            ratios.append(_timed(_hybrid, *own, setting.at(n), scale, 0)[1] / exact)
        if statistics.median(ratios) >= 1.0:
            longest = n
        n *= 2
    return longest


def _hybrid(
    query: Tensor, key: Tensor, value: Tensor, sizes: ConcreteSetting, scale: float, seed: int
) -> HybridStats:
    return hybrid_attention_stats(
        query, key, value, **sizes._asdict(), scale=scale, enable_gqa=True, seed=seed
    )


def _timed(run: Callable[..., _T], *inputs: Any, **options: Any) -> tuple[_T, float]:
    begin = time.perf_counter()
    result = run(*inputs, **options)
    return result, time.perf_counter() - begin
