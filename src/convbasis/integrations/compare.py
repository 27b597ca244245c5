"""A planned model beside the exact one: what the next tokens lose, and what the prompt gains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..plan import Plan
from ..timing import seconds_on
from .planned import NAME, PlanReport, applied_to, apply_plan, plan_report, remove_plan


class Clock:
    """Seconds spent in attention."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.seconds = 0.0


class Scored(NamedTuple):
    """One way to attend to a prompt, and what came after."""

    loss: float
    """Mean negative log-likelihood of the scored tokens, in nats."""
    perplexity_ratio: float
    """Perplexity over the exact model's."""
    kl: float
    """Mean of KL(exact || this) over the scored tokens, in nats."""
    kl_standard_error: float
    """Of that mean, tokens taken as independent."""
    top1: float
    """Share of the scored tokens whose likeliest token is the exact model's."""
    attention_seconds: float
    """Of all attention in the prompt, fits, choices and estimates included."""
    prompt_seconds: float
    """Of the whole prompt."""


class Comparison(NamedTuple):
    """A text with a plan and without."""

    exact: Scored
    planned: Scored
    report: PlanReport
    """Of one prompt."""


@torch.no_grad()
def compare_plan(
    model: Any,
    plan: Plan,
    input_ids: Tensor,
    *,
    scored: int = 512,
    repeats: int = 1,
    min_length: int | None = None,
    dynamic: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Attend to the beginning of a text by a plan and exactly, and score what follows.

    The first n - scored tokens are the prompt; the last ones are scored with exact attention over the
    cache that it left. Both ways take turns; seconds are medians.

    Args:
        model: a transformers model without a plan.
        plan: for this model.
        input_ids: ``(1, n)``.
        scored: tokens to score, >= 2.
        repeats: runs of each way.
        min_length: as in `apply_plan`.
        dynamic: as in `apply_plan`.
        progress: called with the number of runs done and of all.

    Raises:
        InputError: the plan is for another model, the model has a plan already, or the text is too
            short.
    """
    n = input_ids.shape[1]
    if not 2 <= scored < n:
        raise InputError(
            f"scored={scored}: at least 2 tokens, and fewer than the text's {n}, are wanted"
        )
    if applied_to(model) is not None:
        raise InputError(f"this {type(model).__name__} has a plan already; remove_plan takes it off")
    plan.check_model(model)
    targets = input_ids[0, -scored:]
    times: list[list[tuple[float, float]]] = [[], []]
    logs: list[Tensor] = []
    report = PlanReport(0, 0, 0, 0)
    with timed_attention(model) as clock:
        # Whatever is set up at a first call is paid before the clock runs.
        model(input_ids[:, : min(64, n)], logits_to_keep=1)
        for repeat in range(repeats):
            for way in (0, 1):
                if way:
                    apply_plan(model, plan, min_length=min_length, dynamic=dynamic)
                try:
                    found, *seconds = run_prompt(model, input_ids, scored, clock)
                    if way:
                        report = plan_report(model)
                finally:
                    if way:
                        remove_plan(model)
                times[way].append((seconds[0], seconds[1]))
                if not repeat:
                    logs.append(found)
                if progress is not None:
                    progress(2 * repeat + way + 1, 2 * repeats)
    exact, planned = (_scored(logs[way], logs[0], targets, times[way]) for way in (0, 1))
    return Comparison(exact, planned, report)


@contextmanager
def timed_attention(model: Any) -> Iterator[Clock]:
    """Let a model attend under a clock, exactly where no plan is applied to it."""
    from transformers import AttentionInterface

    from .exact import exact_attention
    from .transformers import attention_forward

    clock = Clock()

    def attend(module: Any, query: Tensor, *inputs: Any, **options: Any) -> Any:
        run = exact_attention if applied_to(module) is None else attention_forward
        begin = seconds_on(query.device)
        result = run(module, query, *inputs, **options)
        clock.seconds += seconds_on(query.device) - begin
        return result

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, attend)
    try:
        model.set_attn_implementation(NAME)
        yield clock
    finally:
        AttentionInterface.register(NAME, attention_forward)
        model.set_attn_implementation(before)


@torch.no_grad()
def run_prompt(model: Any, ids: Tensor, scored: int, clock: Clock) -> tuple[Tensor, float, float]:
    """Return what is said of the last tokens, and the seconds of the prompt before them.

    Args:
        model: a transformers model under `timed_attention`.
        ids: ``(1, n)``.
        scored: last tokens, attended to exactly over the cache that the others left.
        clock: of `timed_attention`.

    Returns:
        log-probabilities ``(scored, V)``, of which the first come from the prompt itself, and the
        attention's and the whole prompt's seconds.
    """
    clock.seconds = 0.0
    begin = seconds_on(ids.device)
    done = model(ids[:, :-scored], use_cache=True, logits_to_keep=1)
    whole, attention = seconds_on(ids.device) - begin, clock.seconds
    rest = model(ids[:, -scored:], past_key_values=done.past_key_values, use_cache=True)
    logits = torch.cat([done.logits[0, -1:], rest.logits[0, :-1]])
    return logits.float().log_softmax(-1), attention, whole


def _scored(logs: Tensor, exact: Tensor, targets: Tensor, times: list[tuple[float, float]]) -> Scored:
    kl = (exact.exp() * (exact - logs)).sum(-1)
    loss, base = (float(-one.gather(1, targets[:, None]).mean()) for one in (logs, exact))
    error = float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else 0.0
    attention, whole = (statistics.median(column) for column in zip(*times, strict=True))
    return Scored(
        loss=loss,
        perplexity_ratio=math.exp(loss - base),
        kl=float(kl.mean()),
        kl_standard_error=error,
        top1=float((logs.argmax(-1) == exact.argmax(-1)).double().mean()),
        attention_seconds=attention,
        prompt_seconds=whole,
    )
