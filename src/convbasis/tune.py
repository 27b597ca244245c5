"""Fit the cost model to this machine: measure, solve for the rates, keep them in a file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .attention.forward import Inputs, conv_basis_fwd
from .convolve.choice import (
    DEFAULT_MAX_BYTES,
    Amounts,
    Choice,
    Work,
    candidates,
    cost,
    direct_amounts,
    fft_amounts,
    partitioned_amounts,
)
from .convolve.rates import Rates, rates, rates_file, write_rates

_HEAD_DIM = 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
"""Sequence lengths that are measured by default, in tokens."""

_BASES = (1, 4, 16, 64, 256)
_LONGEST_DIRECT = 2048
_LARGEST_FFT = 1 << 17  # tokens times segments
_SIZES = 4  # partitions measured for each shape: the likeliest ones
# Columns of values, up to a length. With one number alone, copies and products could not be told apart.
_WIDTHS = {64: max(LENGTHS), 4: 4096}


class Measurement(NamedTuple):
    """One timed configuration."""

    n: int
    k: int
    width: int
    choice: Choice
    amounts: Amounts
    seconds: float


class Tuned(NamedTuple):
    """What a fit gave."""

    rates: Rates
    path: Path
    measurements: list[Measurement]
    typical_error: float
    """Median relative error of the modelled times."""
    loss: float
    """Geometric mean, over shapes, of the time of the choice over that of the best."""
    worst_loss: float
    """The largest of those ratios."""


def tune(
    *,
    device: str = "cpu",
    path: Path | None = None,
    lengths: tuple[int, ...] = LENGTHS,
    repeats: int = 3,
    progress: Callable[[float], None] | None = None,
) -> Tuned:
    """Measure attention in all backends, fit the rates of the cost model and write them to a file.

    Args:
        device: to measure on, for its current number of threads.
        path: file for the rates; by default the one that choices are made from.
        lengths: sequence lengths to measure, in tokens.
        repeats: timed runs of each configuration; the median counts.
        progress: called with the part that is done, 0 to 1.

    Returns:
        `Tuned`.
    """
    shapes = [(n, k) for n in lengths for k in _BASES if 4 * k <= n]
    measured: list[Measurement] = []
    for index, (n, k) in enumerate(shapes):
        for width, longest in _WIDTHS.items():
            if n <= longest:
                measured.extend(measure(n, k, width, torch.device(device), repeats))
        if progress is not None:
            progress((index + 1) / len(shapes))
    work = torch.tensor([m.amounts for m in measured], dtype=torch.float64)
    seconds = torch.tensor([m.seconds for m in measured], dtype=torch.float64)
    fitted = Rates(*fit_rates(work, seconds).tolist())
    target = rates_file() if path is None else path
    kind = torch.device(device).type
    write_rates(target, {f"{kind}-{torch.get_num_threads()}": fitted})
    errors = [abs(cost(m.amounts, fitted) / m.seconds - 1) for m in measured]
    losses = list(_losses(measured, fitted))
    return Tuned(
        fitted,
        target,
        measured,
        statistics.median(errors),
        statistics.geometric_mean(losses),
        max(losses),
    )


def fit_rates(amounts: Tensor, seconds: Tensor) -> Tensor:
    """Return the non-negative rates whose times have the least squared relative errors.

    Args:
        amounts: ``(measurements, amounts)`` float64, >= 0.
        seconds: ``(measurements,)`` float64.
    """
    relative = amounts / seconds[:, None]
    scale = relative.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    relative = relative / scale
    gram, target = relative.T @ relative, relative.sum(0)
    fitted = torch.full_like(scale, 0.1)
    # Multiplicative steps keep every rate positive and never raise the error.
    for _ in range(20_000):
        fitted = fitted * target / (gram @ fitted).clamp(min=1e-300)
    return fitted / scale


def measure(n: int, k: int, width: int, device: torch.device, repeats: int) -> Iterator[Measurement]:
    """Time attention by the likeliest partitions, and by other backends where that is not hopeless.

    Args:
        n: tokens.
        k: uniform segments.
        width: columns of values.
        device: to measure on.
        repeats: timed runs, interleaved; the median counts.
    """
    generator = torch.Generator().manual_seed(n + k)
    query, key, value = torch.randn(3, n, _HEAD_DIM, generator=generator).to(device).unbind()
    value = value + 1.0  # few rows cancel, so that few are evaluated twice
    length = -(-n // k)
    starts = torch.arange(0, n, length, device=device)[None, None]
    inputs = Inputs(
        query[None, None],
        key[None],
        value[None, :, :width].contiguous(),
        starts,
        None,
        _HEAD_DIM**-0.5,
        torch.float32,
    )
    work = Work(n, k, width + 1, _HEAD_DIM, length, 1, torch.float32, device.type)
    table = rates(device.type, torch.get_num_threads())
    sizes = sorted(candidates(work), key=lambda s: cost(partitioned_amounts(work, s), table))
    options = [
        (Choice("partitioned", "measured", s), partitioned_amounts(work, s)) for s in sizes[:_SIZES]
    ]
    if n <= _LONGEST_DIRECT:
        options.append((Choice("direct", "measured"), direct_amounts(work)))
    if n * k <= _LARGEST_FFT:
        options.append((Choice("fft", "measured"), fft_amounts(work)))
    times: list[list[float]] = [[] for _ in options]
    for turn in range(repeats + 1):
        for (choice, _), own in zip(options, times, strict=True):
            begin = time.perf_counter()
            done = conv_basis_fwd(inputs, choice, result=torch.float32, max_bytes=DEFAULT_MAX_BYTES)
            float(done.lse[0, 0, -1])  # waits for an accelerator
            if turn:
                own.append(time.perf_counter() - begin)
    for (choice, amounts), own in zip(options, times, strict=True):
        yield Measurement(n, k, width, choice, amounts, statistics.median(own))


def _losses(measured: list[Measurement], fitted: Rates) -> Iterator[float]:
    """Yield, for each shape, the time of what the model would choose over the least time."""
    for shape in dict.fromkeys((m.n, m.k, m.width) for m in measured):
        own = [m for m in measured if (m.n, m.k, m.width) == shape]
        chosen = min(own, key=lambda m: cost(m.amounts, fitted))
        yield chosen.seconds / min(m.seconds for m in own)
