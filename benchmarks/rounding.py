"""The rounding estimate of FFT products against their true error, float32 on hard inputs.

    python benchmarks/rounding.py

For each kind of input: the largest and the root-mean-square ratio of a row's error (against direct
evaluation in float64) to the estimate that decides which rows are lost. Writes
benchmarks/results/rounding.json.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

import convbasis as cb
from convbasis.convolve.fft import fft_product
from convbasis.convolve.reference import product_rows
from convbasis.convolve.segments import lag_mask

ROOT = Path(__file__).parent.parent
WIDEST = 79  # nats
SIZES = (300, 1000, 5000)
COLUMNS = 16


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def spread(nats: float, *shape: int) -> torch.Tensor:
    return (torch.rand(*shape, dtype=torch.float64) * nats - nats).exp()


def impulse(n: int) -> torch.Tensor:
    values = draw(n, COLUMNS)
    values[n - 3] *= 1e4
    return values


def alternating(n: int) -> torch.Tensor:
    return ((-1.0) ** torch.arange(n, dtype=torch.float64))[:, None].expand(n, COLUMNS)


CASES = {
    "Gaussian": (lambda k, n: draw(k, n), lambda n: draw(n, COLUMNS)),
    "flat kernels": (lambda k, n: draw(k, n) * 0 + 1, lambda n: draw(n, COLUMNS)),
    "values with a mean": (lambda k, n: draw(k, n) * 0 + 1, lambda n: 1 + 0.1 * draw(n, COLUMNS)),
    "kernels spread over e^20": (lambda k, n: spread(20.0, k, n), lambda n: draw(n, COLUMNS)),
    "kernels spread over e^60": (lambda k, n: spread(60.0, k, n), lambda n: draw(n, COLUMNS)),
    "segments spread over e^20": (
        lambda k, n: spread(20.0, k, 1) * draw(k, n),
        lambda n: draw(n, COLUMNS),
    ),
    "decaying kernels": (
        lambda k, n: (-torch.arange(n).double() / 20).exp().expand(k, n),
        lambda n: draw(n, COLUMNS),
    ),
    "one huge value": (lambda k, n: draw(k, n).exp(), impulse),
    "equal alternating columns": (lambda k, n: draw(k, n) * 0 + 1, alternating),
}


def ratios(kernels: torch.Tensor, starts: torch.Tensor, x: torch.Tensor, transpose: bool):
    n = x.shape[0]
    kernels = kernels.masked_fill(~lag_mask(starts, n), 0.0).float()
    x = x.float()
    product, noise = fft_product(
        kernels[None, None], starts[None, None], x[None, None], 1 << 28, transpose=transpose
    )
    rows = torch.arange(n)[None]
    exact = product_rows(
        kernels.double()[None], starts[None], x.double()[None], rows, transpose=transpose
    )
    error = torch.linalg.vector_norm(product[0, 0].double() - exact[0], dim=-1)
    return error / noise[0, 0].expand(n)


def widest_spread(dtype: torch.dtype, backend: str) -> int:
    """Return the nats by which rows may differ before a head is evaluated directly, on a ramp.

    At most WIDEST: beyond that the exponentials themselves leave the range of float32.
    """
    n = 2000
    value = torch.randn(1, 1, n, 8, dtype=dtype)
    for nats in range(1, WIDEST + 1):
        query = torch.linspace(-nats / 2, nats / 2, n, dtype=dtype)[None, None, :, None]
        cb.conv_basis_attention(
            query, torch.ones_like(query), value, segment_length=250, scale=1.0, backend=backend
        )
        if cb.last_dispatch().heads_direct:
            return nats - 1
    return WIDEST


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    logging.getLogger("convbasis").setLevel(logging.ERROR)  # direct evaluation is what is looked for
    spreads = {
        backend: {str(dtype): widest_spread(dtype, backend) for dtype in (torch.float32, torch.float64)}
        for backend in ("partitioned", "fft")
    }
    for backend, found in spreads.items():
        for dtype, nats in found.items():
            most = f"up to {nats} nats" if nats < WIDEST else f"{nats} nats and maybe more"
            print(f"{backend}, {dtype}: transforms serve rows that differ by {most}")
    rows = []
    print("| input | worst row / estimate | rms / estimate |")
    print("|---|---|---|")
    for name, (make_kernels, make_values) in CASES.items():
        found = []
        for n in SIZES:
            for k in (1, 4, 16):
                inner = (torch.randperm(n - 1)[: k - 1] + 1).sort().values
                starts = torch.cat([torch.zeros(1, dtype=torch.int64), inner])
                for transpose in (False, True):
                    found.append(ratios(make_kernels(k, n), starts, make_values(n), transpose))
        worst = max(float(f.max()) for f in found)
        rms = max(float(f.square().mean().sqrt()) for f in found)
        rows.append({"input": name, "worst": worst, "rms": rms})
        print(f"| {name} | {worst:.2f} | {rms:.2f} |")
    content = {"torch": torch.__version__, "spread_in_nats": spreads, "rows": rows}
    output = ROOT / "benchmarks/results/rounding.json"
    part = output.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(output)


if __name__ == "__main__":
    main()
