"""What each part of hybrid attention does for the heads of a real model, one head at a time.

    python benchmarks/heads.py [--lengths 2048 4096 8192] [--layers 0 3 6 ... 27]

Queries, keys and values of SmolLM2-135M on English prose, source code, docstrings, a change history and
licences. For every setting: the relative error of the heads' outputs against exact attention, mean with
a bootstrap interval over heads; the heads within 10 %; time of exact attention over that of the
setting, for all heads of a layer, the estimate included; how often the 95 % bound of the error holds,
and its median over the error; the share of rows that are off by more than half of their norm. For how
many heads each far field is better than dropping the far keys, at the same window and columns. And
which setting is the cheapest that keeps a head's error within a limit: for how many heads each part
wins. Writes benchmarks/results/heads.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from texts import texts
from torch.nn.functional import scaled_dot_product_attention as exact_attention

import convbasis as cb
from convbasis.integrations.capture import observe_layers
from convbasis.integrations.smollm2 import load_smollm2, token_ids
from convbasis.storage import save_text

ROOT = Path(__file__).parent.parent
NEAR: dict[str, Any] = {"window": 256, "columns": 60}
BLOCKS: dict[str, Any] = {"window": 128, "columns": 60, "blocks": 4}
SEGMENTS: dict[str, Any] = {"far_field": "segments", "key_weights": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "window 320 + sinks": {"window": 320, "columns": 0},
    "window 256 + 60 columns": NEAR,
    "window 384 + 60 columns": {**NEAR, "window": 384},
    "window 512 + 60 columns": {**NEAR, "window": 512},
    "window 256 + 188 columns": {**NEAR, "columns": 188},
    "segments": {**NEAR, "far_field": "segments"},
    "segments, key weights": {**NEAR, **SEGMENTS},
    "32 segments, key weights": {**NEAR, **SEGMENTS, "num_segments": 32},
    "window 512, segments, key weights": {**NEAR, **SEGMENTS, "window": 512},
    "convolution": {**NEAR, "far_field": "conv"},
    "exact rows": {**NEAR, "correction": True},
    "window 128 + 60 columns + 4 blocks": BLOCKS,
    "window 128 + 60 columns + 4 blocks, exact rows": {**BLOCKS, "correction": True},
    "window 128 + 60 columns + 4 blocks + segments, key weights": {**BLOCKS, **SEGMENTS},
    "window 256 + 60 columns + 8 blocks": {**NEAR, "blocks": 8},
    "window 256 + 60 columns + 8 blocks, exact rows": {**NEAR, "blocks": 8, "correction": True},
}
LIMITS = (0.05, 0.1, 0.2)


def interval(values: torch.Tensor) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (2000, len(values)), generator=generator)
    means = values[index].mean(1).sort().values
    return float(means[50]), float(means[1949])


def measure(n: int, layers: list[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row for every setting, and one for every limit of the error."""
    loaded = load_smollm2()
    found: dict[str, dict[str, list[Any]]] = {
        name: {"errors": [], "bounds": [], "ratios": [], "wrong": []} for name in SETTINGS
    }

    def observe(text: str, layer: int, given: Any) -> None:
        if layer not in layers:
            return
        query, key, value = (x.contiguous() for x in given[:3])
        options = {"scale": given.scale, "enable_gqa": True}
        begin = time.perf_counter()
        exact = exact_attention(query, key, value, is_causal=True, **options)
        whole = time.perf_counter() - begin
        of_rows = torch.linalg.vector_norm(exact[0].double(), dim=-1)
        norms = torch.linalg.vector_norm(of_rows, dim=-1)
        for name, setting in SETTINGS.items():
            begin = time.perf_counter()
            stats = cb.hybrid_attention_stats(query, key, value, **setting, **options)
            own = found[name]
            own["ratios"].append(whole / (time.perf_counter() - begin))
            off = torch.linalg.vector_norm((stats.output - exact)[0].double(), dim=-1)
            own["errors"].extend((torch.linalg.vector_norm(off, dim=-1) / norms).tolist())
            own["wrong"].extend((off > 0.5 * of_rows).double().mean(-1).tolist())
            own["bounds"].extend(stats.error_estimate[0].tolist())
        print(f"n = {n:,}, {text}, layer {layer}", flush=True)

    for text, content in texts([], prose=True).items():
        observe_layers(loaded.model, token_ids(loaded.tokenizer, content, n), partial(observe, text))
    rows = []
    for name, own in found.items():
        errors, bounds = torch.tensor(own["errors"]), torch.tensor(own["bounds"])
        low, high = interval(errors)
        rows.append(
            {
                "n": n,
                "setting": name,
                "heads": len(errors),
                "ratio": statistics.median(own["ratios"]),
                "mean": float(errors.mean()),
                "low": low,
                "high": high,
                "median": float(errors.median()),
                "wrong": [float(torch.tensor(own["wrong"]).quantile(q)) for q in (0.5, 0.97)],
                "within": float((errors <= 0.1).double().mean()),
                "holds": float((bounds >= errors).double().mean()),
                "bound_over_error": float((bounds / errors).median()),
                "better_than_dropped": float(
                    (errors < torch.tensor(found["window 256 + 60 columns"]["errors"])).double().mean()
                ),
            }
        )
    return rows, [winners(n, limit, found) for limit in LIMITS]


def winners(n: int, limit: float, found: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Return how many heads each setting serves as the cheapest within a limit of the error."""
    costs = {name: 1 / statistics.median(own["ratios"]) for name, own in found.items()}
    ladder = sorted((name for name in found if costs[name] < 1), key=lambda name: costs[name])
    chosen: dict[str, int] = dict.fromkeys([*ladder, "exact"], 0)
    heads = len(next(iter(found.values()))["errors"])
    for head in range(heads):
        fine = (name for name in ladder if found[name]["errors"][head] <= limit)
        chosen[next(fine, "exact")] += 1
    return {"n": n, "limit": limit, "heads": heads, "chosen": chosen}


def table(rows: list[dict[str, Any]]) -> None:
    print(
        "| n | setting | exact / ours | mean error (95 % interval) | median | heads within 10 % "
        "| better than window 256 + 60 columns | bound holds | bound / error, median "
        "| rows off by half: median head, 97th percentile |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['n']:,} | {row['setting']} | {row['ratio']:.2f}x "
            f"| {row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | {row['median']:.3f} "
            f"| {row['within']:.0%} | {row['better_than_dropped']:.0%} | {row['holds']:.1%} "
            f"| {row['bound_over_error']:.2f} | {row['wrong'][0]:.1%}, {row['wrong'][1]:.1%} |"
        )


def table_of_winners(rows: list[dict[str, Any]]) -> None:
    print("\n| n | error within | heads for which each is the cheapest |\n|---|---|---|")
    for row in rows:
        ranked = sorted(row["chosen"].items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {count / row['heads']:.0%}" for name, count in ranked if count)
        print(f"| {row['n']:,} | {row['limit']:.0%} | {parts} |")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(0, 30, 3)))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/heads.json")
    options = parser.parse_args()
    rows, cheapest = [], []
    for n in options.lengths:
        of_settings, of_limits = measure(n, options.layers)
        rows += of_settings
        cheapest += of_limits
    table(rows)
    table_of_winners(cheapest)
    content = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    content["cheapest"] = cheapest
    save_text(options.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
