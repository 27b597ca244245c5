"""What the heads of a layer look at, how well settings stand for them, and heads seen from near."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decompose import decompose
from ..errors import InputError
from ..hybrid.sampling import SampledRows
from ..hybrid.selection import heaviest, seen_columns
from ..plan import HeadSetting, ModelShape
from ..plan.ladder import default_ladder, measure, measure_costs
from .capture import CapturedLayer, observe_layers
from .checkpoint import Checkpoint
from .views import SeenHead, best_settings, both_samples, lag_weights, rounded_row, see_heads
from .weights import weights_sha256

TOLERANCES = (0.5, 1.0, 2.0, 4.0)
"""Of the logits' decomposition, in nats."""
TILES = 64
"""Tiles of a seen head, across and down, at most."""
_COSTS = "costs"


class Lengths(NamedTuple):
    """Numbers of tokens that figures are about."""

    decomposed: int
    """Of the stretch whose logits are decomposed."""
    near: int
    """Latest keys that count as near."""
    columns: int
    """Heaviest columns, and 4 first tokens beside them."""


def lengths(n: int) -> Lengths:
    """Return what is looked at in a text of n tokens."""
    return Lengths(min(256, n), min(256, max(1, n // 8)), min(60, max(1, n // 16)))


class LayerProfile(NamedTuple):
    """One layer; lists have one entry for each head unless said otherwise."""

    ranks: list[list[int]]
    """For each tolerance: the k of the decomposition of a stretch's logits."""
    near: list[float]
    """Share of attention on near keys, in the mean over queries."""
    columns: list[float]
    """Share on the first tokens and the heaviest columns beyond them."""
    lag_weights: list[list[float]]
    """Mean attention weight at each of `lag_bands`."""
    bounds: list[list[float]]
    """For each setting of the ladder, as in `Measured`."""
    errors: list[list[float]]
    """For each setting, as in `Measured`."""
    costs: list[float]
    """Of each setting, as in `Costs`: the same for all layers."""
    seen: list[SeenHead]
    """Empty for layers that are not looked at from near."""


def profile_layers(
    model: Any,
    input_ids: Tensor,
    layers: Sequence[int],
    *,
    seen: Sequence[int] = (),
    ladder: Sequence[HeadSetting] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> dict[int, LayerProfile]:
    """Run a text through a model and profile the heads of some layers.

    Args:
        model: a transformers model that attends through the attention interface.
        input_ids: ``(1, n)``.
        layers: layer numbers.
        seen: those of them whose heads are looked at from near.
        ladder: settings to measure; those of calibration by default.
        checkpoint: a JSON file that keeps what is measured, layer by layer.
        progress: called with the number of layers done and of all.
        seed: of everything sampled.

    Returns:
        `LayerProfile` by layer number.

    Raises:
        InputError: a layer does not exist or does not attend through the interface; fewer than 64
            tokens.
        FileFormatError: the checkpoint is damaged, or of another analysis.
    """
    shape, n = ModelShape.of(model), input_ids.shape[1]
    if not layers or any(not 0 <= layer < shape.layers for layer in layers):
        raise InputError(f"layers={list(layers)}: choose one or more of 0..{shape.layers - 1}")
    if n < 64:
        raise InputError(f"the text has {n} tokens; at least 64 are wanted")
    steps = default_ladder(n) if ladder is None else tuple(ladder)
    kept = Checkpoint(
        checkpoint,
        "analysis",
        {
            "model": dataclasses.asdict(shape),
            "weights_sha256": weights_sha256(model, exact=True),
            "text_sha256": hashlib.sha256(repr(input_ids.tolist()).encode()).hexdigest(),
            "layers": sorted(layers),
            "seen": sorted(seen),
            "ladder": [dataclasses.asdict(step) for step in steps],
            "seed": seed,
        },
        "model, weights, text, layers, ladder or seed",
    )

    def observe(layer: int, given: CapturedLayer) -> None:
        if layer not in layers:
            return
        # Times first: an analysis that was stopped later goes on with the same.
        if _COSTS not in kept:
            kept.add(_COSTS, measure_costs(*given, steps).costs[-1])
        if str(layer) not in kept:
            found = profile(given, steps, kept[_COSTS], seed, layer in seen)
            views = [view._asdict() for view in found.seen]
            kept.add(str(layer), {**found._asdict(), "seen": views})
        if progress is not None:
            progress(len(kept) - 1, len(set(layers)))

    observe_layers(model, input_ids, observe)
    return {layer: _read(kept, layer) for layer in sorted(set(layers))}


def _read(kept: Checkpoint, layer: int) -> LayerProfile:
    if str(layer) not in kept:
        raise InputError(
            f"layer {layer} of the model does not attend through the attention interface of "
            "transformers"
        )
    found = kept[str(layer)]
    return LayerProfile(**{**found, "seen": [SeenHead(**view) for view in found["seen"]]})


@torch.no_grad()
def profile(
    given: CapturedLayer,
    ladder: Sequence[HeadSetting],
    costs: Sequence[float],
    seed: int,
    seen: bool,
) -> LayerProfile:
    """Profile one layer.

    Args:
        given: of one text.
        ladder: settings to measure.
        costs: what they cost.
        seed: of everything sampled.
        seen: whether heads are looked at from near.

    Complexity: for n tokens O(n^2 d) for each setting, and O(256 n d) for the rest.
    """
    query, key, value = (x.to(torch.float32).contiguous() for x in given[:3])
    n, sharing = query.shape[2], query.shape[1] // key.shape[1]
    sizes = lengths(n)
    head = (
        query[0, :, : sizes.decomposed] @ key[0, :, : sizes.decomposed].repeat_interleave(sharing, 0).mT
    )
    logits = (head * given.scale).tril()
    ranks = [decompose(logits, tol=tolerance).ranks.tolist() for tolerance in TOLERANCES]
    near, columns, weights = [], [], []
    for group in range(key.shape[1]):
        own = query[0, group * sharing : (group + 1) * sharing]
        # Columns are found in one half of the rows, and weighed in the other.
        to_find, to_weigh = both_samples(own, key[0, group : group + 1], given.scale, seed)
        near += _near_mass(to_weigh, sizes.near)
        columns += _column_mass(to_find, to_weigh, sizes)
        weights += lag_weights([to_find, to_weigh])
    measured = measure(query, key, value, given.scale, ladder, seed)
    best = best_settings(measured.bounds)
    views = see_heads(query, key, given.scale, ladder, best, TILES, seed) if seen else []
    return LayerProfile(ranks, near, columns, weights, *measured, list(costs), views)


def _near_mass(sampled: SampledRows, near: int) -> list[float]:
    keys = torch.arange(sampled.weights.shape[-1])
    within = keys > sampled.rows[:, None] - near
    return rounded_row((sampled.weights * within).sum(-1).mean(-1))


def _column_mass(to_find: SampledRows, to_weigh: SampledRows, sizes: Lengths) -> list[float]:
    n = to_find.weights.shape[-1]
    mass = to_find.mass_before(to_find.rows - sizes.near + 1)
    chosen = seen_columns(heaviest(mass, n, 4, sizes.columns), n, n)[:, :n]
    return rounded_row((to_weigh.weights * chosen[:, None]).sum(-1).mean(-1))
