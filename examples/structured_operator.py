"""Least squares without the matrix: what went into a system that changed, from what came out.

    python examples/structured_operator.py                   # checked against the dense solution
    python examples/structured_operator.py -n 30000 --no-check    # 7.2 GB if it were dense

A detector answers each pulse with a tail, ``out[i] = sum over j <= i of tail(i - j) · pulse[j]``, and
twice its tail became another one. The matrix of that is a conv basis with three bases. As a SciPy
LinearOperator it goes into LSQR, which needs products with it and its transpose alone, and gives the
pulses of least ``|A x - out|^2 + damp^2 |x|^2``.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from scipy.sparse.linalg import lsqr

import convbasis as cb


def detector(n: int) -> cb.ConvBasis:
    """Return the matrix of a detector whose tail changes at 1/3 and at 3/4 of the time."""
    lag = torch.arange(n, dtype=torch.float64)
    tails = [
        torch.exp(-lag / 8.0),
        0.7 * torch.exp(-lag / 20.0),
        torch.exp(-lag / 12.0) * torch.cos(lag / 6.0),
    ]
    return cb.ConvBasis(torch.stack(tails), [0, n // 3, 3 * n // 4])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=1500, help="points in time")
    parser.add_argument("--damp", type=float, default=0.1)
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    n, damp = options.n, options.damp
    generator = np.random.default_rng(0)
    basis = detector(n)
    operator = basis.as_linear_operator()
    pulses = generator.exponential(0.02, n)  # a background, and pulses
    pulses += np.where(generator.random(n) < 0.02, generator.exponential(3.0, n), 0.0)
    out = operator @ pulses + options.noise * generator.normal(size=n)
    begin = time.perf_counter()
    found, _, iterations, *_ = lsqr(operator, out, damp=damp, atol=1e-10, btol=1e-10, iter_lim=500)
    seconds = time.perf_counter() - begin
    own, dense = basis.k * n * 8 / 1e6, n * n * 8 / 1e6
    print(f"{n:,} unknowns, {basis.k} bases: {own:,.2f} MB, dense {dense:,.0f} MB")
    each = 1e3 * seconds / iterations / 2
    print(f"LSQR: {iterations} iterations, {seconds:.2f} s, {each:.2f} ms a product")
    print(f"error of the output as it is:  {np.linalg.norm(out - pulses) / np.linalg.norm(pulses):.3f}")
    print(
        f"error of the pulses found:     {np.linalg.norm(found - pulses) / np.linalg.norm(pulses):.3f}"
    )
    if options.check:
        matrix = np.asarray(basis)
        begin = time.perf_counter()
        exact = np.linalg.solve(matrix.T @ matrix + damp**2 * np.eye(n), matrix.T @ out)
        seconds = time.perf_counter() - begin
        difference = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        print(f"dense solution: {seconds:.2f} s, difference {difference:.1e}")


if __name__ == "__main__":
    main()
