"""`convbasis calibrate`: measure every head of a model on texts and write a plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from ..integrations.calibrate import calibrate
from ..integrations.models import load_model
from ..integrations.texts import read_texts, text_tokens
from ..plan import Plan
from ..report.content import HeadMap, Provenance, Report, Table
from .interruption import keeping
from .progress import one_bar
from .results import check_outputs, deliver, provenance, rounded, source
from .words import in_words


def run_calibrate(
    model: str,
    texts: Sequence[Path],
    output: Path,
    length: int,
    tolerance: float,
    margin: float,
    budget: float,
    seed: int,
    json_output: Path | None,
    page: Path | None,
    console: Console,
) -> None:
    """Calibrate, write the plan, and print what it holds; an infinite budget is none."""
    check_outputs(json_output, output, page=page, inputs=[model, *texts])
    contents = read_texts(texts)
    loaded = load_model(model)
    ids = [text_tokens(loaded.model, loaded.tokenizer, *text, length) for text in contents]
    with keeping(output) as checkpoint:
        with one_bar("measuring layers") as step:
            plan = calibrate(
                loaded.model,
                torch.cat(ids),
                tolerance=tolerance,
                margin=margin,
                budget=None if budget == math.inf else budget,
                checkpoint=checkpoint,
                progress=step,
                seed=seed,
            )
        plan.save(output)
        sources = [source(name, own) for (name, _), own in zip(contents, ids, strict=True)]
        report = plan_as_report(plan, output, provenance(model=loaded.name, sources=sources))
        deliver(report, console, json_output, page)


def plan_as_report(plan: Plan, place: Path, where: Provenance) -> Report:
    """Return what a plan holds.

    Args:
        plan: the plan.
        place: the file that it is in.
        where: it comes from.
    """
    n, kl = plan.calibrated_length, plan.predicted_kl
    heads = plan.model.layers * plan.model.heads
    found = Counter(in_words(head.setting, n) for layer in plan.heads for head in layer)
    words = tuple(tuple(in_words(head.setting, n) for head in layer) for layer in plan.heads)
    errors = tuple(tuple(rounded(head.error) for head in layer) for layer in plan.heads)
    costs = tuple(tuple(rounded(head.cost) for head in layer) for layer in plan.heads)
    mean = sum(head.cost for layer in plan.heads for head in layer) / heads
    notes = [
        f"plan written to {place}",
        "Times are of this machine, the least of three turns; a second calibration may choose "
        "otherwise where two settings take about as long.",
    ]
    if not plan.approximated:
        notes.append(
            "No head is approximated: no setting was both good enough and faster. A longer text or a "
            "larger tolerance may change that."
        )
    return Report(
        title=f"Plan for {where.model}",
        provenance=where,
        summary=(
            ("heads approximated", f"{plan.approximated} of {heads}"),
            ("tolerance", plan.tolerance),
            ("predicted KL, nats", None if kl is None else rounded(kl)),
            ("calibrated length, tokens", n),
            ("exact up to, tokens", plan.min_length),
            ("attention time / exact, by heads", rounded(mean, 3)),
        ),
        maps=(
            HeadMap("Setting", "", words),
            HeadMap("Error estimate, 0 for exact heads", "relative error, 95 % bound", errors),
            HeadMap("Time", "of exact attention's", costs),
        ),
        tables=(Table("Settings", ("setting", "heads"), tuple(found.most_common())),),
        notes=tuple(notes),
    )
