"""`convbasis generate`: continue a long prompt, attended to by a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from ..errors import InputError
from ..integrations.generate import Generated, generate, warm_up
from ..integrations.models import load_model
from ..integrations.planned import PlanReport, apply_plan, plan_report, remove_plan
from ..integrations.texts import check_positions, checked_ids, read_text
from ..plan import Plan
from ..report.content import Cell, Report
from .progress import one_bar
from .results import STANDARD_OUTPUT, check_outputs, deliver, provenance, rounded, source


def run_generate(
    model: str,
    plan_file: Path | None,
    prompt_file: Path,
    max_new_tokens: int,
    exact: bool,
    against_exact: bool,
    min_length: int | None,
    json_output: Path | None,
    console: Console,
) -> None:
    """Print the text on standard output, and times and what the plan did to `console`."""
    if exact and against_exact:
        raise typer.BadParameter("--exact and --against-exact exclude each other")
    if exact and min_length is not None:
        raise typer.BadParameter("--min-length is of a plan; --exact has none")
    if (plan_file is None) != exact:
        raise typer.BadParameter("give either --plan FILE or --exact")
    check_outputs(json_output, inputs=[model, plan_file, prompt_file])
    plan = None if plan_file is None else Plan.load(plan_file)
    title, prompt = read_text(prompt_file)
    loaded = load_model(model)
    ids = loaded.tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < 1:
        raise InputError(f"{str(prompt_file)!r} has no tokens; a prompt is wanted")
    check_positions(loaded.model, ids.shape[1] + max_new_tokens)
    checked_ids(loaded.model, ids)
    report: PlanReport | None = None
    warm_up(loaded.model, ids)
    if plan is not None:
        apply_plan(loaded.model, plan, min_length=min_length)
    begun: list[int] = []
    try:
        found = _with_bar("generating", loaded.model, ids, max_new_tokens, begun)
    except KeyboardInterrupt:
        typer.echo(
            loaded.tokenizer.decode(begun, skip_special_tokens=True), err=json_output == STANDARD_OUTPUT
        )
        raise KeyboardInterrupt(f"{len(begun)} of {max_new_tokens} tokens are printed") from None
    if plan is not None:
        report = plan_report(loaded.model)
        remove_plan(loaded.model)
    text = loaded.tokenizer.decode(found.ids, skip_special_tokens=True)
    summary: list[tuple[str, Cell]] = [
        ("prompt, tokens", ids.shape[1]),
        ("new tokens", len(found.ids)),
        ("time to first token, s", rounded(found.first_seconds, 4)),
        ("whole time, s", rounded(found.seconds, 4)),
    ]
    if report is not None:
        summary += [(name.replace("_", " "), count) for name, count in report._asdict().items()]
    if json_output != STANDARD_OUTPUT:
        typer.echo(text)
    if against_exact:
        summary += _beside(loaded.model, ids, max_new_tokens, found)
    where = provenance(model=loaded.name, sources=[source(title, ids)])
    result = Report(
        title=f"Text of {loaded.name}, {'exact' if plan is None else 'by a plan'}",
        provenance=where,
        summary=tuple(summary) if json_output is None else (*summary, ("text", text)),
    )
    deliver(result, console, json_output, None)


def _beside(
    model: Any, ids: torch.Tensor, max_new_tokens: int, found: Generated
) -> list[tuple[str, Cell]]:
    exact = _with_bar("the same, exact", model, ids, max_new_tokens, [])
    pairs = zip(found.ids, exact.ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found.ids), len(exact.ids)))
    return [
        ("time to first token, exact, s", rounded(exact.first_seconds, 4)),
        ("first token, times faster", rounded(exact.first_seconds / found.first_seconds, 3)),
        ("first tokens that are the same", f"{same} of {len(exact.ids)}"),
    ]


def _with_bar(name: str, model: Any, ids: torch.Tensor, most: int, begun: list[int]) -> Generated:
    """Generate, and keep in `begun` what there is so far."""
    with one_bar(name, most) as step:

        def tell(new: list[int]) -> None:
            begun[:] = new
            step(len(new), most)

        return generate(model, ids, most, tell)
