"""A plan on a loaded model: put on, taken off, and what happened in between."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..checks import check_nonnegative_int, describe
from ..errors import ConvBasisWarning, InputError, MissingPathError
from ..plan import HeadPlan, Plan
from .chunks import ChunkedLayer
from .same_in_ranks import check_positions
from .weights import weights_sha256

logger = logging.getLogger("convbasis")

NAME = "conv_basis"
PLAN_FILE = "conv_basis_plan.json"
_ATTRIBUTE = "_conv_basis_plan"


class PlanReport(NamedTuple):
    """What happened in a planned model, summed over its prefills.

    The three numbers of heads add up to prefills × layers × heads of a layer.
    """

    prefills: int
    """Prompts that began with an empty cache; each sequence of a batch is one."""
    heads_approximated: int
    """Heads that were approximated and stayed so."""
    heads_exact: int
    """Heads that were exact from the start: by the plan, for a short prompt, in a layer whose sliding
    window is shorter than the prompt, or for another reason that was logged."""
    heads_fallen_back: int
    """Heads whose estimated error exceeded the tolerance, and that were computed again exactly."""


@dataclass
class AppliedPlan:
    """A plan, how it is applied, and what happened since; shared by the layers of one model."""

    plan: Plan
    min_length: int
    dynamic: bool
    training: bool
    chunked: bool
    before: str
    """The attention implementation to restore."""
    mesh: Any = None
    """Over whose ranks the tokens of a prompt are spread; None for one process."""
    timeout: float = 300.0
    """Seconds for each exchange between ranks."""
    last_rows: int = 0
    """Latest tokens of a prompt in which every head is exact."""
    prefills: int = 0
    approximated: int = 0
    exact: int = 0
    fallen_back: int = 0
    fallbacks: dict[int, list[int]] = field(default_factory=dict)
    """Of each layer, how often each head fell back."""
    told: set[str] = field(default_factory=set)
    chunks: dict[int, ChunkedLayer] = field(default_factory=dict)
    """Of each layer, where the prompt may come in chunks."""

    def layer(self, index: int) -> tuple[HeadPlan, ...]:
        """Return the plans of a layer's heads."""
        return self.plan.heads[index]

    def tolerance(self, n: int) -> float | None:
        """Return the tolerance that estimates are held against for n tokens, None for no check."""
        beyond = n > 2 * self.plan.calibrated_length
        if beyond and "length" not in self.told:
            self.told.add("length")
            warnings.warn(
                f"a prompt of {n} tokens is more than twice as long as the plan's calibration "
                f"({self.plan.calibrated_length}): every head's error estimate is checked; calibrate "
                "on longer texts",
                ConvBasisWarning,
                stacklevel=2,
            )
        return self.plan.tolerance if self.dynamic or beyond else None

    def count(
        self, layer: int, prompts: int, *, approximated: int = 0, fallen_back: Tensor | None = None
    ) -> None:
        """Count the heads of one layer over a batch of prompts; all others were exact.

        Args:
            layer: its number.
            prompts: how many there are.
            approximated: heads that stayed approximated, summed over the prompts.
            fallen_back: bool ``(B, H)``; None if none did.
        """
        again = [0] * self.plan.model.heads if fallen_back is None else fallen_back.sum(0).tolist()
        own = self.fallbacks.setdefault(layer, [0] * self.plan.model.heads)
        self.fallbacks[layer] = [old + new for old, new in zip(own, again, strict=True)]
        self.prefills += prompts if layer == 0 else 0
        self.approximated += approximated
        self.fallen_back += sum(again)
        self.exact += prompts * self.plan.model.heads - approximated - sum(again)

    def tell_once(self, reason: str, level: int = logging.WARNING) -> None:
        """Log why a prompt, or a part of it, is attended exactly; each reason once."""
        if reason not in self.told:
            self.told.add(reason)
            logger.log(level, "attending exactly in spite of the plan: %s", reason)


def applied_to(module: Any) -> AppliedPlan | None:
    """Return what is applied to a model or to one of its attention modules."""
    return getattr(module, _ATTRIBUTE, None)


def apply_plan(
    model: Any,
    plan: Plan,
    *,
    min_length: int | None = None,
    dynamic: bool = True,
    training: bool = False,
    chunked: bool = False,
    mesh: Any = None,
    timeout: float = 300.0,
    last_rows: int = 64,
) -> None:
    """Let a loaded transformers model attend to long prompts by a plan.

    Prompts that begin with an empty cache are approximated; every later call (decoding, further turns)
    is exact. The plan stays with the model object and is not written by ``save_pretrained``: see
    `convbasis.integrations.transformers.save_plan`. A second plan replaces the first one.

    A compiled model that is called without a cache needs an attention_mask, of ones if nothing is
    padded: without one transformers cannot rule out packed documents, and it attends exactly.

    Args:
        model: a transformers model whose attention goes through the attention interface.
        plan: made for this model.
        min_length: prompts of at most so many tokens are attended exactly; None for the plan's own
            measured crossover. Not with chunked=True: how long such a prompt will be is unknown.
        dynamic: compute a head again exactly when its estimated error in a prompt exceeds the plan's
            tolerance. Always so for prompts longer than twice the calibrated length.
        training: approximate in training mode too.
        chunked: the prompt may come in several calls with one cache (chunked prefill): each is
            approximated, strictly causally, with sizes as for a prompt of the calibrated length. What
            the plan corrects by exact rows or stands for by a convolution or low rank is left out, and
            what a prompt looks at is found later, so that more heads fall back; the first 512 tokens
            are exact. Large chunks, of 2,048 tokens and more, gain the most. A chunk counts as one
            prefill in the report; one after decoded tokens, with padding, or of another prompt than
            the chunk before it is exact.
        mesh: a DeviceMesh of one dimension: the tokens of every prompt are spread over its ranks, which
            call the model together, each with its own tokens and their position_ids. Each attends for
            some heads; what is not planned is exact. Whole prompts alone: no decoding, no chunks.
        timeout: seconds in which each exchange between ranks is over, or an error names the rank that
            is missing.
        last_rows: in so many of the latest tokens of every prompt all heads are exact, at a cost of
            2 last_rows / n of exact attention: the first new token is made of them, and what a prompt
            asks for at its end is found as exactly as ever. Not with chunked=True, where the end of the
            prompt is not known.

    Warns:
        ConvBasisWarning: the plan was made for other weights of such a model.

    Raises:
        InputError: the plan is for another model, the model does not attend through the attention
            interface, or an argument cannot be used; with a mesh, rotary positions that depend on the
            length of the prompt.
        MissingExtraError: transformers is not installed.

    Example:
        >>> import convbasis as cb
        >>> import torch
        >>> from convbasis.plan import HeadPlan, HeadSetting, ModelShape
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, vocab_size=9)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        >>> heads = [[HeadPlan(HeadSetting(window=8)), HeadPlan(None)]]
        >>> plan = cb.Plan(ModelShape.of(model), "0" * 64, 0.1, 64, 32, heads)
        >>> cb.apply_plan(model, plan, dynamic=False)
        >>> _ = model(input_ids=torch.zeros(1, 64, dtype=torch.int64))
        >>> cb.plan_report(model)
        PlanReport(prefills=1, heads_approximated=1, heads_exact=1, heads_fallen_back=0)
        >>> cb.remove_plan(model)
    """
    from . import transformers  # noqa: F401 (registers the attention)

    if not isinstance(plan, Plan):
        raise InputError(f"plan is {describe(plan)}; a Plan is wanted: Plan.load reads one from a file")
    plan.check_model(model)
    _compare_weights(model, plan)
    if min_length is None:
        min_length = plan.min_length
    min_length = check_nonnegative_int("min_length", min_length)
    last_rows = check_nonnegative_int("last_rows", last_rows)
    if mesh is not None and chunked:
        raise InputError("mesh was given with chunked=True; over ranks a prompt comes as a whole")
    if mesh is not None:
        check_positions(model)
    layers = _attention_modules(model)
    missing = set(range(plan.model.layers)) - {module.layer_idx for module in layers}
    if missing:
        raise InputError(
            f"no attention was found in layers {sorted(missing)} of {type(model).__name__}"
        )
    earlier = applied_to(model)
    before = model.config._attn_implementation if earlier is None else earlier.before
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise InputError(
            f"{type(model).__name__} does not attend through the attention interface of transformers; "
            "a plan needs a model that does"
        )
    applied = AppliedPlan(
        plan,
        min_length,
        bool(dynamic),
        bool(training),
        bool(chunked),
        before,
        mesh,
        timeout,
        last_rows,
    )
    for module in (model, *layers):
        setattr(module, _ATTRIBUTE, applied)


def _compare_weights(model: Any, plan: Plan) -> None:
    """Warn if the plan is of other weights than the model's: its errors and costs may be others."""
    if plan.weights_sha256 is None or weights_sha256(model) in (None, plan.weights_sha256):
        return
    warnings.warn(
        f"the plan was made for a {plan.model.name!r} with other weights than this "
        f"{type(model).__name__} has: its settings may be too coarse for it; calibrate this model, or "
        "see what `convbasis compare` finds",
        ConvBasisWarning,
        stacklevel=3,
    )


def remove_plan(model: Any) -> None:
    """Take a model's plan off and restore the attention implementation that it had before.

    Args:
        model: a model that `apply_plan` was called on.

    Raises:
        InputError: the model has no plan.
    """
    applied = _applied(model)
    for module in (model, *_attention_modules(model)):
        delattr(module, _ATTRIBUTE)
    model.set_attn_implementation(applied.before)


def plan_report(model: Any) -> PlanReport:
    """Return what happened in a planned model since its plan was applied.

    Args:
        model: a model that `apply_plan` was called on.

    Returns:
        `PlanReport`.

    Raises:
        InputError: the model has no plan.
    """
    applied = _applied(model)
    return PlanReport(applied.prefills, applied.approximated, applied.exact, applied.fallen_back)


def fallbacks_by_head(model: Any) -> list[list[int]]:
    """Return for each layer and head in how many prompts it fell back since the plan was applied.

    Args:
        model: a model that `apply_plan` was called on.

    Raises:
        InputError: the model has no plan.
    """
    applied = _applied(model)
    nothing = [0] * applied.plan.model.heads
    return [list(applied.fallbacks.get(layer, nothing)) for layer in range(applied.plan.model.layers)]


def save_plan(model: Any, folder: str | PathLike[str]) -> Path:
    """Write a model's plan beside its weights, as ``conv_basis_plan.json``.

    Args:
        model: a model that `apply_plan` was called on.
        folder: where ``model.save_pretrained`` wrote to.

    Returns:
        the file's path.

    Raises:
        InputError: the model has no plan.
        MissingPathError: there is no such folder.
    """
    place = Path(folder) / PLAN_FILE
    _applied(model).plan.save(place)
    return place


def load_plan(folder: str | PathLike[str]) -> Plan:
    """Read the plan that `save_plan` wrote beside a model's weights.

    Args:
        folder: where the model is.

    Raises:
        FileFormatError: the file is damaged.
        MissingPathError: there is no plan in this folder.
    """
    place = Path(folder) / PLAN_FILE
    if not place.is_file():
        raise MissingPathError(f"there is no {PLAN_FILE} in {str(folder)!r}; save_plan writes one")
    return Plan.load(place)


def _applied(model: Any) -> AppliedPlan:
    applied = applied_to(model)
    if applied is None:
        raise InputError(f"this {type(model).__name__} has no plan; apply_plan gives it one")
    return applied


def _attention_modules(model: Any) -> list[Any]:
    """Return the causal self-attention modules of the model's text layers."""
    config = model.config.get_text_config()
    return [
        module
        for module in model.modules()
        if getattr(module, "config", None) is config
        and isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False)
    ]
