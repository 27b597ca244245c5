"""Masked low-rank products and attention: time, memory, growth, error, and real heads.

    python benchmarks/lowrank.py masks [--quick]     # each mask against the dense product and SDPA
    python benchmarks/lowrank.py degree [--quick]    # error against degree and the largest logit
    python benchmarks/lowrank.py conv [--quick]      # attention with relative bias, growth in n
    python benchmarks/lowrank.py heads [--quick]     # low rank as a far field of heads of SmolLM2-135M

Times are processor time of one thread unless --threads is given: medians of ours and of the others,
which are called in turn. Making a mask and planning its product come once for a mask and have a column
of their own. Memory is what a process of its own adds to its peak. A star marks what is extrapolated by
n^2. Each command prints a table and writes benchmarks/results/lowrank-COMMAND.json, except with
--quick, whose sizes prove nothing.
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
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import convbasis as cb
from convbasis.lowrank import (
    CausalMask,
    DistinctColumnsMask,
    DistinctRowsMask,
    DocumentMask,
    IntervalMask,
    Mask,
    RowChangeMask,
    ShiftedGroupMask,
    SlidingWindowMask,
    lowrank_attention_stats,
    polynomial_features,
    random_features,
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
DISTINCT = 8  # rows, or columns
SEEDS = 5  # of random features
WORST_ROW = 1e-5
LINEAR = ("causal", "window", "intervals", "documents")
LEAST_BYTES = 1 << 22  # the kernel counts resident pages no finer than this


def intervals(n: int) -> Callable[[], Mask]:
    rows = torch.arange(n)
    generator = torch.Generator().manual_seed(0)
    back = torch.randint(0, 4 * WINDOW, (n,), generator=generator)
    gap = torch.randint(0, 64, (n,), generator=generator)
    lower, upper = (rows - back).clamp(min=0), (rows - torch.minimum(gap, rows)).clamp(min=0)
    return partial(IntervalMask, lower, upper)


def documents(n: int) -> Callable[[], Mask]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 4 * WINDOW, (n,), generator=generator)
    lengths = lengths[: int((lengths.cumsum(0) < n).sum())]
    return partial(DocumentMask, [*lengths.tolist(), n - int(lengths.sum())])


def changes(n: int) -> Callable[[], Mask]:
    """Each row sees its own key and loses a random one of the latest: a window with holes."""
    gone: list[list[int]] = [[] for _ in range(n)]
    ends = torch.arange(n) + torch.randint(
        1, 2 * WINDOW, (n,), generator=torch.Generator().manual_seed(0)
    )
    for key, row in enumerate(ends.tolist()):
        if row < n:
            gone[row].append(key)
    return partial(RowChangeMask, [[i] for i in range(n)], gone)


@lru_cache(maxsize=1)
def distinct(n: int) -> tuple[Tensor, Tensor]:
    """Return some rows that each see half of the keys, and which of them each token has."""
    generator = torch.Generator().manual_seed(0)
    few = torch.rand(DISTINCT, n, generator=generator) < 0.5
    return few, torch.randint(0, DISTINCT, (n,), generator=generator)


def columns_of(n: int) -> Callable[[], Mask]:
    few, group = distinct(n)
    return partial(DistinctColumnsMask, few.mT.contiguous(), group)


# Each gives, for a number of tokens, what makes the mask.
MASKS: dict[str, Callable[[int], Callable[[], Mask]]] = {
    "causal": lambda n: partial(CausalMask, n),
    "window": lambda n: partial(SlidingWindowMask, n, WINDOW),
    "intervals": intervals,
    "documents": documents,
    "groups": lambda n: partial(ShiftedGroupMask, n, WINDOW),
    "changes": changes,
    "rows": lambda n: partial(DistinctRowsMask, *distinct(n)),
    "columns": columns_of,
}


def seen_by(mask: Mask, row: int) -> Tensor:
    """Return the keys that a row sees."""
    if isinstance(mask, IntervalMask):
        return torch.arange(int(mask.lower[row]), int(mask.upper[row]) + 1)
    if isinstance(mask, RowChangeMask):
        return mask.keys[(mask.first <= row) & (mask.last >= row)]
    few, group = distinct(mask.n)
    seen = few[group[row]] if isinstance(mask, DistinctRowsMask) else few[group, row]
    return seen.nonzero()[:, 0]


def seconds(threads: int) -> float:
    return time.thread_time() if threads == 1 else time.perf_counter()


def timed(calls: dict[str, tuple[Callable[[], Any], int]], threads: int) -> dict[str, float]:
    """Return the median time of each call.

    They are made in turn, each as often as it says, after a first time that does not count; one of 0
    times is made once, and counts.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(repeats for _, repeats in calls.values()) + 1):
        for name, (call, repeats) in calls.items():
            if turn > repeats:
                continue
            begun = seconds(threads)
            call()
            if turn or repeats == 0:
                found[name].append(seconds(threads) - begun)
    return {name: statistics.median(times) for name, times in found.items()}


def with_backward(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], None]:
    """Return a call of a function, and of its gradients with respect to all tensors."""
    own = [tensor.clone().requires_grad_() for tensor in tensors]

    def call() -> None:
        with torch.enable_grad():
            output = function(*own)
            torch.autograd.grad(output, own, torch.ones_like(output))

    return call


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


def demand(failures: list[str]) -> None:
    """End with an error that lists what does not hold."""
    if failures:
        raise SystemExit("does not hold:\n" + "\n".join(failures))


def worst_row(mask: Mask, u1: Tensor, u2: Tensor, x: Tensor, found: Tensor) -> float:
    """Return the largest relative error of sampled rows against float64."""
    worst = 0.0
    for row in torch.randperm(mask.n, generator=torch.Generator().manual_seed(1))[:32].tolist():
        keys = seen_by(mask, row)
        weights = u2[keys].double() @ u1[row].double()
        expected = weights @ x[keys].double()
        worst = max(worst, float((found[row] - expected).norm() / expected.norm().clamp(min=1e-30)))
    return worst


def planning(make: Callable[[], Mask], threads: int) -> tuple[Mask, float]:
    """Return a mask, and the time to make it and to plan its product, which its first product does."""
    begun = seconds(threads)
    mask = make()
    taken = seconds(threads) - begun
    one = torch.ones(1, mask.n, 1)
    times = []
    for _ in range(2):
        begun = seconds(threads)
        mask.product(one, one, one, False)
        times.append(seconds(threads) - begun)
    return mask, taken + max(0.0, times[0] - times[1])


def sdpa(u1: Tensor, u2: Tensor, x: Tensor, seen: Tensor | None) -> Callable[[], Tensor]:
    """Return SDPA of the same sizes under a dense mask, or a causal one where there is none."""
    q, k, v = u1[None, None], u2[None, None], x[None, None, :, :RANK]
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)


def dense(u1: Tensor, u2: Tensor, x: Tensor, seen: Tensor) -> Callable[[], Tensor]:
    return lambda: (u1 @ u2.mT).mul_(seen) @ x


def resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the peak since the last reset) of this process in bytes."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields[field].split()[0])


def prepared(method: str, name: str, n: int) -> tuple[Callable[[], Tensor], int]:
    """Return a call of a method, and the bytes of the dense mask that it needs."""
    mask = MASKS[name](n)()
    u1, u2, x = (torch.rand(n, c) for c in (RANK, RANK, COLUMNS))
    if method == "ours":
        return partial(cb.masked_lowrank_matmul, u1, u2, x, mask), 0
    if method == "sdpa" and name == "causal":
        return sdpa(u1, u2, x, None), 0
    seen = mask.to_dense()
    return (sdpa if method == "sdpa" else dense)(u1, u2, x, seen), seen.numel()


def added_peak(method: str, name: str, n: int) -> int | None:
    """Return the bytes by which a product raises the peak memory of this process; Linux only.

    A dense mask counts for the methods that need it. None where the kernel counts too coarsely.
    """
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back, so that nothing is hidden
    prepared(method, name, min(n, 512))[0]()  # what is loaded once is no part of it
    call, mask_bytes = prepared(method, name, n)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    output = call()
    added = resident("VmHWM") - before
    least = output.numel() * output.element_size()
    if added < least:
        if least > LEAST_BYTES:
            raise RuntimeError(f"{method}, {name}, n={n}: {added} bytes added, the output has {least}")
        return None
    return added + mask_bytes


def megabytes(number: int | None) -> str:
    return "" if number is None else f"{number / 1e6:.1f}"


@torch.no_grad()
def masks(options: argparse.Namespace) -> None:
    sizes = options.sizes or ([2048, 4096, 8192] if options.quick else DEFAULT_SIZES)
    repeats = 1 if options.quick else options.repeats
    rows: list[dict[str, Any]] = []
    # A process for each: what an earlier call leaves would hide what a later one needs.
    pool = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    print("| mask | n | plan ms | ms | backward / forward | against SDPA | against dense | worst row |"
          " added MB | SDPA MB | dense MB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in options.masks:
        last: dict[str, tuple[int, float]] = {}
        for n in sizes:
            progress(f"{name}, n = {n:,}")
            mask, planned = planning(MASKS[name](n), options.threads)
            u1, u2, x = (torch.rand(n, c) for c in (RANK, RANK, COLUMNS))
            product = partial(cb.masked_lowrank_matmul, mask=mask)
            calls: dict[str, tuple[Callable[[], Any], int]] = {
                "ours": (partial(product, u1, u2, x), repeats),
                "both ways": (with_backward(product, u1, u2, x), repeats),
            }
            # The others take so long that one time is enough; making a dense mask is not in it.
            seen = mask.to_dense() if n <= DENSE_UP_TO else None
            if name == "causal" and n <= CAUSAL_UP_TO:
                calls["sdpa"] = sdpa(u1, u2, x, None), 1 if n <= DENSE_UP_TO else 0
            if seen is not None:
                if name != "causal":
                    calls["sdpa"] = sdpa(u1, u2, x, seen), 1
                calls["dense"] = dense(u1, u2, x, seen), 1
            times = timed(calls, options.threads)
            others = [other for other in ("sdpa", "dense") if other in calls]
            last |= {other: (n, times[other]) for other in others}
            row: dict[str, Any] = {"mask": name, "n": n, "plan": planned, "seconds": times["ours"]}
            row["backward"] = (times["both ways"] - times["ours"]) / times["ours"]
            cells = []
            for other in ("sdpa", "dense"):
                if other not in last:  # with --sizes that are all too large
                    cells.append("")
                    continue
                size, taken = last[other]
                ratio = taken * (n / size) ** 2 / times["ours"]
                row |= {other: taken * (n / size) ** 2, f"{other}_measured": size == n}
                cells.append(f"{ratio:.3g}x{'' if size == n else '*'}")
            row["worst_row"] = worst_row(mask, u1, u2, x, product(u1, u2, x))
            del u1, u2, x, calls, mask, product, seen
            for method in ("ours", *others):
                row[f"{method}_bytes"] = pool.apply(added_peak, (method, name, n))
            told = [f"{1e3 * planned:.1f}", f"{1e3 * row['seconds']:.1f}", f"{row['backward']:.2f}"]
            told += [*cells, f"{row['worst_row']:.1e}"]
            told += [megabytes(row.get(f"{method}_bytes")) for method in ("ours", "sdpa", "dense")]
            print(f"| {name} | {n:,} | {' | '.join(told)} |", flush=True)
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
    wrong = [f"{r['mask']}, n = {r['n']:,}: row {r['worst_row']:.1e}" for r in rows
             if r["worst_row"] > WORST_ROW]  # fmt: skip
    if not options.quick:
        wrong += [
            f"{name} grows as n^{growth[name]:.3f}" for name in LINEAR if growth.get(name, 0.0) > 1.15
        ]
        wrong += [
            f"{r['mask']}, n = {r['n']:,}: {r['sdpa'] / r['seconds']:.3g} times as fast as SDPA, not 20"
            for r in rows
            if r["n"] == CAUSAL_UP_TO and "sdpa" in r and r["sdpa"] < 20.0 * r["seconds"]
        ]
    demand(wrong)


def random_errors(
    q: Tensor, k: Tensor, v: Tensor, exact: Tensor, count: int, seed: int
) -> tuple[float, float]:
    """Return the errors of the worst weight and of the worst row by random features."""
    largest = float(q.norm(dim=-1).max() / k.norm(dim=-1).max())
    q, k = q / math.sqrt(largest), k * math.sqrt(largest)  # of one norm, which random features like
    u1, u2 = random_features(q, k, count, scale=1.0, seed=seed)
    # What features leave out: a factor for each query, and one for all keys.
    norms = 0.5 * k.square().sum(-1, keepdim=True)
    factor = (0.5 * q.square().sum(-1, keepdim=True) + norms.amax(-2, keepdim=True)).exp()
    weights = (u1 * factor @ u2.mT).tril()
    causal = torch.ones_like(weights, dtype=torch.bool).tril()
    weight = (weights / (q @ k.mT).exp() - 1)[causal].abs().max()
    row = (weights @ v / weights.sum(-1, keepdim=True) - exact).norm(dim=-1).max()
    return float(weight), float(row / v.norm(dim=-1).max())


@torch.no_grad()
def degree(options: argparse.Namespace) -> None:
    n, d = (256, 4) if options.quick else (1024, 8)
    rows = []
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    print("| largest logit | degree | features | worst weight | its bound | worst row | its bound |"
          " random features: worst weight | worst row |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
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
            drawn = [random_errors(q, k, v, exact, found.features, seed) for seed in range(SEEDS)]
            row = {
                "largest": largest,
                "degree": order,
                "features": found.features,
                "weight": weight,
                "weight_bound": truncation_error(largest, order),
                "row": float((found.output - exact).norm(dim=-1).max() / v.norm(dim=-1).max()),
                "row_bound": found.error_bound,
                "random_weight": statistics.median(off for off, _ in drawn),
                "random_row": statistics.median(off for _, off in drawn),
            }
            rows.append(row)
            print(
                f"| {largest} | {order} | {found.features:,} | {weight:.1e} | "
                f"{row['weight_bound']:.1e} | "
                f"{row['row']:.1e} | {row['row_bound']:.1e} | "
                f"{row['random_weight']:.1e} | {row['random_row']:.1e} |",
                flush=True,
            )
    save(options, {"n": n, "head_dim": d, "rows": rows})


@torch.no_grad()
def conv(options: argparse.Namespace) -> None:
    sizes = options.sizes or ([1024, 2048, 4096] if options.quick else [2**p for p in range(13, 18)])
    rank, columns = (4, 8) if options.quick else (16, 64)
    repeats = 1 if options.quick else options.repeats
    rows: list[dict[str, Any]] = []
    print("| n | ms | backward / forward | against the dense computation | worst row |")
    print("|---|---|---|---|---|")
    measured = (1, 0.0)
    for n in sizes:
        progress(f"conv, n = {n:,}")
        u1, u2, value = torch.rand(n, rank), torch.rand(n, rank), torch.randn(n, columns)
        bias = -0.5 * torch.rand(n) - torch.arange(n).sqrt() / 50
        given = u1, u2, value, bias
        calls: dict[str, tuple[Callable[[], Any], int]] = {
            "ours": (partial(relative_attention, *given), repeats),
            "both ways": (with_backward(relative_attention, *given), repeats),
        }
        if n <= DENSE_UP_TO:

            def densely(
                u1: Tensor = u1, u2: Tensor = u2, value: Tensor = value, bias: Tensor = bias
            ) -> Tensor:
                lag = torch.arange(len(u1))[:, None] - torch.arange(len(u1))
                weights = (u1 @ u2.mT).mul_(bias.exp()[lag.clamp_(min=0)]).tril_()
                return weights @ value / weights.sum(-1, keepdim=True)

            calls["dense"] = densely, 1
        times = timed(calls, options.threads)
        ours, backward = times["ours"], (times["both ways"] - times["ours"]) / times["ours"]
        if "dense" in times:
            measured = n, times["dense"]
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
        cells = f"{1e3 * ours:.1f} | {backward:.2f} | {ratio:.3g}x{star} | {worst:.1e}"
        print(f"| {n:,} | {cells} |", flush=True)
        row = {"n": n, "seconds": ours, "backward": backward, "ratio": ratio, "measured": not star}
        rows.append(row | {"worst_row": worst})
    growth = exponent([row["n"] for row in rows], [row["seconds"] for row in rows])
    print(f"time grows as n^{growth:.3f} from {sizes[0]:,} to {sizes[-1]:,}")
    save(options, {"rank": rank, "columns": columns, "rows": rows, "exponent": growth})
    wrong = [f"n = {r['n']:,}: row {r['worst_row']:.1e}" for r in rows if r["worst_row"] > WORST_ROW]
    if not options.quick and growth > 1.2:
        wrong.append(f"time grows as n^{growth:.3f}")
    demand(wrong)


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
