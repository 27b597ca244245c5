"""A pretrained model on long prompts: what a plan costs and what it changes.

    python benchmarks/pretrained.py calibrate [--length 8192] [--budget 0.001]
    python benchmarks/pretrained.py score [--lengths 2048 4096 8192] [--text FILE ...]
    python benchmarks/pretrained.py curve [--budgets 0.0005 0.001 0.002 0.005 0.02]
    python benchmarks/pretrained.py parts [--lengths 2048 4096 8192]
    python benchmarks/pretrained.py bounds [--kinds "source code" licences]
    python benchmarks/pretrained.py passkey [--lengths 2048 4096 8192]
    python benchmarks/pretrained.py long [--lengths 32768]
    python benchmarks/pretrained.py chunks [--lengths 8192] [--sizes 1024 2048 4096]
    python benchmarks/pretrained.py chunk_bounds [--lengths 8192] [--sizes 512 1024 2048 4096]

`calibrate` makes a plan for SmolLM2-135M from English prose and keeps it beside the results; it goes on
where it was stopped. `score` takes other texts: n - 512 tokens are the prompt, attended to by the plan,
and the next 512 are scored with exact attention over the cache that the prompt left. Beside the plan:
one without far fields, one setting for all heads, and the plain conv basis. `curve` does so for plans
of several budgets, one setting for all heads and the plain conv basis, and draws KL against time.
`parts` gives every head the same setting, and asks what each part of hybrid attention does at which
cost, and beside windows with columns of equal cost. `bounds` compares the bounds of all heads' errors,
with all settings of the ladder, with the errors, and tells how they change from the calibration's text
(which must have run in the same folder). KL is that of the next token's distribution from exact
to approximate, in nats, with a bootstrap interval over stretches of 32 tokens; time is that of all
calls of attention in the prompt, fits, choices and estimates included, and of the whole prompt. Methods
take turns; a ratio is of medians. `passkey` hides five digits at several depths of prose and asks for
them. `long` gives the plan a prompt beyond the model's positions, which are stretched, and times it.
`chunks` scores as `score` does, with prompts in chunks of so many tokens beside whole ones; times are
beside exact attention in the same chunks. `chunk_bounds` compares the bounds of chunks, in all heads of
three layers, with their errors and with those of the latest tokens that the bounds are about.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from texts import texts

import convbasis as cb
from convbasis.integrations.calibrate import calibrate as calibrate_model
from convbasis.integrations.capture import attending, capture_layers
from convbasis.integrations.compare import run_prompt, timed_attention
from convbasis.integrations.planned import fallbacks_by_head
from convbasis.integrations.smollm2 import load_smollm2, sample_text, token_ids
from convbasis.plan import HeadPlan, HeadSetting, Plan
from convbasis.plan.choice import chance_beyond, choose
from convbasis.plan.ladder import Measured, default_ladder, measure, measure_costs
from convbasis.report.figures import pareto_figure
from convbasis.storage import save_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
SCORED = 512
FAR: dict[str, Any] = {"far_field": "segments", "key_weights": True}
UNIFORM = {
    "window 512 + sinks": HeadSetting(512, 4, 0),
    "window 512 + 60 columns": HeadSetting(512, 4, 60),
    "window 768 + 60 columns": HeadSetting(768, 4, 60),
    "window 1024 + 60 columns": HeadSetting(1024, 4, 60),
    "window 128 + 60 columns + 4 blocks": HeadSetting(128, 4, 60, 4),
}
PARTS = {
    "window 512 + sinks": HeadSetting(512, 4, 0),
    "window 256 + 60 columns": HeadSetting(256, 4, 60),
    "window 512 + 60 columns": HeadSetting(512, 4, 60),
    "window 1024 + 60 columns": HeadSetting(1024, 4, 60),
    "window 256 + segments": HeadSetting(256, 4, 60, **FAR),
    "window 512 + segments": HeadSetting(512, 4, 60, **FAR),
    "window 512 + convolution": HeadSetting(512, 4, 60, far_field="conv"),
    "window 256 + strided exact rows": HeadSetting(256, 4, 60, correction=True),
    "4 blocks": HeadSetting(128, 4, 60, 4),
    "4 blocks + exact rows": HeadSetting(128, 4, 60, 4, correction=True),
    "8 blocks + exact rows": HeadSetting(128, 4, 60, 8, correction=True),
    "window 256 + 4 blocks + segments": HeadSetting(256, 4, 60, 4, **FAR),
    "window 256 + 4 blocks + segments + exact rows": HeadSetting(256, 4, 60, 4, **FAR, correction=True),
}
WINDOWS = ("window 256 + 60 columns", "window 512 + 60 columns", "window 1024 + 60 columns")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def plan_file(options: argparse.Namespace) -> Path:
    return options.folder / f"smollm2-{options.length}.plan.json"


def measured_file(options: argparse.Namespace) -> Path:
    return options.folder / f"smollm2-{options.length}.measured.json"


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
        checkpoint=measured_file(options),
        progress=lambda done, total: print(f"step {done} of {total}", flush=True),
    )
    plan.save(plan_file(options))
    print(
        f"{plan!r}, exact up to {plan.min_length} tokens, predicted KL {plan.predicted_kl}; "
        f"{time.perf_counter() - begin:.0f} s"
    )


@dataclasses.dataclass
class Planned:
    """A plan, and whether heads may fall back."""

    plan: Plan
    dynamic: bool
    last_rows: int = 64


class Plain:
    """The conv basis alone, uniform segments of 64 keys, in place of softmax attention."""


Method = Planned | Plain | None


@contextlib.contextmanager
def using(model: Any, method: Method, clock: Any) -> Iterator[None]:
    """Let a model attend by a method; exactly for None."""
    if isinstance(method, Planned):
        own = {"dynamic": method.dynamic, "last_rows": method.last_rows}
        cb.apply_plan(model, method.plan, min_length=0, **own)
        try:
            yield
        finally:
            cb.remove_plan(model)
    elif isinstance(method, Plain):

        def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
            exact = torch.nn.functional.scaled_dot_product_attention
            given = {"scale": options.get("scaling"), "enable_gqa": True}
            begin = time.perf_counter()
            if query.shape[2] == key.shape[2]:
                output = cb.conv_basis_attention(query, key, value, segment_length=64, **given)
            else:
                output = exact(query, key, value, attn_mask=mask, **given)
            clock.seconds += time.perf_counter() - begin
            return output.transpose(1, 2).contiguous(), None

        with attending(model, attend):
            yield
    else:
        yield


def uniform(plan: Plan, setting: HeadSetting) -> Plan:
    heads = tuple(tuple(HeadPlan(setting) for _ in layer) for layer in plan.heads)
    return dataclasses.replace(plan, heads=heads)


def replanned(options: argparse.Namespace, plan: Plan, budget: float | None, far: bool) -> Plan:
    """The plan that the same calibration makes for a budget, with far fields or of the others alone."""
    kept = json.loads(measured_file(options).read_text(encoding="utf-8"))["measured"]
    steps = default_ladder(plan.calibrated_length)
    used = [index for index, step in enumerate(steps) if far or step.far_field == "none"]
    measured = [
        Measured(*([kept[f"0.{layer}"][name][i] for i in used] for name in ("bounds", "errors")))
        for layer in range(plan.model.layers)
    ]
    chosen = choose(
        [measured],
        [kept["costs"]["costs"][-1][index] for index in used],
        [steps[index] for index in used],
        options.margin * plan.tolerance,
        budget,
        kept.get("effects"),
        fallback=plan.tolerance,
    )
    return dataclasses.replace(plan, heads=chosen.heads, predicted_kl=chosen.predicted_kl)


def score(options: argparse.Namespace) -> None:
    loaded = load_smollm2()
    files = options.plans or [plan_file(options)]
    plans = {
        "plan" if len(files) == 1 else f"plan {path.name.removesuffix('.plan.json')}": Plan.load(path)
        for path in files
    }
    plan = next(iter(plans.values()))
    methods: dict[str, Method] = {
        "exact": None,
        **{name: Planned(found, True) for name, found in plans.items()},
        **{f"{name}, never falling back": Planned(found, False) for name, found in plans.items()},
    }
    if measured_file(options).is_file():
        near = replanned(options, plan, plan.predicted_kl, far=False)
        methods["plan without far field"] = Planned(near, True)
    methods |= {name: Planned(uniform(plan, own), False) for name, own in UNIFORM.items()}
    methods["plain conv basis, segments of 64"] = Plain()
    if options.methods:
        methods = {name: methods[name] for name in ("exact", *options.methods)}
    place = options.folder / "pretrained.json"
    rows = _score_texts(loaded, methods, texts(options.text), options, place)
    table(rows)
    _save(place, rows, plans={name: repr(x) for name, x in plans.items()})


def parts(options: argparse.Namespace) -> None:
    """Every head with the same setting: KL, and its cost, which is measured apart from it."""
    loaded = load_smollm2()
    plan = Plan.load(plan_file(options))
    settings = {name: PARTS[name] for name in options.methods or PARTS}
    place = options.folder / "pretrained-parts.json"
    if options.costs:
        rows = json.loads(place.read_text(encoding="utf-8"))["rows"]
    else:
        methods: dict[str, Method] = {"exact": None}
        # The last rows as all others: what is asked is what the settings do.
        methods |= {name: Planned(uniform(plan, own), False, 0) for name, own in settings.items()}
        rows = _score_texts(loaded, methods, texts(options.text, prose=True), options, place)
        _save(place, rows)
    ids = token_ids(loaded.tokenizer, sample_text(), max(options.lengths))
    costs: dict[tuple[int, str], list[float]] = {}
    for given in capture_layers(loaded.model, ids, (5, 14, 23)).values():
        found = measure_costs(*given, list(settings.values()))
        for n, of_settings in zip(found.lengths, found.costs, strict=True):
            for name, cost in zip(settings, of_settings, strict=True):
                costs.setdefault((n, name), []).append(cost)
    for row in rows:
        if (row["n"], row["method"]) in costs:
            row["cost"] = statistics.median(costs[row["n"], row["method"]])
    _parts_table(rows, list(settings), options.lengths)
    _save(place, rows)


def _parts_table(rows: list[dict[str, Any]], names: list[str], lengths: list[int]) -> None:
    print(
        "\n| n | all heads use | attention time | KL (95 % interval) | worst text | top-1 "
        "| KL over that of windows with columns at equal time (95 % interval) |"
    )
    print("|---|---|---|---|---|---|---|")
    for n in lengths:
        found = {
            name: [row for row in rows if row["n"] == n and row["method"] == name] for name in names
        }
        drawn = {name: _drawn([row["kl_by_stretch"] for row in own]) for name, own in found.items()}
        costs = {name: own[0]["cost"] for name, own in found.items()}
        base = sorted((costs[name], drawn[name].log()) for name in names if name in WINDOWS)
        for name in sorted(names, key=lambda name: costs[name]):
            own = found[name]
            mean, low, high = _interval([row["kl_by_stretch"] for row in own])
            beside = _at_cost(base, costs[name])
            ratio = ""
            if beside is not None and name not in WINDOWS:
                ends = (drawn[name].log() - beside).exp().quantile(torch.tensor([0.5, 0.025, 0.975]))
                ratio = "{:.2f} ({:.2f} to {:.2f})".format(*ends.tolist())
            print(
                f"| {n:,} | {name} | {costs[name]:.2f} | {mean:.4f} ({low:.4f} to {high:.4f}) "
                f"| {max(row['kl'] for row in _by_text(own)):.4f} "
                f"| {statistics.fmean(row['top1'] for row in own):.1%} | {ratio} |"
            )


def _at_cost(points: list[tuple[float, torch.Tensor]], cost: float) -> torch.Tensor | None:
    """Logarithms of KL at a cost, on the line through two of the points; None far beyond them."""
    for (low, of_low), (high, of_high) in itertools.pairwise(points):
        last = high == points[-1][0]
        if low <= cost <= (1.25 * high if last else high):
            part = (cost - low) / (high - low)
            return (1 - part) * of_low + part * of_high
    return None


def curve(options: argparse.Namespace) -> None:
    """KL against attention time: plans of several budgets, and one setting for all heads."""
    loaded = load_smollm2()
    plan = Plan.load(plan_file(options))
    methods: dict[str, Method] = {"exact": None}
    for budget in (*options.budgets, None):  # None: the tolerance of each head alone
        for far in (True, False):
            found = replanned(options, plan, budget, far)
            limit = "tolerance alone" if budget is None else f"budget {budget:g}"
            methods[f"{'all' if far else 'near'} settings, {limit}"] = Planned(found, True)
    methods["plan, last rows approximated"] = Planned(plan, True, 0)
    for name, setting in {**UNIFORM, "window 256 + segments": PARTS["window 256 + segments"]}.items():
        methods[name] = Planned(uniform(plan, setting), False)
    methods["plain conv basis, segments of 64"] = Plain()
    place = options.folder / "pretrained-curve.json"
    rows = _score_texts(loaded, methods, texts(options.text), options, place)
    table(rows)
    _draw(rows, options.lengths)
    _save(place, rows)


def _draw(rows: list[dict[str, Any]], lengths: list[int]) -> None:
    """Draw the means over texts of all methods; what differs in one number is on one line."""
    points: dict[str, list[tuple[float, float]]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        if name not in ("exact", "plan, last rows approximated"):
            own = [row for row in rows if row["method"] == name]
            point = (
                statistics.fmean(1 / row["attention_ratio"] for row in own),
                statistics.fmean(row["kl"] for row in own),
            )
            points.setdefault(_line_of(name), []).append(point)
    pareto_figure(
        {name: sorted(own) for name, own in points.items()},
        f"SmolLM2-135M, {' and '.join(f'{n:,}' for n in lengths)} tokens",
        ROOT / "docs/figures/pareto.png",
    )


def _line_of(name: str) -> str:
    if name.endswith("+ 60 columns"):
        return "windows with 60 columns"
    plans = {"all settings": "plans", "near settings": "plans without far field"}
    kind = name.split(", ")[0]
    return plans.get(kind, name)


def bounds(options: argparse.Namespace) -> None:
    """How often the bound of a head's error holds, and how wide it is, for each setting; and the errors
    of the heads as a plan has them."""
    loaded = load_smollm2()
    ladder = default_ladder(options.length)
    plan = Plan.load(plan_file(options))
    rows, worst, changes = [], [], []
    print("| text | setting | bound holds | bound / error, median |\n|---|---|---|---|", flush=True)
    for text, content in texts(options.text, prose=True).items():
        if options.kinds and text not in options.kinds:
            continue
        ids = token_ids(loaded.tokenizer, content, options.length)
        layers = range(loaded.model.config.num_hidden_layers)
        given = capture_layers(loaded.model, ids, layers).values()
        measured = [measure(*inputs, ladder, 0) for inputs in given]
        for index, setting in enumerate(ladder):
            errors = [error for layer in measured for error in layer.errors[index]]
            own = [bound for layer in measured for bound in layer.bounds[index]]
            sizes = setting.at(options.length)
            row = {
                "text": text,
                "setting": {name: value for name, value in sizes._asdict().items() if value},
                "heads": len(own),
                "holds": statistics.fmean(x <= y for x, y in zip(errors, own, strict=True)),
                "ratio": statistics.median(y / x for x, y in zip(errors, own, strict=True)),
            }
            rows.append(row)
            found = f"{row['holds']:.1%} | {row['ratio']:.2f}"
            print(f"| {text} | {row['setting']} | {found} |", flush=True)
            changes += _changes(options, plan, index, own) if text != "prose" else []
        worst.append({"text": text, **_errors_of_plan(plan, ladder, measured)})
    print(
        f"| all | all | {statistics.fmean(row['holds'] for row in rows):.1%} "
        f"| {statistics.median(row['ratio'] for row in rows):.2f} |"
    )
    print("\n| text | heads kept | error of the median one | of the worst | layer, head |")
    print("|---|---|---|---|---|")
    for row in worst:
        print(
            f"| {row['text']} | {row['kept']} | {row['median']:.3f} | {row['worst']:.3f} "
            f"| {row['layer']}, {row['head']} |"
        )
    beyond = _table_of_changes(changes, plan.tolerance)
    _save(options.folder / "pretrained-bounds.json", rows, of_plan=worst, changes=beyond)


def _changes(
    options: argparse.Namespace, plan: Plan, setting: int, found: list[float]
) -> list[tuple[float, float]]:
    """The bounds of all heads with one setting in the text of the calibration, and here."""
    if not measured_file(options).is_file():
        return []
    kept = json.loads(measured_file(options).read_text(encoding="utf-8"))["measured"]
    layers = range(plan.model.layers)
    before = [bound for layer in layers for bound in kept[f"0.{layer}"]["bounds"][setting]]
    return list(zip(before, found, strict=True))


def _table_of_changes(changes: list[tuple[float, float]], tolerance: float) -> dict[str, Any]:
    """How bounds change from the text of the calibration to the others, and how often they exceed the
    tolerance there: found, and as the choice of settings takes it."""
    logs = [math.log(after / before) for before, after in changes if before > 0 < after]
    if len(logs) < 2:
        return {}
    mean, deviation = statistics.fmean(logs), statistics.stdev(logs)
    print(
        f"\nlog(bound / bound in the calibration): mean {mean:.2f}, standard deviation {deviation:.2f}"
    )
    print("\n| bound in the calibration | heads | beyond the tolerance | expected |\n|---|---|---|---|")
    rows = []
    for low, high in itertools.pairwise(step * tolerance / 10 for step in range(11)):
        own = [(before, after) for before, after in changes if low < before <= high]
        if own:
            found = statistics.fmean(after > tolerance for _, after in own)
            expected = statistics.fmean(
                float(chance_beyond(torch.tensor(before, dtype=torch.float64), tolerance))
                for before, _ in own
            )
            print(f"| {low:.2f} to {high:.2f} | {len(own)} | {found:.1%} | {expected:.1%} |")
            rows.append([low, high, len(own), found, expected])
    return {"mean": mean, "deviation": deviation, "rows": rows}


def _errors_of_plan(
    plan: Plan, ladder: Sequence[HeadSetting], measured: list[Measured]
) -> dict[str, Any]:
    """The errors of the heads that a plan approximates and that do not fall back."""
    errors = []
    for layer, heads in enumerate(plan.heads):
        for head, planned in enumerate(heads):
            if planned.setting is not None:
                index = ladder.index(planned.setting)
                if measured[layer].bounds[index][head] <= plan.tolerance:
                    errors.append((measured[layer].errors[index][head], layer, head))
    error, layer, head = max(errors)
    median = statistics.median(error for error, _, _ in errors)
    return {"kept": len(errors), "median": median, "worst": error, "layer": layer, "head": head}


def _by_text(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Means over the places of each text."""
    return [
        {
            key: statistics.fmean(row[key] for row in rows if row["text"] == text)
            for key in ("kl", "loss_ratio", "top1")
        }
        for text in dict.fromkeys(row["text"] for row in rows)
    ]


def _drawn(by_text: list[list[float]]) -> torch.Tensor:
    """Means over prompts of 2000 bootstrap samples, stretches drawn anew in each prompt."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [
            torch.tensor(own)[torch.randint(len(own), (2000, len(own)), generator=generator)].mean(1)
            for own in by_text
        ]
    ).mean(0)


def _interval(by_text: list[list[float]]) -> tuple[float, float, float]:
    """The mean over prompts and its 95 % bootstrap interval."""
    low, high = _drawn(by_text).quantile(torch.tensor([0.025, 0.975])).tolist()
    return statistics.fmean(statistics.fmean(own) for own in by_text), low, high


def _score_texts(
    loaded: Any,
    methods: dict[str, Method],
    sources: dict[str, str],
    options: argparse.Namespace,
    place: Path,
) -> list[dict[str, Any]]:
    """Score every text; what is done is kept beside `place`, and a stopped run goes on from there."""
    kept = _Unfinished(place, methods, options.repeats)
    with timed_attention(loaded.model) as clock:
        for n in options.lengths:
            for text, content in sources.items():
                if options.kinds and text not in options.kinds:
                    continue
                for ids, at in _prompts(loaded.tokenizer, content, n, options.places):
                    if not kept.has(ids):
                        costs = _costs_at(options, n)
                        rows = _score_text(
                            loaded.model, methods, ids, n, text, clock, options.repeats, costs
                        )
                        kept.add([{**row, "place": at} for row in rows])
    return kept.finish()


def _prompts(tokenizer: Any, content: str, n: int, places: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield the n tokens at several places of a text, one after the other, as far as it reaches."""
    for at in range(0, places * n, n):
        try:
            yield token_ids(tokenizer, content, at + n)[:, at:], at
        except cb.InputError as error:
            print(f"from token {at:,} on: {error}: left out", flush=True)
            return


class _Unfinished:
    """Rows of a run that is not done, in a file, for the next run with the same methods."""

    def __init__(self, place: Path, methods: dict[str, Method], repeats: int) -> None:
        self.place = place.with_suffix(".unfinished.json")
        self.run = {"repeats": repeats, "methods": {name: _identity(x) for name, x in methods.items()}}
        self.rows: list[dict[str, Any]] = []
        if self.place.is_file():
            found = json.loads(self.place.read_text(encoding="utf-8"))
            if found["run"] == self.run:
                self.rows = found["rows"]
                print(f"goes on after {len(self.rows)} rows of {self.place}", flush=True)

    def has(self, ids: torch.Tensor) -> bool:
        return any(row["ids_sha256"] == _sha256(ids) for row in self.rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows.extend(rows)
        save_text(self.place, json.dumps({"run": self.run, "rows": self.rows}) + "\n")

    def finish(self) -> list[dict[str, Any]]:
        self.place.unlink(missing_ok=True)
        return self.rows


def _identity(method: Method) -> str:
    """What tells one method from another, whatever it is called."""
    if isinstance(method, Planned):
        content = repr((method.plan.heads, method.plan.tolerance, method.dynamic, method.last_rows))
        return hashlib.sha256(content.encode()).hexdigest()
    return type(method).__name__


def _sha256(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def _score_text(
    model: Any,
    methods: dict[str, Method],
    ids: torch.Tensor,
    n: int,
    text: str,
    clock: Any,
    repeats: int,
    costs: dict[HeadSetting, float],
) -> list[dict[str, Any]]:
    targets = ids[0, -SCORED:]
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    exact = torch.empty(0)
    for repeat in range(repeats):
        for name, method in methods.items():
            with using(model, method, clock):
                logs, attention, whole = run_prompt(model, ids, SCORED, clock)
                report = cb.plan_report(model)._asdict() if isinstance(method, Planned) else None
                cheap = _cheap(model, method.plan, costs) if isinstance(method, Planned) else None
            times[name].append((attention, whole))
            if repeat:
                continue
            if method is None:
                exact = logs
            kl = (exact.exp() * (exact - logs)).sum(-1)
            loss = -logs.gather(1, targets[:, None])[:, 0]
            found[name] = {
                "n": n,
                "text": text,
                "ids_sha256": _sha256(ids),
                "method": name,
                "kl": float(kl.mean()),
                "kl_of_first_token": float(kl[0]),
                "kl_standard_error": float(kl.std() / math.sqrt(len(kl))),
                "kl_by_stretch": [float(own.mean()) for own in kl.split(32)],
                "loss": float(loss.mean()),
                "top1": float((logs.argmax(-1) == exact.argmax(-1)).double().mean()),
                "report": report,
                "cheap": cheap,
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


def _costs_at(options: argparse.Namespace, n: int) -> dict[HeadSetting, float]:
    """What settings of the ladder cost, as calibration measured it at n tokens or the next fewer;
    nothing where its measurements are not kept.
    """
    if not measured_file(options).is_file():
        return {}
    kept = json.loads(measured_file(options).read_text(encoding="utf-8"))["measured"]["costs"]
    place = max((at for at, length in enumerate(kept["lengths"]) if length <= n), default=0)
    return dict(zip(default_ladder(options.length), kept["costs"][place], strict=True))


def _cheap(model: Any, plan: Plan, costs: dict[HeadSetting, float]) -> float:
    """The part of the heads that cost at most half of exact attention and did not fall back."""
    fallen = fallbacks_by_head(model)
    kept = [
        head.setting is not None
        and costs.get(head.setting, head.cost) <= 0.5
        and not fallen[layer][number]
        for layer, heads in enumerate(plan.heads)
        for number, head in enumerate(heads)
    ]
    return sum(kept) / len(kept)


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
        f"| {row['kl_of_first_token']:.4f} | {row['loss']:.4f} | {row['loss_ratio']:.4f} "
        f"| {row['top1']:.1%} | {heads} |",
        flush=True,
    )


def table(rows: list[dict[str, Any]]) -> None:
    print(
        "\n| n | method | attention | prompt | KL, mean (95 % interval) / worst text "
        "| perplexity, mean / worst | top-1, mean / worst | heads approximated and kept "
        "| of these at half the cost or less | fallen back |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for n in sorted({row["n"] for row in rows}):
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["n"] == n and row["method"] == name]
            mean: Callable[[str], float] = lambda key: statistics.fmean(row[key] for row in own)  # noqa: E731, B023
            by_text = _by_text(own)
            worst = max(abs(row["loss_ratio"] - 1) for row in by_text)
            kl, low, high = _interval([row["kl_by_stretch"] for row in own])
            kept = [_kept(row["report"]) for row in own if row["report"] is not None]
            cheap = mean("cheap") if kept else 0.0
            fallen = [
                r["heads_fallen_back"] / sum(r[k] for k in r if k != "prefills")
                for r in (row["report"] for row in own)
                if r is not None
            ]
            print(
                f"| {n:,} | {name} | {mean('attention_ratio'):.2f}x | {mean('prompt_ratio'):.2f}x "
                f"| {kl:.4f} ({low:.4f} to {high:.4f}) / {max(row['kl'] for row in by_text):.4f} "
                f"| {mean('loss_ratio') - 1:+.2%} / {worst:.2%} "
                f"| {mean('top1'):.1%} / {min(row['top1'] for row in by_text):.1%} "
                f"| {'' if not kept else f'{statistics.fmean(kept):.1%}'} "
                f"| {'' if not kept else f'{cheap:.1%}'} "
                f"| {'' if not kept else f'{statistics.fmean(fallen):.1%}'} |"
            )


@torch.no_grad()
def chunks(options: argparse.Namespace) -> None:
    """The plan with prompts in chunks, strictly causal, beside the same prompts in one call."""
    loaded = load_smollm2()
    model, plan = loaded.model, Plan.load(plan_file(options))
    plain = uniform(plan, HeadSetting(768, 4, 60))
    rows = []
    for n, (text, content) in itertools.product(options.lengths, texts(options.text).items()):
        if options.kinds and text not in options.kinds:
            continue
        ids = token_ids(loaded.tokenizer, content, n)
        runs: dict[tuple[int, str], list[tuple[torch.Tensor, float, float, Any]]] = {}
        with timed_attention(model) as clock:
            for _ in range(options.repeats):
                for size in (n, *options.sizes):
                    for name, method in (("exact", None), ("plan", plan), ("one setting", plain)):
                        if name != "one setting" or size < n:
                            found = _in_chunks(model, ids, size, method, name == "plan", clock)
                            runs.setdefault((size, name), []).append(found)
        exact = runs[n, "exact"][0][0]
        for (size, name), found in runs.items():
            seconds = [statistics.median(run[i] for run in found) for i in (1, 2)]
            base = [statistics.median(run[i] for run in runs[size, "exact"]) for i in (1, 2)]
            logs, report = found[0][0], found[0][3]
            kl = (exact.exp() * (exact - logs)).sum(-1)
            loss, least = (-x.gather(1, ids[0, -SCORED:, None]).mean() for x in (logs, exact))
            rows.append(
                {
                    "n": n,
                    "text": text,
                    "size": size,
                    "method": name,
                    "kl": float(kl.mean()),
                    "kl_by_stretch": [float(own.mean()) for own in kl.split(32)],
                    "loss_ratio": float((loss - least).exp()),
                    "top1": float((logs.argmax(-1) == exact.argmax(-1)).double().mean()),
                    "attention_seconds": seconds[0],
                    "prompt_seconds": seconds[1],
                    "attention_ratio": base[0] / seconds[0],
                    "prompt_ratio": base[1] / seconds[1],
                    "report": report,
                }
            )
            shown = (f"{key} {own}" for key, own in rows[-1].items() if key != "kl_by_stretch")
            print(", ".join(shown), flush=True)
        _save(options.folder / "pretrained-chunks.json", rows)
    _chunks_table(rows)


@torch.no_grad()
def chunk_bounds(options: argparse.Namespace) -> None:
    """How often the bounds of chunks hold."""
    loaded = load_smollm2()
    settings: list[dict[str, Any]] = [
        {"window": 128},
        {"window": 256},
        {"window": 320, **FAR},
        {"window": 960, **FAR},
    ]
    rows = []
    for n, (text, content) in itertools.product(options.lengths, texts(options.text).items()):
        if options.kinds and text not in options.kinds:
            continue
        ids = token_ids(loaded.tokenizer, content, n)
        for layer, given in capture_layers(loaded.model, ids, (5, 14, 23)).items():
            query, key, value, scale = given
            exact = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
            for size, own in itertools.product(options.sizes, settings):
                state = cb.HybridState(columns=60, enable_gqa=True, scale=scale, **own)
                output = torch.empty_like(exact)
                for low in range(0, n, size):
                    high = min(n, low + size)
                    chunk = query[:, :, low:high], key[:, :, :high], value[:, :, :high]
                    stats = state.attend_stats(*chunk)
                    output[:, :, low:high] = stats.output
                    if high <= max(512, own["window"] + 2 * 64):  # nearly all of it is exact
                        continue
                    for first, what in ((low, "chunk"), (max(0, high - 4096), "latest")):
                        part = exact[:, :, first:high]
                        error = (output[:, :, first:high] - part).norm(dim=(2, 3))
                        ratio = stats.error_estimate / (error / part.norm(dim=(2, 3)))
                        found = {"n": n, "text": text, "layer": layer, "size": size, "of": what}
                        rows.append({**found, "setting": str(own), "ratios": ratio[0].tolist()})
    print("| tokens of a chunk | bounds | hold for the latest 4,096 tokens | for the chunk | median |")
    print("|---|---|---|---|---|")
    for size in options.sizes:
        latest, chunk = (
            torch.tensor(
                [x for row in rows if (row["size"], row["of"]) == (size, what) for x in row["ratios"]]
            )
            for what in ("latest", "chunk")
        )
        print(
            f"| {size:,} | {len(chunk):,} | {float((latest >= 1).double().mean()):.1%} "
            f"| {float((chunk >= 1).double().mean()):.1%} | {float(latest.median()):.2f} |"
        )
    for row in rows:
        ratios = torch.tensor(row.pop("ratios"))
        row |= {
            "heads": len(ratios),
            "hold": int((ratios >= 1).sum()),
            "median": float(ratios.median()),
        }
    _save(options.folder / "pretrained-chunk-bounds.json", _together(rows))


def _together(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bounds of all chunks of a text, layer, setting and size as one row."""
    kind = ("n", "text", "layer", "setting", "size", "of")
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(row[name] for name in kind), []).append(row)
    return [
        {
            **dict(zip(kind, key, strict=True)),
            "bounds": sum(row["heads"] for row in own),
            "hold": sum(row["hold"] for row in own),
            "medians": [round(row["median"], 3) for row in own],
        }
        for key, own in alike.items()
    ]


def _chunks_table(rows: list[dict[str, Any]]) -> None:
    print(
        "\n| n | tokens of a chunk | method | attention | prompt "
        "| KL, mean (95 % interval) / worst text | perplexity, mean / worst | top-1 | heads kept |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for n, size, name in dict.fromkeys((row["n"], row["size"], row["method"]) for row in rows):
        own = [row for row in rows if (row["n"], row["size"], row["method"]) == (n, size, name)]
        mean: Callable[[str], float] = lambda key: statistics.fmean(row[key] for row in own)  # noqa: E731, B023
        kl, low, high = _interval([row["kl_by_stretch"] for row in own])
        kept = statistics.fmean(_kept(row["report"]) for row in own)
        print(
            f"| {n:,} | {'all' if size >= n else f'{size:,}'} | {name} "
            f"| {mean('attention_ratio'):.2f}x | {mean('prompt_ratio'):.2f}x "
            f"| {kl:.4f} ({low:.4f} to {high:.4f}) / {max(row['kl'] for row in own):.4f} "
            f"| {mean('loss_ratio') - 1:+.2%} / {max(abs(row['loss_ratio'] - 1) for row in own):.2%} "
            f"| {mean('top1'):.1%} | {kept:.1%} |"
        )


def _kept(report: dict[str, int] | None) -> float:
    """The part of the heads that were approximated and did not fall back."""
    if report is None:
        return 0.0
    heads = sum(count for name, count in report.items() if name != "prefills")
    return report["heads_approximated"] / heads


def _in_chunks(
    model: Any, ids: torch.Tensor, size: int, plan: Plan | None, dynamic: bool, clock: Any
) -> tuple[torch.Tensor, float, float, Any]:
    """Return what is said of the last tokens after a prompt in chunks, the seconds of attention and of
    all of the prompt, and the report.
    """
    prompt = ids[:, :-SCORED]
    if plan is not None:
        cb.apply_plan(model, plan, min_length=0, dynamic=dynamic, chunked=size < prompt.shape[1])
    cache, report = None, None
    clock.seconds = 0.0
    begin = time.perf_counter()
    for part in prompt.split(size, 1):
        done = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = done.past_key_values
    whole, attention = time.perf_counter() - begin, clock.seconds
    if plan is not None:
        report = cb.plan_report(model)._asdict()
        cb.remove_plan(model)  # what follows is exact
    rest = model(ids[:, -SCORED:], past_key_values=cache, use_cache=True)
    logits = torch.cat([done.logits[0, -1:], rest.logits[0, :-1]])
    return logits.float().log_softmax(-1), attention, whole, report


@torch.no_grad()
def passkey(options: argparse.Namespace) -> None:
    """Whether five digits hidden in prose are found, exactly and by the plan."""
    loaded = load_smollm2()
    model, tokenizer = loaded.model, loaded.tokenizer
    plan = Plan.load(plan_file(options))
    filler = tokenizer(sample_text())["input_ids"]
    generator = random.Random(0)
    rows = []
    for n in options.lengths:
        for depth in DEPTHS:
            for _ in range(options.repeats):
                digits = str(generator.randrange(10_000, 100_000))
                needle = tokenizer(f"\n\nThe pass key is {digits}. Remember it: {digits}.\n\n")[
                    "input_ids"
                ]
                ask = tokenizer(f"\n\nWhat is the pass key? The pass key is")["input_ids"]  # noqa: F541
                room = n - len(needle) - len(ask)
                start = generator.randrange(len(filler) - room)
                at = int(depth * room)
                body = filler[start : start + room]
                ids = torch.tensor([[*body[:at], *needle, *body[at:], *ask]])
                row: dict[str, Any] = {"n": n, "depth": depth}
                for name in ("exact", "plan"):
                    if name == "plan":
                        cb.apply_plan(model, plan, min_length=0)
                    done = model.generate(
                        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
                    )
                    if name == "plan":
                        cb.remove_plan(model)
                    row[name] = digits in tokenizer.decode(done[0, n:])
                rows.append(row)
                print(row, flush=True)
    print("\n| n | depth | exact | plan |\n|---|---|---|---|")
    for n in options.lengths:
        for depth in DEPTHS:
            own = [row for row in rows if row["n"] == n and row["depth"] == depth]
            found = (f"{sum(row[name] for row in own)} of {len(own)}" for name in ("exact", "plan"))
            print(f"| {n:,} | {depth:.0%} | {' | '.join(found)} |")
    _save(options.folder / "pretrained-passkey.json", rows)


@torch.no_grad()
def long(options: argparse.Namespace) -> None:
    """Time of a prompt beyond the model's positions, which are stretched, fallbacks included."""
    loaded = load_smollm2()
    model = loaded.model
    plan = Plan.load(plan_file(options))
    rows = []
    for n in options.lengths:
        ids = token_ids(loaded.tokenizer, sample_text(), n)
        positions = torch.arange(n)[None] * min(1.0, 8192 / n)
        with timed_attention(model) as clock:
            seconds = {}
            for name, method in (("plan", Planned(plan, True)), ("exact", None)):
                with using(model, method, clock):
                    clock.seconds = 0.0
                    begin = time.perf_counter()
                    # The mask tells that stretched positions are no packed documents.
                    model(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        position_ids=positions,
                        use_cache=True,
                        logits_to_keep=1,
                    )
                    seconds[name] = (clock.seconds, time.perf_counter() - begin)
                    if method is not None:
                        report = cb.plan_report(model)._asdict()
        ratios = [a / b for a, b in zip(seconds["exact"], seconds["plan"], strict=True)]
        # What exact heads take is known: their share of exact attention.
        kept = report["heads_approximated"]
        share = kept / (kept + report["heads_exact"] + report["heads_fallen_back"])
        left = seconds["plan"][0] - (1 - share) * seconds["exact"][0]
        ratios.append(share * seconds["exact"][0] / left)
        rows.append({"n": n, "seconds": seconds, "report": report, "ratios": ratios})
        found = " | ".join(f"{ratio:.2f}x" for ratio in ratios)
        print(f"| {n:,} | {found} | {report} |", flush=True)
    _save(options.folder / "pretrained-long.json", rows)


def _save(path: Path, rows: list[dict[str, Any]], **others: Any) -> None:
    content = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        **others,
        "rows": rows,
    }
    save_text(path, json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = parser.add_subparsers(required=True)
    for job in (calibrate, score, curve, parts, bounds, passkey, long, chunks, chunk_bounds):
        part = jobs.add_parser(job.__name__)
        part.set_defaults(job=job)
        part.add_argument("--length", type=int, default=8192, help="of the calibration")
        part.add_argument("--folder", type=Path, default=RESULTS)
        part.add_argument("--margin", type=float, default=0.6, help="of the tolerance")
        if job is calibrate:
            part.add_argument("--tolerance", type=float, default=0.4)
            part.add_argument("--budget", type=float, default=0.001, help="KL, in nats")
            continue
        lengths = {long: [32_768], curve: [8192], chunks: [8192], chunk_bounds: [8192]}.get(
            job, [2048, 4096, 8192]
        )
        part.add_argument("--lengths", type=int, nargs="+", default=lengths)
        part.add_argument("--repeats", type=int, default=1)
        if job in (score, curve, parts, bounds, chunks, chunk_bounds):
            part.add_argument("--text", type=Path, nargs="*", default=[])
            part.add_argument("--kinds", nargs="*", default=[], help="of texts; all by default")
        if job in (chunks, chunk_bounds):
            sizes = [1024, 2048, 4096] if job is chunks else [512, 1024, 2048, 4096]
            part.add_argument("--sizes", type=int, nargs="+", default=sizes)
        if job in (score, curve, parts, bounds):
            part.add_argument("--methods", nargs="*", default=[])
            part.add_argument(
                "--places", type=int, default=1, help="of each text, as far as it reaches"
            )
        if job is curve:
            budgets = [0.0005, 0.001, 0.002, 0.005, 0.02]
            part.add_argument("--budgets", type=float, nargs="+", default=budgets, help="KL, in nats")
        if job is parts:
            part.add_argument("--costs", action="store_true", help="measure costs again, not KL")
        if job is score:
            part.add_argument(
                "--plans", type=Path, nargs="*", default=[], help="instead of calibrate's"
            )
    options = parser.parse_args()
    options.job(options)


if __name__ == "__main__":
    main()
