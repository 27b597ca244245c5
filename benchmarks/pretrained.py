"""A pretrained model on long prompts: what a plan costs and what it changes.

    python benchmarks/pretrained.py calibrate [--length 8192] [--tolerance 0.2] [--margin 0.65]
    python benchmarks/pretrained.py score [--lengths 2048 4096 8192] [--text FILE ...]

`calibrate` makes a plan for SmolLM2-135M from English prose and keeps it beside the results; it goes on
where it was stopped. `score` takes other texts: n - 512 tokens are the prompt, attended to by the plan,
and the next 512 are scored with exact attention over the cache that the prompt left. Beside the plan,
the same setting for all heads. KL is that of the next token's distribution from exact to approximate,
in nats; time is that of all calls of attention in the prompt, fits, choices and estimates included, and
of the whole prompt. Methods take turns; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

import convbasis as cb
from convbasis.integrations import transformers as integration
from convbasis.integrations.calibrate import calibrate as calibrate_model
from convbasis.integrations.smollm2 import load_smollm2, sample_text, token_ids
from convbasis.plan import HeadPlan, HeadSetting, Plan
from convbasis.storage import save_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
SCORED = 512
UNIFORM = {
    "window + sinks": HeadSetting(512, 4, 0),
    "window + columns": HeadSetting(384, 4, 60),
    "blocks": HeadSetting(128, 4, 60, 4),
}


def texts(extra: list[Path]) -> dict[str, str]:
    """Texts of other kinds than the one of the calibration."""
    library = Path(sysconfig.get_path("stdlib"))
    found = {
        "source code": "\n".join(
            (library / name).read_text(encoding="utf-8")
            for name in ("argparse.py", "ast.py", "inspect.py", "typing.py")
        ),
        "documentation": "\n\n".join(
            path.read_text(encoding="utf-8")
            for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        ),
        "change history": (library / "idlelib/NEWS.txt").read_text(encoding="utf-8"),
        "licence": (ROOT / "LICENSE").read_text(encoding="utf-8"),
    }
    return {**found, **{path.name: path.read_text(encoding="utf-8") for path in extra}}


def plan_file(options: argparse.Namespace) -> Path:
    return options.folder / f"smollm2-{options.length}.plan.json"


def calibrate(options: argparse.Namespace) -> None:
    loaded = load_smollm2()
    ids = token_ids(loaded.tokenizer, sample_text(), options.length)
    begin = time.perf_counter()
    plan = calibrate_model(
        loaded.model,
        ids,
        tolerance=options.tolerance,
        margin=options.margin,
        budget=options.budget,
        checkpoint=options.folder / f"smollm2-{options.length}.measured.json",
        progress=lambda done, total: print(f"layer {done} of {total}", flush=True),
    )
    plan.save(plan_file(options))
    print(f"{plan!r}, exact up to {plan.min_length} tokens; {time.perf_counter() - begin:.0f} s")


class Clock:
    """Time spent in attention; registered in place of the integration's own function."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.seconds = 0.0
        AttentionInterface.register("conv_basis", self)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Attend, and add the time that it takes."""
        begin = time.perf_counter()
        result = integration.attention_forward(*inputs, **options)
        self.seconds += time.perf_counter() - begin
        return result


@torch.no_grad()
def run(model: Any, ids: torch.Tensor, clock: Clock) -> tuple[torch.Tensor, float, float]:
    """Return the logits of the scored tokens, the attention's and the whole prompt's seconds."""
    clock.seconds = 0.0
    begin = time.perf_counter()
    done = model(ids[:, :-SCORED], use_cache=True, logits_to_keep=1)
    whole, attention = time.perf_counter() - begin, clock.seconds
    rest = model(ids[:, -SCORED:], past_key_values=done.past_key_values, use_cache=True)
    return rest.logits[0, :-1].log_softmax(-1), attention, whole


def uniform(plan: Plan, setting: HeadSetting) -> Plan:
    heads = tuple(tuple(HeadPlan(setting) for _ in layer) for layer in plan.heads)
    return dataclasses.replace(plan, heads=heads)


def without_far_field(plan: Plan) -> Plan:
    def near(head: HeadPlan) -> HeadPlan:
        if head.setting is None:
            return head
        setting = dataclasses.replace(head.setting, far_field="none", key_weights=False)
        return dataclasses.replace(head, setting=setting)

    return dataclasses.replace(plan, heads=tuple(tuple(map(near, layer)) for layer in plan.heads))


def score(options: argparse.Namespace) -> None:
    loaded = load_smollm2()
    model = loaded.model
    files = options.plans or [plan_file(options)]
    plans = {
        "plan" if len(files) == 1 else f"plan {path.name.removesuffix('.plan.json')}": Plan.load(path)
        for path in files
    }
    plan = next(iter(plans.values()))
    methods: dict[str, tuple[Plan, bool] | None] = {
        "exact": None,
        **{name: (found, True) for name, found in plans.items()},
        **{f"{name}, never falling back": (found, False) for name, found in plans.items()},
        "plan without far field": (without_far_field(plan), False),
        **{name: (uniform(plan, setting), False) for name, setting in UNIFORM.items()},
    }
    if options.methods:
        methods = {name: methods[name] for name in ("exact", *options.methods)}
    rows = []
    model.set_attn_implementation("conv_basis")
    clock = Clock()
    for n in options.lengths:
        for text, content in texts(options.text).items():
            if options.kinds and text not in options.kinds:
                continue
            try:
                ids = token_ids(loaded.tokenizer, content, n)
            except cb.InputError:
                print(f"{text} has fewer than {n} tokens: left out")
                continue
            rows.extend(_score_text(model, plan, methods, ids, n, text, clock, options))
    table(rows)
    content = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "plans": {name: repr(found) for name, found in plans.items()},
        "rows": rows,
    }
    save_text(options.folder / "pretrained.json", json.dumps(content, indent=1) + "\n")


def _score_text(
    model: Any,
    plan: Plan,
    methods: dict[str, tuple[Plan, bool] | None],
    ids: torch.Tensor,
    n: int,
    text: str,
    clock: Clock,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    targets = ids[0, -SCORED + 1 :]
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    exact = torch.empty(0)
    for repeat in range(options.repeats):
        for name, applied in methods.items():
            if applied is not None:
                cb.apply_plan(model, applied[0], min_length=0, dynamic=applied[1])
                AttentionInterface.register("conv_basis", clock)
            logs, attention, whole = run(model, ids, clock)
            times[name].append((attention, whole))
            report = None
            if applied is not None:
                report = cb.plan_report(model)
                cb.remove_plan(model)
                model.set_attn_implementation("conv_basis")
            if repeat:
                continue
            if applied is None:
                exact = logs
            kl = (exact.exp() * (exact - logs)).sum(-1)
            loss = -logs.gather(1, targets[:, None])[:, 0]
            found[name] = {
                "n": n,
                "text": text,
                "method": name,
                "kl": float(kl.mean()),
                "kl_standard_error": float(kl.std() / math.sqrt(len(kl))),
                "loss": float(loss.mean()),
                "top1": float((logs.argmax(-1) == exact.argmax(-1)).double().mean()),
                "report": None if report is None else report._asdict(),
            }
    for name, values in times.items():
        attention, whole = (statistics.median(column) for column in zip(*values, strict=True))
        base = [statistics.median(column) for column in zip(*times["exact"], strict=True)]
        found[name] |= {
            "attention_seconds": attention,
            "prompt_seconds": whole,
            "attention_ratio": base[0] / attention,
            "prompt_ratio": base[1] / whole,
            "loss_ratio": math.exp(found[name]["loss"] - found["exact"]["loss"]),
        }
        line(found[name])
    return list(found.values())


def line(row: dict[str, Any]) -> None:
    report = row["report"]
    heads = (
        ""
        if report is None
        else (
            f"{report['heads_approximated']} / {report['heads_exact']} / {report['heads_fallen_back']}"
        )
    )
    print(
        f"| {row['n']:,} | {row['text']} | {row['method']} | {row['attention_ratio']:.2f}x "
        f"| {row['prompt_ratio']:.2f}x | {row['kl']:.4f} ± {row['kl_standard_error']:.4f} "
        f"| {row['loss_ratio']:.4f} | {row['top1']:.1%} | {heads} |",
        flush=True,
    )


def table(rows: list[dict[str, Any]]) -> None:
    print(
        "\n| n | method | attention | prompt | KL, mean / worst text | perplexity, mean / worst "
        "| top-1, worst | heads approximated and kept |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for n in sorted({row["n"] for row in rows}):
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["n"] == n and row["method"] == name]
            mean: Callable[[str], float] = lambda key: statistics.fmean(row[key] for row in own)  # noqa: E731, B023
            worst = max(abs(row["loss_ratio"] - 1) for row in own)
            kept = [
                r["heads_approximated"] / sum(r[k] for k in r if k != "prefills")
                for r in (row["report"] for row in own)
                if r is not None
            ]
            print(
                f"| {n:,} | {name} | {mean('attention_ratio'):.2f}x | {mean('prompt_ratio'):.2f}x "
                f"| {mean('kl'):.4f} / {max(row['kl'] for row in own):.4f} "
                f"| {mean('loss_ratio') - 1:+.2%} / {worst:.2%} "
                f"| {min(row['top1'] for row in own):.1%} "
                f"| {'' if not kept else f'{statistics.fmean(kept):.0%}'} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("calibrate")
    part.add_argument("--tolerance", type=float, default=0.25)
    part.add_argument("--margin", type=float, default=0.8, help="of the tolerance")
    part.add_argument("--budget", type=float, default=0.003, help="KL, in nats")
    part.set_defaults(job=calibrate)
    other = parts.add_parser("score")
    other.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    other.add_argument("--text", type=Path, nargs="*", default=[])
    other.add_argument("--kinds", nargs="*", default=[], help="of texts; all by default")
    other.add_argument("--plans", type=Path, nargs="*", default=[], help="instead of calibrate's")
    other.add_argument("--methods", nargs="*", default=[])
    other.add_argument("--repeats", type=int, default=1)
    other.set_defaults(job=score)
    for each in (part, other):
        each.add_argument("--length", type=int, default=8192, help="of the calibration")
        each.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.job(options)


if __name__ == "__main__":
    main()
