"""calibrate: run texts through a model and decide for every head what a long prompt computes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..checks import check_finite, check_nonnegative, describe
from ..errors import InputError
from ..plan import HeadSetting, ModelShape, Plan
from ..plan.choice import Chosen, choose
from ..plan.ladder import Costs, Measured, default_ladder, measure, measure_costs
from .capture import CapturedLayer, observe_layers
from .checkpoint import Checkpoint
from .sensitivity import head_sensitivities
from .weights import weights_sha256

_COSTS, _SENSITIVITIES = "costs", "effects"
# A plan's cost that it is applied for. Heads that fall back, exact last rows, copies and checks come on
# top: a fifth of exact attention's time where the two are about even.
_WORTH_IT = 0.75


class Calibration(NamedTuple):
    """A plan, and all that it was chosen from."""

    plan: Plan
    ladder: tuple[HeadSetting, ...]
    measured: list[list[Measured]]
    """For each text, for each layer."""
    costs: list[float]
    """Of each setting at the calibrated length, as in `Costs`."""
    allowed: float
    """The part of the tolerance that the texts may use."""
    sensitivities: list[list[float]] | None
    """As `head_sensitivities` finds them; None without a budget."""


def calibrate(
    model: Any,
    token_ids: Tensor | Sequence[Tensor],
    *,
    tolerance: float = 0.4,
    margin: float = 0.6,
    budget: float | None = 0.001,
    ladder: Sequence[HeadSetting] | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> Plan:
    """Measure every head of a model on texts, and plan the cheapest good enough setting for each.

    The model attends exactly while it is measured, one layer at a time.

    Args:
        model: a transformers model that attends through the attention interface.
        token_ids: ``(texts, n)``, or one ``(n,)`` or ``(1, n)`` for each text; n, the calibrated
            length, is the same for all.
        tolerance: the largest estimated relative error (95 % bound) of an approximated head's output in
            any text; 0.1 is 10 %.
        margin: part of the tolerance that the bound may take up in these texts; what is left is for
            prompts unlike them, in which a head beyond the tolerance is computed twice. How often that
            is to be expected counts as time of a setting.
        budget: the largest KL(exact || planned) of the tokens after a prompt, in nats, that the heads'
            errors in it are predicted to add up to in these texts; a perplexity rises by about this
            share, in texts of other kinds by up to some four times as much. Heads share it by what
            their errors do to the model in the first text, see `head_sensitivities`. None for no
            budget: then the tolerance alone counts, and the model is not run backward.
        ladder: the settings to choose from; by default windows, columns, blocks and segments of two
            sizes.
        checkpoint: a JSON file that keeps what is measured, layer by layer; a run that was stopped goes
            on where it was.
        progress: called with the number of layers done and of all; what errors do to the model counts
            as one more.
        seed: of everything sampled here; prompts are sampled with `hybrid_attention`'s default.

    Returns:
        `Plan`.

    Raises:
        InputError: texts of different or no length, a model that does not attend through the
            interface, or NaN or Inf in one of its layers.
        FileFormatError: the checkpoint is damaged, or of another calibration.
        MissingExtraError: transformers is not installed.

    Complexity: for each layer, exact attention and every setting of the ladder once.

    Example:
        >>> import convbasis as cb  # doctest: +SKIP
        >>> plan = cb.calibrate(model, token_ids, tolerance=0.4)  # doctest: +SKIP
        >>> plan.save("plan.json")  # doctest: +SKIP
    """
    return calibration(
        model,
        token_ids,
        tolerance=tolerance,
        margin=margin,
        budget=budget,
        ladder=ladder,
        checkpoint=checkpoint,
        progress=progress,
        seed=seed,
    ).plan


def calibration(
    model: Any,
    token_ids: Tensor | Sequence[Tensor],
    *,
    tolerance: float,
    margin: float,
    budget: float | None,
    ladder: Sequence[HeadSetting] | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> Calibration:
    """Return what `calibrate` finds, with the measurements; arguments and errors are its own."""
    if not check_nonnegative("tolerance", tolerance) > 0:
        raise InputError("tolerance=0 allows no approximation; give a positive relative error")
    if not 0 < check_nonnegative("margin", margin) <= 1:
        raise InputError(f"margin={margin} is not in (0, 1]; it is a part of the tolerance")
    if budget is not None:
        check_nonnegative("budget", budget)
    texts = _texts(token_ids)
    n = texts[0].shape[1]
    shape = ModelShape.of(model)
    steps = default_ladder(n) if ladder is None else tuple(ladder)
    if not steps:
        raise InputError("ladder is empty; give at least one HeadSetting")
    digest = hashlib.sha256(b"".join(repr(text.tolist()).encode() for text in texts)).hexdigest()
    kept = Checkpoint(
        None if checkpoint is None else Path(checkpoint),
        "calibration",
        {
            "model": dataclasses.asdict(shape),
            "weights_sha256": weights_sha256(model, exact=True),
            "texts_sha256": digest,
            "ladder": [dataclasses.asdict(step) for step in steps],
            "seed": seed,
        },
        "model, weights, texts, ladder or seed",
    )
    total = len(texts) * shape.layers + (budget is not None)
    for index, text in enumerate(texts):

        def observe(layer: int, given: CapturedLayer, index: int = index) -> None:
            for name in ("query", "key", "value"):
                check_finite(f"the {name} of layer {layer}", getattr(given, name))
            # Times first: a run that was stopped later goes on with the same, to the same plan.
            if _COSTS not in kept:
                kept.add(_COSTS, measure_costs(*given, steps)._asdict())
            if f"{index}.{layer}" not in kept:
                kept.add(f"{index}.{layer}", measure(*given, steps, seed)._asdict())
            if progress is not None:
                progress(len(kept) - 1 - (_SENSITIVITIES in kept), total)

        observe_layers(model, text, observe)
    layers = range(shape.layers)
    measured = [[_measured(kept, index, layer) for layer in layers] for index in range(len(texts))]
    if budget is not None and _SENSITIVITIES not in kept:
        kept.add(_SENSITIVITIES, head_sensitivities(model, texts[0], steps, seed=seed))
    if budget is not None and progress is not None:
        progress(total, total)
    costs = Costs(**kept[_COSTS])
    effects = None if budget is None else kept[_SENSITIVITIES]
    allowed = margin * tolerance
    chosen = choose(measured, costs.costs[-1], steps, allowed, budget, effects, fallback=tolerance)
    shortest = _crossover(chosen, costs, steps)
    plan = Plan(
        shape,
        digest,
        float(tolerance),
        n,
        shortest,
        chosen.heads,
        chosen.predicted_kl,
        weights_sha256(model),
    )
    return Calibration(plan, steps, measured, costs.costs[-1], allowed, effects)


def _crossover(chosen: Chosen, costs: Costs, ladder: Sequence[HeadSetting]) -> int:
    """Return the longest prompt for which the plan saves next to nothing, 0 for none: between the last
    measured one of those and the next."""
    settings = [head.setting for layer in chosen.heads for head in layer]
    place: dict[HeadSetting | None, int] = {setting: index for index, setting in enumerate(ladder)}
    place[None] = len(ladder)
    shortest, before = 0, None
    for n, of_settings in zip(costs.lengths, costs.costs, strict=True):
        with_exact = [*of_settings, 1.0]
        total = sum(with_exact[place[setting]] for setting in settings) / len(settings)
        if total > _WORTH_IT:
            shortest = n
        elif before is not None and shortest == before[0]:
            # Between the two lengths costs fall about as straight lines do against log n.
            part = (before[1] - _WORTH_IT) / (before[1] - total)
            shortest = round(before[0] * (n / before[0]) ** part)
        before = (n, total)
    return shortest


def _measured(kept: Checkpoint, text: int, layer: int) -> Measured:
    if f"{text}.{layer}" not in kept:
        raise InputError(
            f"layer {layer} of the model does not attend through the attention interface of "
            "transformers"
        )
    return Measured(**kept[f"{text}.{layer}"])


def _texts(token_ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the texts, ``(1, n)`` each."""
    parts = list(token_ids) if not isinstance(token_ids, Tensor) or token_ids.ndim > 1 else [token_ids]
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, Tensor) or part.dtype.is_floating_point or part.squeeze().ndim != 1:
            raise InputError(f"text {index} is {describe(part)}; integers of shape (n,) are wanted")
        texts.append(part.reshape(1, -1))
    lengths = sorted({text.shape[1] for text in texts})
    if len(lengths) != 1 or lengths[0] < 64:
        raise InputError(
            f"the texts have {lengths} tokens; one or more texts of one length, at least 64 tokens, "
            "are wanted"
        )
    return texts
