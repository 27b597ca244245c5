"""Masked low-rank products and attention: time, memory, growth, error, and real heads.

    python benchmarks/lowrank.py masks [--quick]     # each mask against the dense product and SDPA
    python benchmarks/lowrank.py degree [--quick]    # error against degree and the largest logit
    python benchmarks/lowrank.py conv [--quick]      # attention with relative bias, growth in n
    python benchmarks/lowrank.py heads [--quick]     # low rank as a far field of heads of SmolLM2-135M

Times are processor time of one thread unless --threads is given; medians, the products of a size in
turn. What is extrapolated by n^2 is marked with a star. Each command prints a table and writes
benchmarks/results/lowrank-COMMAND.json, except with --quick, whose sizes prove nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import convbasis as cb
from convbasis.lowrank import (
    CausalMask,
    DocumentMask,
    IntervalMask,
    Mask,
    RowChangeMask,
    ShiftedGroupMask,
    SlidingWindowMask,
    lowrank_attention_stats,
    polynomial_features,
    relative_attention,
    truncation_error,
)
from convbasis.storage import save_text

RESULTS = Path(__file__).parent / "results"
RANK, COLUMNS = 64, 65  # 64 values, and ones for the normaliser
WINDOW = 1024
DENSE_UP_TO = 16_384  # a mask of n x n numbers beyond does not fit
CAUSAL_UP_TO = 65_536
DEFAULT_SIZES = [256, 1024, *(2**p for p in range(13, 20))]  # below 1,024 it loses
GROWTH_FROM = 8192


def intervals(n: int) -> Mask:
    rows = torch.arange(n)
    generator = torch.Generator().manual_seed(0)
    back = torch.randint(0, 4 * WINDOW, (n,), generator=generator)
    gap = torch.randint(0, 64, (n,), generator=generator)
    return IntervalMask((rows - back).clamp(min=0), (rows - torch.minimum(gap, rows)).clamp(min=0))


def documents(n: int) -> Mask:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 4 * WINDOW, (n,), generator=generator)
    lengths = lengths[: int((lengths.cumsum(0) < n).sum())]
    return DocumentMask([*lengths.tolist(), n - int(lengths.sum())])


def changes(n: int) -> Mask:
    """Each row sees its own key and loses a random one of the latest: a window with holes."""
    gone: list[list[int]] = [[] for _ in range(n)]
    ends = torch.arange(n) + torch.randint(
        1, 2 * WINDOW, (n,), generator=torch.Generator().manual_seed(0)
    )
    for key, row in enumerate(ends.tolist()):
        if row < n:
            gone[row].append(key)
    return RowChangeMask([[i] for i in range(n)], gone)


MASKS: dict[str, Callable[[int], Mask]] = {
    "causal": CausalMask,
    "window": lambda n: SlidingWindowMask(n, WINDOW),
    "intervals": intervals,
    "documents": documents,
    "groups": lambda n: ShiftedGroupMask(n, WINDOW),
    "changes": changes,
}


def seconds(threads: int) -> float:
    return time.thread_time() if threads == 1 else time.perf_counter()


def timed(calls: dict[str, Callable[[], Any]], repeats: int, threads: int) -> dict[str, float]:
    """Return the median time of each call, made in turn after a first one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begun = seconds(threads)
            call()
            if turn or repeats == 0:
                found[name].append(seconds(threads) - begun)
    return {name: statistics.median(times) for name, times in found.items()}


def progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def exponent(sizes: list[int], times: list[float]) -> float:
    """Return the slope of the least-squares line through logarithms."""
    x, y = [math.log(n) for n in sizes], [math.log(t) for t in times]
    return statistics.linear_regression(x, y).slope


def save(options: argparse.Namespace, content: dict[str, Any]) -> None:
    if options.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    every = {"torch": torch.__version__, "threads": torch.get_num_threads(), **content}
    save_text(RESULTS / f"lowrank-{options.run.__name__}.json", json.dumps(every, indent=1) + "\n")


def worst_row(mask: Mask, u1: Tensor, u2: Tensor, x: Tensor, found: Tensor) -> float:
    """Return the largest relative error of sampled rows against float64."""
    rows = torch.randperm(mask.n, generator=torch.Generator().manual_seed(1))[:32]
    assert isinstance(mask, IntervalMask)
    worst = 0.0
    for row in rows.tolist():
        keys = slice(int(mask.lower[row]), int(mask.upper[row]) + 1)
        weights = u2[keys].double() @ u1[row].double()
        expected = weights @ x[keys].double()
        worst = max(worst, float((found[row] - expected).norm() / expected.norm().clamp(min=1e-30)))
    return worst


def added_peak(name: str, n: int) -> float:
    """Return the bytes by which a product raises the peak memory of this process; Linux only."""
    torch.set_num_threads(1)
    mask = MASKS[name](n)
    u1, u2, x = (torch.rand(n, c) for c in (RANK, RANK, COLUMNS))
    few = min(n, 1024)
    cb.masked_lowrank_matmul(u1[:few], u2[:few], x[:few], CausalMask(few))
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left would hide what this one needs
    Path("/proc/self/clear_refs").write_text("5")
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    before = int(fields["VmRSS"].split()[0])
    cb.masked_lowrank_matmul(u1, u2, x, mask)
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024.0 * (int(fields["VmHWM"].split()[0]) - before)


@torch.no_grad()
def masks(options: argparse.Namespace) -> None:
    sizes = options.sizes or ([2048, 4096, 8192] if options.quick else DEFAULT_SIZES)
    repeats = 1 if options.quick else options.repeats
    rows = []
    pool = multiprocessing.get_context("spawn").Pool(1)
    print("| mask | n | ms | against SDPA | against dense | worst row | added memory | of n x n |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.masks:
        last: dict[str, tuple[int, float]] = {}
        for n in sizes:
            progress(f"{name}, n = {n:,}")
            mask = MASKS[name](n)
            u1, u2, x = (torch.rand(n, c) for c in (RANK, RANK, COLUMNS))
            calls: dict[str, Callable[[], Any]] = {
                "ours": lambda u1=u1, u2=u2, x=x, m=mask: cb.masked_lowrank_matmul(u1, u2, x, m)
            }
            times = timed(calls, repeats, options.threads)
            # The others take so long that one run is enough; the dense mask is not in their time.
            others: dict[str, Callable[[], Any]] = {}
            q, k, v = u1[None, None], u2[None, None], x[None, None, :, :RANK]
            if name == "causal" and n <= CAUSAL_UP_TO:
                others["sdpa"] = lambda q=q, k=k, v=v: scaled_dot_product_attention(
                    q, k, v, is_causal=True
                )
            if n <= DENSE_UP_TO:
                seen = mask.to_dense()
                if name != "causal":
                    others["sdpa"] = lambda q=q, k=k, v=v, s=seen: scaled_dot_product_attention(
                        q, k, v, attn_mask=s
                    )
                others["dense"] = lambda u1=u1, u2=u2, x=x, s=seen: (u1 @ u2.mT).mul_(s) @ x
            times |= timed(others, 1 if n <= DENSE_UP_TO else 0, options.threads)
            last |= {other: (n, times[other]) for other in others}
            row: dict[str, Any] = {"mask": name, "n": n, "seconds": times["ours"]}
            cells = []
            for other in ("sdpa", "dense"):
                size, taken = last[other]
                ratio = taken * (n / size) ** 2 / times["ours"]
                row |= {other: taken * (n / size) ** 2, f"{other}_measured": size == n}
                cells.append(f"{ratio:.3g}x{'' if size == n else '*'}")
            error = ""
            if isinstance(mask, IntervalMask):
                row["worst_row"] = worst_row(mask, u1, u2, x, calls["ours"]())
                error = f"{row['worst_row']:.1e}"
            del u1, u2, x, q, k, v, calls, others, mask
            row["added_bytes"] = pool.apply(added_peak, (name, n))
            share = row["added_bytes"] / (4 * n * n)
            memory = f"{row['added_bytes'] / 1e6:.0f} MB | {share:.2%}"
            ours = f"{1e3 * row['seconds']:.1f}"
            print(f"| {name} | {n:,} | {ours} | {' | '.join(cells)} | {error} | {memory} |", flush=True)
            rows.append(row)
    pool.close()
    growth = {}
    large = [n for n in sizes if n >= GROWTH_FROM]
    if len(large) < 2:
        large = sizes
    for name in options.masks if len(large) > 1 else ():
        own = [row["seconds"] for row in rows if row["mask"] == name and row["n"] in large]
        growth[name] = exponent(large, own)
        print(f"{name}: time grows as n^{growth[name]:.3f} from {large[0]:,} to {large[-1]:,}")
    save(options, {"rank": RANK, "columns": COLUMNS, "rows": rows, "exponents": growth})


@torch.no_grad()
def degree(options: argparse.Namespace) -> None:
    n, d = (256, 4) if options.quick else (1024, 8)
    rows = []
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    print("| largest logit | degree | features | worst weight | its bound | worst row | its bound |")
    print("|---|---|---|---|---|---|---|")
    for largest in (0.1, 0.3, 1.0, 2.0, 4.0):
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 1, 1, n, d, generator=generator, dtype=torch.float64).unbind()
        # The bound is from norms: queries and keys of equal norm come close to it.
        q, k = q / q.norm(dim=-1, keepdim=True) * largest, k / k.norm(dim=-1, keepdim=True)
        exact = scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        logits = (q @ k.mT)[..., causal]
        for order in (2,) if options.quick else (2, 4, 6):
            progress(f"largest logit {largest}, degree {order}")
            found = lowrank_attention_stats(q, k, v, CausalMask(n), degree=order, scale=1.0)
            pairs = polynomial_features(q, order) @ polynomial_features(k, order).mT
            weight = float((pairs[..., causal] / logits.exp() - 1).abs().max())
            row = {
                "largest": largest,
                "degree": order,
                "features": found.features,
                "weight": weight,
                "weight_bound": truncation_error(largest, order),
                "row": float((found.output - exact).norm(dim=-1).max() / v.norm(dim=-1).max()),
                "row_bound": found.error_bound,
            }
            rows.append(row)
            print(
                f"| {largest} | {order} | {found.features:,} | {weight:.1e} | "
                f"{row['weight_bound']:.1e} | "
                f"{row['row']:.1e} | {row['row_bound']:.1e} |",
                flush=True,
            )
    save(options, {"n": n, "head_dim": d, "rows": rows})


@torch.no_grad()
def conv(options: argparse.Namespace) -> None:
    sizes = options.sizes or ([1024, 2048, 4096] if options.quick else [2**p for p in range(13, 18)])
    rank, columns = (4, 8) if options.quick else (16, 64)
    rows = []
    print("| n | ms | against the dense computation | worst row |\n|---|---|---|---|")
    measured = (0, 0.0)
    for n in sizes:
        progress(f"conv, n = {n:,}")
        u1, u2, value = torch.rand(n, rank), torch.rand(n, rank), torch.randn(n, columns)
        bias = -0.5 * torch.rand(n) - torch.arange(n).sqrt() / 50
        ours = timed(
            {"ours": lambda u1=u1, u2=u2, v=value, b=bias: relative_attention(u1, u2, v, b)},
            1 if options.quick else options.repeats,
            options.threads,
        )["ours"]
        if n <= DENSE_UP_TO:

            def dense(
                u1: Tensor = u1, u2: Tensor = u2, value: Tensor = value, bias: Tensor = bias
            ) -> Tensor:
                lag = torch.arange(len(u1))[:, None] - torch.arange(len(u1))
                weights = (u1 @ u2.mT).mul_(bias.exp()[lag.clamp_(min=0)]).tril_()
                return weights @ value / weights.sum(-1, keepdim=True)

            measured = n, timed({"dense": dense}, 1, options.threads)["dense"]
        found = relative_attention(u1, u2, value, bias)
        worst = 0.0
        for row in torch.randint(0, n, (32,), generator=torch.Generator().manual_seed(0)).tolist():
            weights = (u2[: row + 1].double() @ u1[row].double()) * bias[: row + 1].flip(
                0
            ).double().exp()
            expected = weights @ value[: row + 1].double() / weights.sum()
            worst = max(worst, float((found[row] - expected).norm() / expected.norm()))
        ratio = measured[1] * (n / measured[0]) ** 2 / ours
        star = "" if measured[0] == n else "*"
        print(f"| {n:,} | {1e3 * ours:.1f} | {ratio:.3g}x{star} | {worst:.1e} |", flush=True)
        rows.append({"n": n, "seconds": ours, "ratio": ratio, "measured": not star, "worst_row": worst})
    growth = exponent([row["n"] for row in rows], [row["seconds"] for row in rows])
    print(f"time grows as n^{growth:.3f} from {sizes[0]:,} to {sizes[-1]:,}")
    save(options, {"rank": rank, "columns": columns, "rows": rows, "exponent": growth})


FAR_FIELDS: dict[str, dict[str, Any]] = {
    "dropped": {},
    "segments": {"far_field": "segments"},
    "segments, key weights": {"far_field": "segments", "key_weights": True},
    "conv": {"far_field": "conv"},
    "lowrank": {"far_field": "lowrank"},
}


@torch.no_grad()
def heads(options: argparse.Namespace) -> None:
    from convbasis.integrations.capture import cached_layers
    from convbasis.integrations.smollm2 import (
        NAME,
        load_smollm2,
        load_tokenizer,
        sample_text,
        token_ids,
    )

    n = 512 if options.quick else options.length
    layers = [3, 21] if options.quick else list(range(0, 30, 3))
    progress(f"queries and keys of {n:,} tokens")
    ids = token_ids(load_tokenizer(), sample_text(), n)
    captured = cached_layers(lambda: load_smollm2().model, NAME, ids, layers)
    errors: dict[str, list[float]] = {name: [] for name in FAR_FIELDS}
    taken = dict.fromkeys(FAR_FIELDS, 0.0)
    for layer, given in captured.items():
        progress(f"layer {layer}")
        tensors = given.query, given.key, given.value
        common = {"scale": given.scale, "enable_gqa": True}
        exact = scaled_dot_product_attention(*tensors, is_causal=True, **common)
        for name, own in FAR_FIELDS.items():
            begun = seconds(options.threads)
            found = cb.hybrid_attention(*tensors, window=128, columns=32, **own, **common)
            taken[name] += seconds(options.threads) - begun
            off = (found - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
            errors[name] += off[0].tolist()
    count = len(errors["dropped"])
    print(f"n = {n:,}, window 128, 4 sinks, 32 columns, {count} heads of {len(layers)} layers\n")
    print("| far field | mean error | median | better than dropped | seconds |\n|---|---|---|---|---|")
    rows = []
    for name, own in errors.items():
        better = sum(x < y for x, y in zip(own, errors["dropped"], strict=True))
        row = {
            "far_field": name,
            "mean": statistics.mean(own),
            "median": statistics.median(own),
            "better": better,
            "seconds": taken[name],
        }
        rows.append(row)
        cells = f"{row['mean']:.4f} | {row['median']:.4f} | {better} | {taken[name]:.2f}"
        print(f"| {name} | {cells} |", flush=True)
    save(options, {"n": n, "layers": layers, "rows": rows, "errors": errors})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for run in (masks, degree, conv, heads):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("--quick", action="store_true", help="small sizes, less than a minute")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--repeats", type=int, default=3)
        if run in (masks, conv):
            command.add_argument("--sizes", type=int, nargs="+", help="tokens")
        if run is masks:
            command.add_argument("--masks", nargs="+", choices=list(MASKS), default=list(MASKS))
        if run is heads:
            command.add_argument("--length", type=int, default=4096, help="tokens")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.run(options)


if __name__ == "__main__":
    main()
