"""Peak memory of recovery and attention, and of hybrid attention: at most 1.5 GB more than the inputs
at n = 131,072.

    python benchmarks/memory.py [--length 131072] [--num-bases 16]

Each case runs in a fresh process; what counts is the rise of its peak resident memory over the moment
when the inputs exist. Hybrid attention, of one head with the settings that plans choose from, is
measured at a half of the length too. Prints tables and writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
from pathlib import Path

import torch

import convbasis as cb
from convbasis.plan.ladder import default_ladder

ROOT = Path(__file__).parent.parent
LIMIT_GB = 1.5
HEAD_DIM = 64


def resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the peak since the last reset) of this process; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


@torch.no_grad()
def measure(n: int, k: int, kind: str) -> tuple[float, str]:
    generator = torch.Generator().manual_seed(0)
    if kind == "planted":
        planted = cb.planted_qk(n, HEAD_DIM, k, generator=generator, dtype=torch.float32)
        query, key = planted.query[None, None].clone(), planted.key[None, None].clone()
        del planted
    else:
        query, key = torch.randn(2, 1, 1, n, HEAD_DIM, generator=generator)
    value = torch.randn(1, 1, n, HEAD_DIM, generator=generator)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident_bytes("VmRSS")
    basis = cb.recover(query[0, 0], key[0, 0], num_bases=k)
    cb.conv_basis_attention(query, key, value, starts=basis.starts)
    del basis
    cb.conv_basis_attention(query, key, value, num_bases=k)
    return (resident_bytes("VmHWM") - before) / 1e9, str(cb.last_dispatch())


@torch.no_grad()
def measure_hybrid(n: int, number: int) -> float:
    """Return the GB that one setting of the ladder adds, estimate included."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, n, HEAD_DIM, generator=generator)
    setting = default_ladder(n)[number].at(n)._asdict()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    cb.hybrid_attention_stats(query, key, value, **setting)
    return (resident_bytes("VmHWM") - before) / 1e9


def hybrid_rows(n: int) -> list[dict[str, object]]:
    print("\n| hybrid attention | half of n | n | of the n x n matrix |\n|---|---|---|---|")
    rows = []
    context = multiprocessing.get_context("spawn")
    for number, step in enumerate(default_ladder(n)):
        added = []
        for length in (n // 2, n):
            with context.Pool(1) as pool:
                added.append(pool.apply(measure_hybrid, (length, number)))
        setting = {name: value for name, value in step.at(n)._asdict().items() if value}
        share = added[1] * 1e9 / (4 * n**2)
        print(f"| {setting} | {added[0]:.2f} GB | {added[1]:.2f} GB | {share:.2%} |", flush=True)
        rows.append({"setting": setting, "added_gb": added})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--num-bases", type=int, default=16)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/memory.json")
    options = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    print("| input | n | k | added peak memory | of the n x n matrix | ran |")
    print("|---|---|---|---|---|---|")
    for kind in ("planted", "random"):
        with context.Pool(1) as pool:
            added, dispatch = pool.apply(measure, (options.length, options.num_bases, kind))
        share = added * 1e9 / (4 * options.length**2)
        row = f"| {kind} | {options.length:,} | {options.num_bases} | {added:.2f} GB | {share:.2%} |"
        print(f"{row} {dispatch} |", flush=True)
        rows.append({"input": kind, "added_gb": added, "dispatch": dispatch})
    hybrid = hybrid_rows(options.length)
    content = {
        "n": options.length,
        "k": options.num_bases,
        "limit_gb": LIMIT_GB,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
        "hybrid": hybrid,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    part = options.output.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(options.output)
    if options.length == 131_072 and options.num_bases == 16:
        most = max(*(row["added_gb"] for row in rows), *(row["added_gb"][1] for row in hybrid))
        assert most < LIMIT_GB, f"{most:.2f} GB were added, more than {LIMIT_GB}"


if __name__ == "__main__":
    main()
