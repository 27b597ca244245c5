"""`convbasis calibrate`: measure every head of a model on texts and write a plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..integrations.calibrate import Calibration, calibration
from ..integrations.models import load_model
from ..integrations.texts import read_texts, text_tokens
from ..integrations.views import SeenLayer, see_plan
from ..plan import Plan
from ..report.content import HeadView, Provenance, Report, Table
from .head_views import head_views, near_layers, with_errors
from .interruption import keeping
from .plan_maps import plan_maps
from .progress import one_bar
from .results import check_outputs, deliver, provenance, rounded, source
from .trade_off import trade_off_chart
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
        with one_bar("measuring layers and the model") as step:
            found = calibration(
                loaded.model,
                torch.cat(ids),
                tolerance=tolerance,
                margin=margin,
                budget=None if budget == math.inf else budget,
                checkpoint=checkpoint,
                progress=step,
                seed=seed,
            )
        found.plan.save(output)
        views: list[HeadView] = []
        if json_output is not None or page is not None:
            views = _views(loaded.model, ids[0], found.plan, seed)
        sources = [source(name, own) for (name, _), own in zip(contents, ids, strict=True)]
        where = provenance(model=loaded.name, sources=sources)
        report = plan_as_report(found, views, output, where)
        deliver(report, console, json_output, page)


def _views(model: Any, ids: torch.Tensor, plan: Plan, seed: int) -> list[HeadView]:
    n = ids.shape[1]
    near, tiles = near_layers(plan.model.layers, plan.model.heads)
    with one_bar("pictures of heads", plan.model.layers) as step:
        seen = see_plan(model, ids, plan, near=near, tiles=tiles, progress=step, seed=seed)
    return [view for layer in sorted(seen) for view in _layer_views(plan, layer, seen[layer], n, tiles)]


def _layer_views(plan: Plan, layer: int, seen: SeenLayer, n: int, tiles: int) -> list[HeadView]:
    words = [with_errors(head.setting, n, head.error, None) for head in plan.heads[layer]]
    return head_views(layer, seen.lag_weights, seen.heads, words, n, tiles)


def plan_as_report(
    found: Calibration, views: Sequence[HeadView], place: Path, where: Provenance
) -> Report:
    """Return what a plan holds.

    Args:
        found: the plan, and what it was chosen from.
        views: of its heads in the first text.
        place: the file that it is in.
        where: it comes from.
    """
    plan = found.plan
    n, kl = plan.calibrated_length, plan.predicted_kl
    heads = plan.model.layers * plan.model.heads
    settings = Counter(in_words(head.setting, n) for layer in plan.heads for head in layer)
    mean = sum(head.cost for layer in plan.heads for head in layer) / heads
    notes = [
        f"plan written to {place}",
        "Times are of this machine, the least of three turns; a second calibration may choose "
        "otherwise where two settings take about as long.",
    ]
    if not plan.approximated:
        notes.append(
            "No head is approximated: no setting was both good enough and faster. A longer text, a "
            "larger tolerance, or a machine that does nothing else meanwhile may change that."
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
        maps=plan_maps(plan, n),
        heads=tuple(views),
        charts=(trade_off_chart(found),),
        tables=(Table("Settings", ("setting", "heads"), tuple(settings.most_common())),),
        notes=tuple(notes),
    )
