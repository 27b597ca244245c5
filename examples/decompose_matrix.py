"""The conv basis of a lower-triangular matrix: how few numbers hold it, exactly and within a tolerance.

    python examples/decompose_matrix.py                              # a matrix made for the purpose
    python examples/decompose_matrix.py --noise 1e-3 --segments 8
    python examples/decompose_matrix.py --file matrix.npz --key H    # your own

The matrix that is made is the response of a system that changes a few times: entry (i, j) is what is
left at time i of a push at time j, and pushes between two changes fade alike. That is a conv basis with
one base for each state of the system.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import convbasis as cb
from convbasis.matrices import read_matrix

TOLERANCES = (0.0, 1e-6, 1e-4, 1e-2, 1e-1)


def changing_response(n: int, segments: int, noise: float, seed: int) -> Tensor:
    """Return responses ``(n, n)`` that fade at a rate of their own in each segment."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(n - 1, generator=generator)[: segments - 1].sort().values + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), starts])
    time_constants = 20.0 + 180.0 * torch.rand(segments, generator=generator, dtype=torch.float64)
    kernels = torch.exp(-torch.arange(n) / time_constants[:, None])
    matrix = cb.ConvBasis(kernels, starts).to_dense()
    return matrix + noise * (2 * torch.rand(n, n, generator=generator, dtype=torch.float64) - 1).tril()


def seconds(run) -> float:
    run()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="a .npy, .npz or .safetensors file")
    parser.add_argument("--key", help="name of the array in the file")
    parser.add_argument("-n", type=int, default=1500, help="rows of the matrix that is made")
    parser.add_argument("--segments", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.0, help="largest noise of an entry")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.file is None:
        matrix = changing_response(options.n, options.segments, options.noise, options.seed)
    else:
        matrix = read_matrix(options.file, options.key)
    n = len(matrix)
    print(f"{n} x {n} lower-triangular, {matrix.numel() * matrix.element_size():,} bytes dense")
    print(f"{'tolerance':>10} {'k':>6} {'largest error':>14} {'basis / dense':>14}")
    for tol in TOLERANCES:
        basis = cb.decompose(matrix, tol=tol)
        error = float((basis.to_dense() - matrix).abs().max())
        print(f"{tol:>10g} {basis.k:>6} {error:>14.1e} {basis.k / n:>14.4f}")
    basis = cb.decompose(matrix, tol=options.noise)
    shown = ", ".join(map(str, basis.starts[:8].tolist()))
    print(
        f"within the noise ({options.noise:g}): k = {basis.k}, starts {shown}{', ...' * (basis.k > 8)}"
    )
    x = torch.randn(n, 16, dtype=matrix.dtype)
    ours, dense = seconds(lambda: basis @ x), seconds(lambda: matrix @ x)
    difference = float((basis @ x - matrix @ x).norm() / (matrix @ x).norm())
    print(
        f"product with 16 vectors: {1e3 * ours:.2f} ms, dense {1e3 * dense:.2f} ms, difference "
        f"{difference:.1e}, by {cb.last_dispatch().backend}"
    )


if __name__ == "__main__":
    main()
