"""Heads from near: attention over tiles of a text beside what stands for it, and weights by lag."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad, scaled_dot_product_attention

from ..errors import InputError
from ..hybrid import hybrid_attention
from ..hybrid.sampling import SampledRows, sampled_rows, spread_rows
from ..plan import HeadSetting, Plan
from .capture import CapturedLayer, observe_layers
from .prefill import of_heads

_SAMPLES = 128  # rows of exact attention that lags are found in
_DIGITS = 5


class SeenHead(NamedTuple):
    """Attention of a head over a whole text, as shares of tiles: rows add up to 1."""

    setting: int | None
    """Which of the settings stands for it; None for exact attention."""
    exact: list[list[float]]
    approximate: list[list[float]] | None
    """None for exact attention."""


class SeenLayer(NamedTuple):
    """The heads of one layer."""

    lag_weights: list[list[float]]
    """For each head the mean attention weight at each of `lag_bands`."""
    heads: list[SeenHead]
    """Empty for layers that are not looked at from near."""


def tile_size(n: int, tiles: int) -> int:
    """Return the tokens of a tile where at most so many stand side by side."""
    return -(-n // tiles)


def lag_bands(n: int) -> list[int]:
    """Return the first lag of each band: single lags up to 16, then about 4 bands for each doubling."""
    firsts = list(range(min(n, 17)))
    while firsts[-1] * 1.19 < n - 1:
        firsts.append(max(firsts[-1] + 1, round(firsts[-1] * 1.19)))
    return firsts


def see_plan(
    model: Any,
    input_ids: Tensor,
    plan: Plan,
    *,
    near: Collection[int],
    tiles: int,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> dict[int, SeenLayer]:
    """Run a text through a model and look at every head beside what a plan computes for it.

    Args:
        model: a transformers model that attends through the attention interface.
        input_ids: ``(1, n)``.
        plan: for this model.
        near: layers whose heads are looked at from near.
        tiles: across and down, at most.
        progress: called with the number of layers done and of all.
        seed: of everything sampled.

    Returns:
        `SeenLayer` by layer number.

    Raises:
        InputError: the plan is for another model, or a layer does not attend through the interface.

    Complexity: exact attention once for each layer, and once more for a near one, where every setting
    that occurs in it is computed too.
    """
    plan.check_model(model)
    found: dict[int, SeenLayer] = {}

    def observe(layer: int, given: CapturedLayer) -> None:
        query, key = (x.to(torch.float32).contiguous() for x in given[:2])
        own = [head.setting for head in plan.heads[layer]]
        settings = [setting for setting in dict.fromkeys(own) if setting is not None]
        chosen = [None if setting is None else settings.index(setting) for setting in own]
        heads = (
            see_heads(query, key, given.scale, settings, chosen, tiles, seed) if layer in near else []
        )
        found[layer] = SeenLayer(_sampled_lags(query, key, given.scale, seed), heads)
        if progress is not None:
            progress(len(found), plan.model.layers)

    observe_layers(model, input_ids, observe)
    missing = sorted(set(range(plan.model.layers)) - set(found))
    if missing:
        raise InputError(
            f"layers {missing} of the model do not attend through the attention interface of "
            "transformers"
        )
    return found


def best_settings(bounds: Sequence[Sequence[float]]) -> list[int]:
    """Return for each head the number of the setting with the smallest bound, the first of equals."""
    return [own.index(min(own)) for own in zip(*bounds, strict=True)]


@torch.no_grad()
def see_heads(
    query: Tensor,
    key: Tensor,
    scale: float,
    settings: Sequence[HeadSetting],
    chosen: Sequence[int | None],
    tiles: int,
    seed: int,
) -> list[SeenHead]:
    """Return every head of a layer over tiles.

    Values that name a key's tile make outputs of the tiles' shares.

    Args:
        query: ``(1, H, n, d)``.
        key: ``(1, H_kv, n, d)``.
        scale: factor of the logits.
        settings: what may stand for a head.
        chosen: for each head the number of its setting; None for exact attention.
        tiles: across and down, at most.
        seed: of everything sampled.
    """
    n, width = query.shape[2:]
    place = torch.arange(n) // tile_size(n, tiles)
    names = one_hot(place).to(query.dtype)
    # As wide as keys are: fused attention is only for these.
    value = (
        pad(names, (0, max(0, width - names.shape[-1]))).expand(1, key.shape[1], -1, -1).contiguous()
    )
    counts = names.sum(0)[:, None]

    def shares(output: Tensor) -> list[list[float]]:
        # Both are shares of earlier tiles; a mean over a segment spreads into no later one.
        means = (names.t() @ output[:, : names.shape[-1]]) / counts
        return [rounded_row(row) for row in means.tril()]

    exact = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )[0]
    found = {
        head: SeenHead(None, shares(exact[head]), None)
        for head, own in enumerate(chosen)
        if own is None
    }
    for index in sorted({own for own in chosen if own is not None}):
        members = [head for head, own in enumerate(chosen) if own == index]
        outputs = hybrid_attention(
            *of_heads(members, query, key, value), **settings[index].at(n)._asdict(),
            scale=scale, enable_gqa=True, seed=seed,
        )[0]  # fmt: skip
        for head, output in zip(members, outputs, strict=True):
            found[head] = SeenHead(index, shares(exact[head]), shares(output))
    return [found[head] for head in range(len(chosen))]


@torch.no_grad()
def _sampled_lags(query: Tensor, key: Tensor, scale: float, seed: int) -> list[list[float]]:
    sharing = query.shape[1] // key.shape[1]
    weights: list[list[float]] = []
    for group in range(key.shape[1]):
        own = query[0, group * sharing : (group + 1) * sharing]
        weights += lag_weights(both_samples(own, key[0, group : group + 1], scale, seed))
    return weights


def both_samples(query: Tensor, key: Tensor, scale: float, seed: int) -> list[SampledRows]:
    """Return exact attention of two samples of rows that have none in common.

    Args:
        query: ``(R, n, d)``, heads that share their keys.
        key: ``(1, n, d)``.
        scale: factor of the logits.
        seed: of the rows.
    """
    n = query.shape[1]
    return [
        sampled_rows(query, key, spread_rows(0, n, _SAMPLES // 2, parity, seed), scale)
        for parity in (0, 1)
    ]


def lag_weights(sampled: Sequence[SampledRows]) -> list[list[float]]:
    """Return for each head the mean weight at each band of lags, over the rows that have the lag."""
    n = sampled[0].weights.shape[-1]
    firsts = torch.tensor(lag_bands(n))
    total = torch.zeros((len(sampled[0].weights), len(firsts)))
    count = torch.zeros(len(firsts))
    for one in sampled:
        lags = one.rows[:, None] - torch.arange(n)
        seen = lags >= 0
        band = torch.searchsorted(firsts, lags[seen], right=True) - 1
        total.index_add_(1, band, one.weights[:, seen])
        count.index_add_(0, band, torch.ones(len(band)))
    return [rounded_row(row) for row in total / count.clamp(min=1)]


def rounded_row(row: Tensor) -> list[float]:
    """Return numbers with as many digits as files need."""
    return [float(f"{value:.{_DIGITS}g}") for value in row.tolist()]
