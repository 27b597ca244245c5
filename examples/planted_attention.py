"""Attention where the conv basis is exact, and where it is not.

    python examples/planted_attention.py
    python examples/planted_attention.py --tokens 32768 --bases 32

Queries and keys are planted: their logits are a sum of a few convolutions. `conv_basis_attention` finds
the segments from queries and keys alone and gives what exact attention gives, in a fraction of the
time. The same on random queries and keys, which have no such structure, is as wrong as no attention at
all: on your own model, compare first.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import convbasis as cb


def timed(run) -> tuple[Tensor, float]:
    run()
    begin = time.perf_counter()
    result = run()
    return result, time.perf_counter() - begin


def compare(name: str, query: Tensor, key: Tensor, value: Tensor, bases: int) -> Tensor:
    """Print one line, and return the starts that were found."""
    heads = tuple(tensor[None, None] for tensor in (query, key, value))
    exact, exact_seconds = timed(lambda: scaled_dot_product_attention(*heads, is_causal=True))
    stats = cb.conv_basis_attention_stats(*heads, num_bases=bases)
    _, ours_seconds = timed(lambda: cb.conv_basis_attention(*heads, num_bases=bases))
    starts = stats.basis.starts[0, 0]
    known = [int(start) for start in starts if start < len(query)]
    # Once the segments are known, as in a layer that is trained with them.
    _, given_seconds = timed(lambda: cb.conv_basis_attention(*heads, starts=known))
    mean = value.cumsum(0) / torch.arange(1, len(value) + 1)[:, None]
    norm = exact.norm()
    print(
        f"{name:>8} {len(known):>4} {float((stats.output - exact).norm() / norm):>10.1e} "
        f"{float((mean - exact[0, 0]).norm() / norm):>12.1e} {1e3 * exact_seconds:>10.1f} "
        f"{1e3 * ours_seconds:>10.1f} {1e3 * given_seconds:>10.1f}"
    )
    return torch.tensor(known)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--bases", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(options.seed)
    n, d, k = options.tokens, options.head_dim, options.bases
    planted = cb.planted_qk(n, d, k, generator=generator, dtype=torch.float32)
    value = torch.randn(n, d, generator=generator)
    print(f"{n:,} tokens, head dimension {d}, at most {k} bases; times in ms")
    print(
        f"{'input':>8} {'k':>4} {'error':>10} {'error of mean':>12} {'exact':>9} {'recovered':>10} "
        f"{'given':>10}"
    )
    found = compare("planted", planted.query, planted.key, value, k)
    right = found.tolist() == planted.basis.starts.tolist()
    query, key = torch.randn(2, n, d, generator=generator)
    compare("random", 2.0 * query, key, value, k)
    print(f"planted segments found: {'all' if right else 'not all'}, {found.tolist()[:6]} ...")
    print(
        "error: of the output, relative to exact attention; 'error of mean': of the plain mean of all "
        "values so far, which looks at nothing; 'recovered': with the search for the segments"
    )


if __name__ == "__main__":
    main()
