"""`convbasis compare`: a plan beside exact attention, in speed and in what the next tokens lose."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..integrations.compare import Comparison, compare_plan
from ..integrations.models import load_model
from ..integrations.texts import read_texts, text_tokens
from ..plan import Plan
from ..plan.trade_off import place_of
from ..report.content import Cell, Chart, Line, Provenance, Report, Source, Table
from .plan_maps import plan_maps
from .progress import one_bar
from .results import check_outputs, deliver, provenance, rounded, source
from .trade_off import ATTENTION_COST

_KL = "KL(exact || plan), nats"
_FASTER = "exact time / plan time"
_SUMMED = (
    "perplexity, plan / exact",
    _KL,
    "top-1 agreement",
    f"attention, {_FASTER}",
    f"prompt, {_FASTER}",
)


def run_compare(
    model: str,
    plan_file: Path,
    texts: Sequence[Path],
    length: int,
    scored: int,
    repeats: int,
    min_length: int | None,
    fallback: bool,
    json_output: Path | None,
    page: Path | None,
    console: Console,
) -> None:
    """Compare text by text, print a table, and write what is asked for.

    After Ctrl-C the texts that are done are printed and written.
    """
    check_outputs(json_output, page=page, inputs=[model, plan_file, *texts])
    plan = Plan.load(plan_file)
    contents = read_texts(texts)
    loaded = load_model(model)
    plan.check_model(loaded.model)
    ids = [text_tokens(loaded.model, loaded.tokenizer, *text, length) for text in contents]
    found: list[tuple[Source, Comparison]] = []
    stopped = False
    try:
        for (name, _), own in zip(contents, ids, strict=True):
            with one_bar(name[:34], 2 * repeats) as step:
                comparison = compare_plan(
                    loaded.model,
                    plan,
                    own,
                    scored=scored,
                    repeats=repeats,
                    min_length=min_length,
                    dynamic=fallback,
                    progress=step,
                )
            found.append((source(name, own), comparison))
    except KeyboardInterrupt:
        stopped = True
    if stopped and not found:
        raise KeyboardInterrupt("no text was done")
    where = provenance(model=loaded.name, sources=[one for one, _ in found])
    shortest = plan.min_length if min_length is None else min_length
    report = comparison_report(plan, shortest, found, length - scored, scored, repeats, where)
    deliver(report, console, json_output, page)
    if stopped:
        raise KeyboardInterrupt(f"{len(found)} of {len(contents)} texts are in the result")


def comparison_report(
    plan: Plan,
    min_length: int,
    found: Sequence[tuple[Source, Comparison]],
    prompt: int,
    scored: int,
    repeats: int,
    where: Provenance,
) -> Report:
    """Return what the comparison of some texts says.

    Args:
        plan: that was compared.
        min_length: prompts of at most so many tokens were exact.
        found: one entry for each text.
        prompt: tokens attended to by the plan.
        scored: tokens scored after them.
        repeats: runs of each way.
        where: the figures come from.
    """
    figures = [_figures(comparison) for _, comparison in found]

    def mean(name: str) -> Cell:
        return rounded(statistics.fmean(own[name] for own in figures))

    notes = [
        f"The first {prompt:,} tokens are attended to by the plan; the next {scored:,} are scored with "
        "exact attention over the cache that the prompt left. KL is of the next token's distribution, "
        "from exact to planned. Times include fits, choices and error estimates.",
    ]
    own_texts = [one.name for one, _ in found if one.sha256 == plan.texts_sha256]
    if own_texts:
        notes.append(
            f"{own_texts[0]} is what the plan was calibrated on: others (--text) tell what it does "
            "on yours."
        )
    if prompt <= min_length:
        notes.append(
            f"All heads were exact: the plan leaves prompts of at most {min_length:,} tokens exact "
            "(--min-length changes that)."
        )
    if all(own["heads approximated"] == 0 for own in figures):
        notes.append(
            "No head was approximated: differences in time are of the machine, or what heads that fell "
            "back cost twice."
        )
    if repeats == 1:
        notes.append("Times are of one run each, and so of what else the machine did; see --repeats.")
    return Report(
        title=f"Plan beside exact attention, {where.model}",
        provenance=where,
        summary=(
            ("plan", repr(plan).strip("<>")),
            ("prompt, tokens", prompt),
            *((f"{name}, mean", mean(name)) for name in _SUMMED),
        ),
        maps=plan_maps(plan, prompt),
        charts=(_chart(plan, figures, [one.name for one, _ in found]),),
        tables=(
            Table(
                "Texts",
                ("figure", *(one.name for one, _ in found)),
                tuple((name, *(own[name] for own in figures)) for name in figures[0]),
            ),
        ),
        notes=tuple(notes),
    )


def _chart(plan: Plan, figures: Sequence[dict[str, float]], names: Sequence[str]) -> Chart:
    """Return error against cost: every text as it was measured, and what the plan predicts."""
    predicted = place_of(plan.heads, plan.predicted_kl)
    of = f"predicted at {plan.calibrated_length:,} tokens"
    return Chart(
        title="Error against cost, one point for each text",
        x_title=ATTENTION_COST,
        y_title=_KL,
        lines=(
            Line(
                "measured",
                tuple(
                    rounded(own["attention, plan, s"] / own["attention, exact, s"]) for own in figures
                ),
                tuple(own[_KL] for own in figures),
                tuple(names),
                joined=False,
            ),
        ),
        marked=(
            None
            if plan.predicted_kl is None
            else (rounded(predicted.cost), rounded(predicted.error), of)
        ),
    )


def _figures(found: Comparison) -> dict[str, float]:
    exact, planned, report = found
    figures = {
        "loss, exact": exact.loss,
        "loss, plan": planned.loss,
        "perplexity, plan / exact": planned.perplexity_ratio,
        _KL: planned.kl,
        "KL, standard error": planned.kl_standard_error,
        "top-1 agreement": planned.top1,
        "attention, exact, s": exact.attention_seconds,
        "attention, plan, s": planned.attention_seconds,
        f"attention, {_FASTER}": exact.attention_seconds / planned.attention_seconds,
        "prompt, exact, s": exact.prompt_seconds,
        "prompt, plan, s": planned.prompt_seconds,
        f"prompt, {_FASTER}": exact.prompt_seconds / planned.prompt_seconds,
    }
    heads = {
        "heads approximated": report.heads_approximated,
        "heads exact": report.heads_exact,
        "heads fallen back": report.heads_fallen_back,
    }
    return {**{name: rounded(figure) for name, figure in figures.items()}, **heads}
