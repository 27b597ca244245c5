"""Speed, error and memory of conv-basis attention, against SDPA and the paper's transforms.

    python benchmarks/engine.py grid [--threads 1] [--lengths ...] [--num-bases ...] [--head-dims ...]
    python benchmarks/engine.py million [--threads 2]     the paper's case: n = 1,000,000, d = 3,072
    python benchmarks/engine.py heads [--threads 1]       several heads, batches and grouped heads
    python benchmarks/engine.py choice [--threads 1]      what "auto" chooses against the alternatives
    python benchmarks/engine.py limits [--threads 1]      where the time goes, and what bounds it
    python benchmarks/engine.py products                  a Toeplitz product against scipy's
    python benchmarks/engine.py plot                      the picture, from the results of grid

One head unless said otherwise, float32 (SDPA in bfloat16 on CUDA), uniform segments. What is timed is
the whole call: validation, kernels from queries and keys, product, normaliser. Runs are interleaved in
one process, medians are compared, and the ratio (time of the other / time of ours) comes first: below 1
we lose. SDPA above --largest-sdpa is extrapolated by n^2 from the largest measured length and marked *.
The error is that of the worst of 48 rows against a float64 evaluation of the same conv basis. Peak
memory is that of a process of its own which holds the inputs, the result and nothing else of size.
Writes benchmarks/results/engine-*.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import convbasis as cb
from convbasis.timing import interleaved_medians

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


def inputs(n: int, d: int, device: str, heads: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n + d)
    return [torch.randn(1, heads, n, d, generator=generator).to(device) for _ in range(3)]


def length_of(n: int, k: int) -> int:
    return -(-n // k)


def attend(query, key, value, length: int, backend: str = "auto") -> torch.Tensor:
    return cb.conv_basis_attention(query, key, value, segment_length=length, backend=backend)


def exact(query, key, value) -> torch.Tensor:
    return sdpa(query, key, value, is_causal=True)


def worst_row(query, first_keys, value, length: int, output: torch.Tensor, count: int = 48) -> float:
    """Relative error of the worst of some rows against float64, row by row and segment by segment.

    Inputs are of one head: query ``(n, d)``, first_keys ``(k, d)``, value and output ``(n, d_v)``.
    """
    n, d = query.shape
    rows = torch.linspace(0, n - 1, count, device=query.device).round().long().unique()
    worst = 0.0
    for i in rows.tolist():
        logits = []
        for key, start in zip(first_keys.double(), range(0, i + 1, length), strict=False):
            stop = min(start + length, i + 1)
            logits.append((query[start + i + 1 - stop : i + 1].double() @ key).flip(0) / math.sqrt(d))
        exact = torch.softmax(torch.cat(logits), 0) @ value[: i + 1].double()
        error = torch.linalg.vector_norm(output[i].double() - exact)
        worst = max(worst, float(error / torch.linalg.vector_norm(exact)))
    return worst


def literal(query, key, value, length: int) -> torch.Tensor:
    """The paper's scheme to the letter: one convolution, forward and back, for each basis."""
    n, d = query.shape[-2:]
    size = 2 * n
    total = torch.zeros(value.shape[-1] + 1, n, device=query.device)
    values = torch.cat([value[0, 0], torch.ones(n, 1, device=query.device)], -1).T.contiguous()
    for start in range(0, n, length):
        kernel = (query[0, 0, start:] @ key[0, 0, start] / math.sqrt(d)).exp()
        part = torch.zeros_like(values)
        part[:, start : start + length] = values[:, start : start + length]
        spectrum = torch.fft.rfft(kernel, n=size) * torch.fft.rfft(part, n=size)
        total += torch.fft.irfft(spectrum, n=size)[:, :n]
    return (total[:-1] / total[-1]).T[None, None]


def synchronised(function: Callable[[], torch.Tensor], device: str) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        result = function()
        if device != "cpu":
            torch.cuda.synchronize()
        return result

    return run


def peak_in_a_process(n: int, k: int, d: int, threads: int) -> float:
    """Gigabytes that a process needs at most for one call, inputs and libraries included."""
    code = (
        "import torch, convbasis as cb\n"
        f"torch.set_num_threads({threads})\n"
        "with torch.no_grad():\n"
        f"    q, k, v = (torch.randn(1, 1, {n}, {d}) for _ in range(3))\n"
        f"    o = cb.conv_basis_attention(q, k, v, segment_length={length_of(n, k)})\n"
        # Not ru_maxrss: a child inherits that of its parent.
        "print(next(x.split()[1] for x in open('/proc/self/status') if x.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024 / 1e9


@torch.no_grad()
def grid(options: argparse.Namespace) -> dict[str, Any]:
    device, rows = options.device, []
    print("| n | k | d | SDPA / ours | fft / ours | literal / ours | ours | SDPA | worst row | peak |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for d in options.head_dims:
        known: tuple[int, float] | None = None
        for n in options.lengths:
            query, key, value = inputs(n, d, device)
            half = [x.bfloat16() for x in (query, key, value)] if device != "cpu" else None
            for k in options.num_bases:
                length = length_of(n, k)
                heads = (query, key, value)
                functions = {"ours": partial(attend, *heads, length)}
                measured = n <= options.largest_sdpa
                if measured:
                    functions["sdpa"] = partial(exact, *(half or heads))
                slow = {}
                if n * k <= options.largest_fft:
                    slow["fft"] = partial(attend, *heads, length, "fft")
                    slow["literal"] = partial(literal, *heads, length)
                functions = {name: synchronised(f, device) for name, f in functions.items()}
                slow = {name: synchronised(f, device) for name, f in slow.items()}
                repeats = options.repeats * (5 if n <= 4096 else 1)
                # SDPA and ours side by side; the schemes of full length leave no cache warm: apart.
                times = interleaved_medians(functions, repeats if n <= 16_384 else max(3, repeats // 2))
                if slow:
                    again = interleaved_medians(
                        {"ours": functions["ours"], **slow}, 3 if n <= 16_384 else 1
                    )
                    times |= {name: t * times["ours"] / again["ours"] for name, t in again.items()}
                output = functions["ours"]()
                ran = cb.last_dispatch()
                if measured:
                    known = (n, times["sdpa"])
                elif known is not None:
                    times["sdpa"] = known[1] * (n / known[0]) ** 2
                row = {
                    "n": n,
                    "k": k,
                    "d": d,
                    "sdpa_extrapolated": not measured,
                    "seconds": times,
                    "worst_row_error": worst_row(
                        query[0, 0], key[0, 0, ::length], value[0, 0], length, output[0, 0]
                    ),
                    "dispatch": str(ran),
                }
                if device == "cpu" and n in options.memory_at:
                    row["peak_gigabytes"] = peak_in_a_process(n, k, d, options.threads)
                rows.append(row)
                ratio = {
                    name: f"{times[name] / times['ours']:.3g}x" if name in times else ""
                    for name in ("sdpa", "fft", "literal")
                }
                mark = "" if measured else "*"
                print(
                    f"| {n:,} | {k} | {d} | {ratio['sdpa']}{mark} | {ratio['fft']} | "
                    f"{ratio['literal']} | {times['ours'] * 1e3:.4g} ms | "
                    f"{times.get('sdpa', math.nan):.3g} s{mark} | {row['worst_row_error']:.1e} | "
                    f"{row.get('peak_gigabytes', math.nan):.2f} GB |",
                    flush=True,
                )
    growth = []
    for d in options.head_dims:
        for k in options.num_bases:
            ours = {r["n"]: r["seconds"]["ours"] for r in rows if r["k"] == k and r["d"] == d}
            if 65_536 in ours and 1_048_576 in ours:
                growth.append(
                    {"k": k, "d": d, "per_doubling": (ours[1_048_576] / ours[65_536]) ** 0.25}
                )
                print(f"growth per doubling, k = {k}, d = {d}: {growth[-1]['per_doubling']:.2f}")
    return {"rows": rows, "growth": growth}


def mapped(path: Path, shape: tuple[int, ...], *, fill: bool) -> torch.Tensor:
    """A bfloat16 file in memory, filled part by part with normal numbers or left as it is."""
    size = math.prod(shape)
    tensor = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
    if fill:
        generator = torch.Generator().manual_seed(size)
        step = 1 << 24
        for begin in range(0, size, step):
            part = tensor[begin : begin + step]
            part.copy_(torch.randn(len(part), generator=generator))
    return tensor.view(shape)


@torch.no_grad()
def million(options: argparse.Namespace) -> dict[str, Any]:
    """n = 1,000,000 and d = 3,072, as 48 heads of 64 and as one head; inputs and result in files.

    Files hold one head after the other; of the single head, some columns of the values after others. Of
    the keys a conv basis looks at the first of each segment alone: there is no file of them.
    """
    n, d, k = options.tokens, options.width, 16
    length = length_of(n, k)
    known_n = 16_384
    exact_once = partial(exact, *inputs(known_n, 64, "cpu"))
    known = interleaved_medians({"sdpa": exact_once}, 3)["sdpa"]
    exact_seconds = known * (n / known_n) ** 2 * d / 64
    found: dict[str, Any] = {"n": n, "d": d, "k": k, "exact_hours_extrapolated": exact_seconds / 3600}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print("making the files", flush=True)
        files = {
            name: mapped(Path(folder) / name, (n, d), fill=name != "output")
            for name in ("query", "value", "output")
        }
        first_keys = torch.randn(d // 64, k, 64, generator=torch.Generator().manual_seed(1)).bfloat16()

        def many_heads() -> tuple[torch.Tensor, ...]:
            query, value, output = (files[x].view(-1, n, 64) for x in ("query", "value", "output"))
            key = torch.zeros(n, 64, dtype=torch.bfloat16)
            for head, first in enumerate(first_keys):
                key[::length] = first
                parts = (query[head], key, value[head])
                output[head] = cb.conv_basis_attention(
                    *(x[None, None] for x in parts), segment_length=length
                )[0, 0]
            return query[0], first_keys[0], value[0], output[0]

        def one_head() -> tuple[torch.Tensor, ...]:
            # All that attention needs of a query are its k products with the first keys: they are made
            # once, and stand for a query of k dimensions whose first keys are unit vectors.
            columns = math.gcd(options.value_columns, d)
            query, first = files["query"], first_keys.transpose(0, 1).reshape(k, d)
            products = torch.empty(n, k)
            for begin in range(0, n, 1 << 14):
                rows = query[begin : begin + (1 << 14)].float()
                torch.mm(rows, first.float().T, out=products[begin : begin + (1 << 14)])
            products /= math.sqrt(d)
            key = torch.zeros(n, k)
            key[::length] = torch.eye(k)
            value, output = (files[name].view(-1, n, columns) for name in ("value", "output"))
            for part, result in zip(value, output, strict=True):
                parts = (products, key, part.float())
                result.copy_(
                    cb.conv_basis_attention(
                        *(x[None, None] for x in parts), segment_length=length, scale=1.0
                    )[0, 0]
                )
            return query, first, value[0], output[0]

        for name, run in (("48 heads of 64", many_heads), ("one head", one_head)):
            watch = MemoryWatch()
            begin = time.perf_counter()
            query, first, value, output = run()
            seconds = time.perf_counter() - begin
            beside = watch.stop()
            error = worst_row(query, first, value[:, :64], length, output[:, :64], 8)
            found[name] = {"seconds": seconds, "gigabytes_beside": beside, "worst_row_error": error}
            print(
                f"{name}: {exact_seconds / seconds:,.0f}x, {seconds:.0f} s, exact attention about "
                f"{exact_seconds / 3600:.1f} h (extrapolated), {beside:.2f} GB beside the files, "
                f"worst row {error:.1e} (the result is rounded to bfloat16)",
                flush=True,
            )
    return found


class MemoryWatch:
    """The largest anonymous memory of this process, seen every 50 ms: mapped files do not count."""

    def __init__(self) -> None:
        """Begin to watch."""
        self._most, self._on = 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._on:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self._most = max(self._most, int(line.split()[1]) * 1024)
            time.sleep(0.05)

    def stop(self) -> float:
        """End, and return gigabytes."""
        self._on = False
        self._thread.join()
        return self._most / 1e9


@torch.no_grad()
def heads(options: argparse.Namespace) -> dict[str, Any]:
    """Several heads, batches and grouped heads, beside SDPA: the ratio that one head has."""
    rows = []
    cases = {"1 head": (1, 1, 1), "4 heads": (1, 4, 4), "batch of 4": (4, 1, 1), "4 on 1": (1, 4, 1)}
    print("| n | heads | SDPA / ours | ours, each | SDPA, each |")
    print("|---|---|---|---|---|")
    for n in [n for n in options.lengths if n <= 16_384]:
        for name, (batch, count, kv) in cases.items():
            query = inputs(n, 64, options.device, batch * count)[0].view(batch, count, n, 64)
            key, value = (
                x.view(batch, kv, n, 64) for x in inputs(n, 64, options.device, batch * kv)[1:]
            )
            length = length_of(n, 16)
            functions = {
                "ours": partial(
                    cb.conv_basis_attention, query, key, value, segment_length=length, enable_gqa=True
                ),
                "sdpa": partial(sdpa, query, key, value, is_causal=True, enable_gqa=True),
            }
            times = interleaved_medians(functions, options.repeats)
            each = {side: seconds / (batch * count) for side, seconds in times.items()}
            rows.append({"n": n, "case": name, "seconds_each": each})
            ratio = times["sdpa"] / times["ours"]
            told = " | ".join(f"{each[side] * 1e3:.4g} ms" for side in ("ours", "sdpa"))
            print(f"| {n:,} | {name} | {ratio:.3g}x | {told} |", flush=True)
    return {"rows": rows}


@torch.no_grad()
def choice(options: argparse.Namespace) -> dict[str, Any]:
    """What the model picks among backends and partitions, beside the best of them as measured now."""
    from convbasis.convolve.choice import cost
    from convbasis.convolve.rates import rates
    from convbasis.tune import measure

    def told(m) -> str:
        sizes = m.choice.sizes
        return f"{sizes.piece} / {sizes.transform}" if sizes else m.choice.backend

    table = rates(options.device, options.threads)
    rows = []
    print("| n | k | best / auto | auto takes | time | best | time | alternatives |")
    print("|---|---|---|---|---|---|---|---|")
    for n in [n for n in options.lengths if n <= 262_144]:
        for k in options.num_bases:
            repeats = options.repeats * (4 if n <= 4096 else 1)
            found = list(measure(n, k, 64, torch.device(options.device), repeats))
            taken = min(found, key=lambda m: cost(m.amounts, table))
            best = min(found, key=lambda m: m.seconds)
            loss = taken.seconds / best.seconds
            rows.append(
                {"n": n, "k": k, "taken": told(taken), "best": told(best), "loss": loss}
                | {"seconds": {told(m): m.seconds for m in found}}
            )
            print(
                f"| {n:,} | {k} | {1 / loss:.2f} | {told(taken)} | {taken.seconds * 1e3:.3g} ms | "
                f"{told(best)} | {best.seconds * 1e3:.3g} ms | {len(found)} |",
                flush=True,
            )
    losses = [row["loss"] for row in rows]
    mean = math.exp(sum(map(math.log, losses)) / len(losses))
    print(f"{mean - 1:.1%} slower than the best (geometric mean), at most {max(losses) - 1:.0%}")
    return {"rows": rows, "geometric_mean_loss": mean, "worst_loss": max(losses)}


@torch.no_grad()
def products(options: argparse.Namespace) -> dict[str, Any]:
    """One Toeplitz matrix times 64 columns: scipy.linalg.matmul_toeplitz / causal_toeplitz_matmul."""
    from scipy.linalg import matmul_toeplitz

    rows = []
    print("| n | scipy / ours | ours | scipy | error |")
    print("|---|---|---|---|---|")
    for n in options.lengths:
        generator = torch.Generator().manual_seed(n)
        kernel = torch.randn(n, generator=generator, dtype=torch.float64)
        x = torch.randn(n, 64, generator=generator, dtype=torch.float64)
        first_row = torch.zeros(n, dtype=torch.float64)
        first_row[0] = kernel[0]
        arrays = (kernel.numpy(), first_row.numpy()), x.numpy()
        functions = {
            "ours": lambda a=kernel, b=x: cb.causal_toeplitz_matmul(a, b),
            "scipy": lambda a=arrays: matmul_toeplitz(*a, check_finite=True, workers=options.threads),
        }
        times = interleaved_medians(functions, options.repeats)
        theirs = torch.from_numpy(functions["scipy"]())
        error = float((functions["ours"]() - theirs).norm() / theirs.norm())
        rows.append(
            {"n": n, "seconds": times, "difference": error, "dispatch": str(cb.last_dispatch())}
        )
        print(
            f"| {n:,} | {times['scipy'] / times['ours']:.2f}x | {times['ours'] * 1e3:.3g} ms | "
            f"{times['scipy'] * 1e3:.3g} ms | {error:.1e} |",
            flush=True,
        )
    return {"rows": rows}


# What an operator of a profile is counted as.
STAGES = {
    "transforms": ("fft",),
    "matrix products": ("bmm", "mm"),
    "sums of products": ("addcmul", "aten::mul"),
    "copies": ("copy_", "clone", "zero_", "fill_"),
    "exponentials": ("exp",),
    "norms and checks": ("norm", "aminmax", "amax"),
}


@torch.no_grad()
def limits(options: argparse.Namespace) -> dict[str, Any]:
    """Rates of the machine, the least time that they allow, ours, and where ours goes."""
    from torch.profiler import ProfilerActivity, profile

    from convbasis.attention.call import folded
    from convbasis.attention.forward import choose_for
    from convbasis.convolve.choice import FEW_PIECES, Work, partitioned_amounts

    real, complex_ = torch.randn(1024, 1024), torch.randn(1024, 1024, dtype=torch.complex64)
    rows = torch.randn(64, 2048)
    large, target = torch.randn(1 << 24), torch.empty(1 << 24)
    times = interleaved_medians(
        {
            "sgemm": lambda: real @ real,
            "cgemm": lambda: complex_ @ complex_,
            "rfft": lambda: [torch.fft.rfft(rows) for _ in range(20)],
            "copy": lambda: target.copy_(large),
        },
        options.repeats,
    )
    rates = {
        "real matrix products, GFLOP/s": 2 * 1024**3 / times["sgemm"] / 1e9,
        "complex matrix products, GFLOP/s": 8 * 1024**3 / times["cgemm"] / 1e9,
        "transforms of 2,048, GFLOP/s": 20 * 2.5 * 64 * 2048 * 11 / times["rfft"] / 1e9,
        "copies of 64 MB, GB/s read and written": 2 * 4 * (1 << 24) / times["copy"] / 1e9,
    }
    for name, rate in rates.items():
        print(f"{name}: {rate:.1f}")
    found = []
    print("| n | k | ours / limit | ours | limit | arithmetic | traffic | where the time goes |")
    print("|---|---|---|---|---|---|---|---|")
    for n, k in ((65_536, 16), (65_536, 64), (65_536, 256), (1_048_576, 16)):
        query, key, value = inputs(n, 64, "cpu")
        length = length_of(n, k)
        run = partial(attend, query, key, value, length)
        ours = interleaved_medians({"ours": run}, options.repeats)["ours"]
        starts = torch.arange(0, n, length)[None, None]
        given = folded(query, key, value, None, 0.125)._replace(starts=starts)
        sizes = choose_for(given, "partitioned").sizes
        amounts = partitioned_amounts(Work(n, k, 65, 64, length, 1, torch.float32), sizes)
        summed = 8 * amounts.summed  # by matrix products, if their operands lay right
        arithmetic = (
            2.5 * amounts.transformed / rates["transforms of 2,048, GFLOP/s"]
            + amounts.flops / rates["real matrix products, GFLOP/s"]
            + summed / rates["complex matrix products, GFLOP/s"]
        ) / 1e9
        # Query, key and value read, the result written, spectra of values and result written and read.
        moved = 4 * 4 * n * 64 + 2 * 2 * 8 * sizes.bins * 65 * (n / sizes.piece + n / sizes.block)
        traffic = moved / rates["copies of 64 MB, GB/s read and written"] / 1e9
        least = max(arithmetic, traffic)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            run()
        shares = dict.fromkeys((*STAGES, "others"), 0.0)
        for event in record.key_averages():
            names = [s for s, keys in STAGES.items() if any(word in event.key for word in keys)]
            shares[names[0] if names else "others"] += event.self_cpu_time_total
        whole = sum(shares.values())
        shares = {name: share / whole for name, share in shares.items()}
        found.append(
            {
                "n": n,
                "k": k,
                "seconds": ours,
                "arithmetic": arithmetic,
                "traffic": traffic,
                "shares": shares,
            }
        )
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.01)
        print(
            f"| {n:,} | {k} | {ours / least:.1f} | {ours * 1e3:.4g} ms | {least * 1e3:.3g} ms | "
            f"{arithmetic * 1e3:.3g} ms | {traffic * 1e3:.3g} ms | {told} |",
            flush=True,
        )
    return {"rates": rates, "rows": found, "few_pieces": FEW_PIECES}


def plot(options: argparse.Namespace) -> None:
    """Time against n, from the results of grid."""
    from convbasis.report.figures import Series, times_figure

    found = json.loads((RESULTS / f"engine-grid-{options.threads}.json").read_text())
    rows = [row for row in found["rows"] if row["d"] == 64]
    series = []
    for k in sorted({row["k"] for row in rows}):
        own = [(row["n"], row["seconds"]["ours"]) for row in rows if row["k"] == k]
        series.append(Series(f"conv basis, k = {k}", own, extrapolated_from=None))
    exact = {row["n"]: row["seconds"]["sdpa"] for row in rows if "sdpa" in row["seconds"]}
    first = min((row["n"] for row in rows if row["sdpa_extrapolated"]), default=None)
    series.append(Series("SDPA", sorted(exact.items()), extrapolated_from=first))
    target = ROOT / "docs/figures/engine.png"
    title = f"One head, d = 64, {found['threads']} thread(s), {found['machine']}"
    times_figure(series, title, target)
    print(f"written to {target}")


PARTS = {
    "grid": grid,
    "heads": heads,
    "million": million,
    "choice": choice,
    "limits": limits,
    "products": products,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "plot"])
    lengths = [1024, 4096, 16_384, 65_536, 262_144, 1_048_576]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--num-bases", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--largest-sdpa", type=int, default=65_536)
    parser.add_argument("--largest-fft", type=int, default=1 << 22, help="tokens times bases")
    parser.add_argument("--memory-at", type=int, nargs="*", default=[1_048_576])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--value-columns", type=int, default=128)
    parser.add_argument("--folder", type=Path, default=None, help="for the files of million: 18 GB")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part == "plot":
        plot(options)
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    machine = f"{name or platform.machine()}, {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {options.threads} threads, {machine}", flush=True)
    found = PARTS[options.part](options)
    content = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "machine": machine,
        "date": time.strftime("%Y-%m-%d"),
        "peak_gigabytes_of_this_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * 1024
        / 1e9,
        **found,
    }
    suffix = "" if options.device == "cpu" else f"-{options.device}"
    target = options.output or RESULTS / f"engine-{options.part}-{options.threads}{suffix}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(target)


if __name__ == "__main__":
    main()
