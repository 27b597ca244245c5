"""Speed and error of conv-basis attention against SDPA on planted input, search included.

    python benchmarks/attention.py [--lengths 1024 4096 ...] [--num-bases 4 16 64] [--threads 1]

One head, d = 64, float32; interleaved medians in one process. The ratio comes first: time of SDPA /
time of ours; below 1 we lose. SDPA above --largest-sdpa is extrapolated by n^2 from the largest
measured length and marked with *. Writes benchmarks/results/attention.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import convbasis as cb
from convbasis.report.timing import interleaved_medians

ROOT = Path(__file__).parent.parent
HEAD_DIM = 64


def worst_row(exact: torch.Tensor, output: torch.Tensor) -> float:
    difference = torch.linalg.vector_norm(output.double() - exact.double(), dim=-1)
    return float((difference / torch.linalg.vector_norm(exact.double(), dim=-1)).max())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536])
    parser.add_argument("--num-bases", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--largest-sdpa", type=int, default=65_536)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/attention.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads")
    print("| n | k | SDPA / ours | with starts given | SDPA | ours | worst row against exact |")
    print("|---|---|---|---|---|---|---|")
    rows, known = [], None
    for n in options.lengths:
        for k in options.num_bases:
            generator = torch.Generator().manual_seed(n + k)
            planted = cb.planted_qk(n, HEAD_DIM, k, generator=generator, dtype=torch.float32)
            value = torch.randn(1, 1, n, HEAD_DIM, generator=generator)
            heads = planted.query[None, None], planted.key[None, None], value
            starts = planted.basis.starts
            functions = {
                "recovered": lambda h=heads, k=k: cb.conv_basis_attention(*h, num_bases=k),
                "given": lambda h=heads, s=starts: cb.conv_basis_attention(*h, starts=s),
            }
            measured = n <= options.largest_sdpa
            if measured:
                functions["sdpa"] = lambda h=heads: sdpa(*h, is_causal=True)
            times = interleaved_medians(functions, options.repeats)
            error = None
            if measured:
                known = (n, times["sdpa"])
                error = worst_row(sdpa(*heads, is_causal=True), functions["recovered"]())
            elif known is None:
                parser.error("no length is short enough to measure SDPA")
            else:
                times["sdpa"] = known[1] * (n / known[0]) ** 2
            row = {
                "n": n,
                "k": k,
                "ratio": times["sdpa"] / times["recovered"],
                "ratio_starts_given": times["sdpa"] / times["given"],
                "sdpa_seconds": times["sdpa"],
                "sdpa_extrapolated": not measured,
                "our_seconds": times["recovered"],
                "worst_row_error": error,
                "dispatch": str(cb.last_dispatch()),
            }
            rows.append(row)
            mark = "" if measured else "*"
            shown = "not measured" if error is None else f"{error:.1e}"
            print(
                f"| {n:,} | {k} | {row['ratio']:.2f}x{mark} | {row['ratio_starts_given']:.2f}x{mark} "
                f"| {times['sdpa']:.3g} s{mark} | {times['recovered']:.3g} s | {shown} |",
                flush=True,
            )
    content = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    part = options.output.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(options.output)


if __name__ == "__main__":
    main()
