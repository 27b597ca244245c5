"""A causal filter bank on a time series: its echo, its trend and its season, from past values alone.

    python examples/filter_bank.py
    python examples/filter_bank.py --points 200000 --period 288 --echo-delay 101 --echo-gain -0.4

The series is generated, so that everything that is found can be compared with what went in: a slow
trend, a season, noise, and an echo of all three, ``series[t] = dry[t] + gain · dry[t - delay]``. Every
filter is one kernel by lag, applied with `causal_toeplitz_matmul`: value t of a result uses values 0..t
alone, so that the same numbers would have come out while the series came in. Filters in a row are one
filter, whose kernel is the product of their kernels, by the same function; entries that cancel to
nothing are evaluated directly there, which is logged.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor
from torch.nn.functional import pad

import convbasis as cb


def generate(options: argparse.Namespace) -> dict[str, Tensor]:
    """Return trend, season, dry series and series, ``(n,)`` each."""
    n, generator = options.points, torch.Generator().manual_seed(options.seed)
    t = torch.arange(n, dtype=torch.float64)
    trend = 3.0 * t / n + 2.0 * torch.sin(2.0 * math.pi * t / (0.7 * n))
    angle = 2.0 * math.pi * t / options.period
    season = torch.sin(angle) + 0.5 * torch.cos(2.0 * angle) + 0.25 * torch.sin(5.0 * angle + 1.0)
    dry = trend + season + options.noise * torch.randn(n, generator=generator, dtype=torch.float64)
    series = dry.clone()
    series[options.echo_delay :] += options.echo_gain * dry[: n - options.echo_delay]
    return {"trend": trend, "season": season, "dry": dry, "series": series}


def at_lags(lags: range, weights: Tensor) -> Tensor:
    """Return the kernel with weights at some lags, up to the last of them."""
    kernel = torch.zeros(lags[-1] + 1, dtype=torch.float64)
    kernel[list(lags)] = weights
    return kernel


def in_a_row(first: Tensor, second: Tensor) -> Tensor:
    """Return the kernel of two filters one after the other."""
    length = len(first) + len(second) - 1
    first, second = (pad(kernel, (0, length - len(kernel))) for kernel in (first, second))
    return cb.causal_toeplitz_matmul(first, second)


def filtered(kernels: list[Tensor], series: Tensor) -> Tensor:
    """Return what each filter makes of the series, ``(filters, n)``."""
    n = len(series)
    bank = torch.stack([pad(kernel[:n], (0, n - len(kernel[:n]))) for kernel in kernels])
    return cb.causal_toeplitz_matmul(bank, series[:, None])[..., 0]


def trend_kernel(period: int, periods: int = 4) -> Tensor:
    """Return a mean over whole periods, which no season passes, without delay for straight lines."""
    mean = torch.full((periods * period,), 1.0 / (periods * period), dtype=torch.float64)
    twice = in_a_row(mean, mean)
    return 2.0 * pad(mean, (0, len(twice) - len(mean))) - twice


def season_kernel(period: int, periods: int = 16) -> Tensor:
    """Return a mean over the same point of earlier periods, of what the trend leaves."""
    comb = at_lags(range(0, periods * period, period), torch.ones(periods).double() / periods)
    rest = -trend_kernel(period)
    rest[0] += 1.0
    return in_a_row(comb, rest)


def echo_remover(delay: int, gain: float) -> Tensor:
    """Return the inverse of an echo: 1 - gain at the delay, + gain^2 at twice the delay, and so on."""
    count = 1 + math.ceil(math.log(1e-6) / math.log(abs(gain)))
    powers = (-gain) ** torch.arange(count, dtype=torch.float64)
    return at_lags(range(0, count * delay, delay), powers)


def find_echo(rest: Tensor, longest: int) -> tuple[int, float]:
    """Return delay and gain of the echo in noise, from its autocorrelation gain / (1 + gain^2)."""
    n = len(rest)
    spectrum = torch.fft.rfft(rest - rest.mean(), n=2 * n)
    correlation = torch.fft.irfft(spectrum.abs().square())[:longest]
    correlation = correlation / correlation[0]
    delay = int(correlation[2:].abs().argmax()) + 2
    found = max(-0.4999, min(0.4999, float(correlation[delay])))
    return delay, (1.0 - math.sqrt(1.0 - 4.0 * found**2)) / (2.0 * found)


def relative(found: Tensor, known: Tensor, after: int) -> float:
    """Return the error from some point on, relative to the variation of what is known."""
    own = known[after:]
    return float((found[after:] - own).norm() / (own - own.mean()).norm())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=30_000)
    parser.add_argument("--period", type=int, default=96, help="points of the season, as of a day")
    parser.add_argument("--echo-delay", type=int, default=37, help="below the period")
    parser.add_argument("--echo-gain", type=float, default=0.5, help="between -1 and 1, not 0")
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    n, period = options.points, options.period
    known = generate(options)
    series = known["series"]
    begin = time.perf_counter()
    bank = [trend_kernel(period), season_kernel(period)]
    # The series with its echo has a trend and a season too; its echo shows in what they leave.
    trend, season = filtered(bank, series)
    after = len(bank[1])
    delay, gain = find_echo((series - trend - season)[after:], period)
    remover = echo_remover(delay, gain)
    # From the series itself: each filter behind the one that removes the echo.
    whole = [remover, *(in_a_row(kernel, remover) for kernel in bank)]
    dry, dry_trend, dry_season = filtered(whole, series)
    seconds = time.perf_counter() - begin
    print(f"{n:,} points, season of {period}, {seconds:.2f} s, by {cb.last_dispatch().backend}")
    print(
        f"echo: delay {delay} (in truth {options.echo_delay}), gain {gain:.3f} (in truth "
        f"{options.echo_gain:g})"
    )
    print(f"{'part':>8} {'error with the echo':>20} {'error behind its removal':>25}")
    for name, before, behind in (
        ("dry", series, dry),
        ("trend", trend, dry_trend),
        ("season", season, dry_season),
    ):
        first, second = relative(before, known[name], after), relative(behind, known[name], after)
        print(f"{name:>8} {first:>20.3f} {second:>25.3f}")
    later = series.clone()
    later[n // 2 :] = 100.0
    early = filtered(whole, later)[:, : n // 2]
    change = float((early - torch.stack([dry, dry_trend, dry_season])[:, : n // 2]).abs().max())
    print(f"causal: another second half changes the first half by {change:.0e}")


if __name__ == "__main__":
    main()
