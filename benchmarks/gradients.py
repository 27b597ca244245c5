"""Forward and backward together: a conv basis beside exact attention.

    python benchmarks/gradients.py [--threads 1] [--lengths 1024 4096 16384 32768 65536]

One head, float32, uniform segments. Of both meanings of the gradient: time of exact attention with its
backward pass / ours, interleaved medians, ratio first, with the largest relative error of a gradient
against float64. Then the peak memory of a forward and a backward pass at n = 262,144 in a process of
its own. Writes benchmarks/results/gradients-THREADS.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
from functools import partial
from pathlib import Path

import torch
from memory import resident_bytes

import convbasis as cb
from convbasis.timing import interleaved_medians

ROOT = Path(__file__).parent.parent


def inputs(n: int, d: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    made = torch.randn(4, 1, 1, n, d, generator=generator).to(dtype)
    return [x.requires_grad_() if i < 3 else x for i, x in enumerate(made.unbind())]


def ours(tensors: list[torch.Tensor], length: int, gradient: str) -> tuple[torch.Tensor, ...]:
    query, key, value, incoming = tensors
    output = cb.conv_basis_attention(query, key, value, segment_length=length, gradient=gradient)
    return torch.autograd.grad(output, (query, key, value), incoming)


def exact(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    query, key, value, incoming = tensors
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return torch.autograd.grad(output, (query, key, value), incoming)


def error(tensors: list[torch.Tensor], length: int, gradient: str) -> float:
    """Relative error of the worst of the three gradients, against the same in float64."""
    found = ours(tensors, length, gradient)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = ours(wide, length, gradient)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def peak(n: int, k: int, d: int, threads: int) -> float:
    """Return the peak resident memory of a process with one forward and backward pass, in GB."""
    torch.set_num_threads(threads)
    tensors = inputs(n, d)
    ours(tensors, -(-n // k), "forward")
    return resident_bytes("VmHWM") / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16_384, 32_768, 65_536])
    parser.add_argument("--num-bases", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-at", type=int, default=262_144)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"torch {torch.__version__}, {options.threads} threads, {platform.machine()}")
    print("| n | k | gradient | SDPA / ours | ours | SDPA | worst gradient |")
    print("|---|---|---|---|---|---|---|")
    for n in options.lengths:
        tensors = inputs(n, options.dim)
        repeats = options.repeats * (5 if n <= 4096 else 1)
        for k in options.num_bases:
            length = -(-n // k)
            functions = {
                "sdpa": partial(exact, tensors),
                "forward": partial(ours, tensors, length, "forward"),
                "attention": partial(ours, tensors, length, "attention"),
            }
            times = interleaved_medians(functions, repeats)
            for gradient in ("forward", "attention"):
                worst = (
                    error(tensors, length, gradient) if n <= 32_768 or gradient == "forward" else None
                )
                ratio = times["sdpa"] / times[gradient]
                rows.append(
                    {"n": n, "k": k, "gradient": gradient, "ratio": ratio, "seconds": times[gradient]}
                    | {"sdpa_seconds": times["sdpa"], "worst_error": worst}
                )
                told = "" if worst is None else f"{worst:.1e}"
                print(
                    f"| {n:,} | {k} | {gradient} | {ratio:.3g}x | {times[gradient] * 1e3:.4g} ms | "
                    f"{times['sdpa'] * 1e3:.4g} ms | {told} |",
                    flush=True,
                )
    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "d": options.dim,
        "rows": rows,
    }
    if options.memory_at:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found["peak_gigabytes"] = pool.apply(
                peak, (options.memory_at, 16, options.dim, options.threads)
            )
        print(
            f"n = {options.memory_at:,}, k = 16, forward and backward: peak of the process "
            f"{found['peak_gigabytes']:.2f} GB"
        )
    path = options.output or ROOT / f"benchmarks/results/gradients-{options.threads}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
