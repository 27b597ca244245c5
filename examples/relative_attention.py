"""Kernelised attention with a learned bias by lag forecasts a time series, in almost linear time.

    python examples/relative_attention.py
    python examples/relative_attention.py --points 20000 --period 37 --steps 200

The next value is an average of earlier values. A value weighs more when what came before it looks like
what came last (a product of polynomial features), and by its age: exp(bias[lag]), which is learned on
the first half of the series by gradient descent. Both together are low rank times a convolution, so
that no n x n matrix exists, forwards or backwards. The series has a season that drifts slowly, and
noise; the bias finds its period by itself: the strongest lags are one before its multiples, since lag 0
is the last value and the forecast is one ahead.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from convbasis.lowrank import polynomial_features, relative_attention


def series(points: int, period: int, noise: float) -> Tensor:
    """Return a season of three waves that drift, and noise; of unit variance or so."""
    t = torch.arange(points, dtype=torch.float64)
    drift = 0.3 * torch.randn(points, dtype=torch.float64).cumsum(0) / math.sqrt(points)
    waves = [torch.sin(2 * math.pi * m * t / period + m * drift + m) / m for m in (1, 2, 3)]
    return torch.stack(waves).sum(0) + noise * torch.randn(points, dtype=torch.float64)


class Forecaster(torch.nn.Module):
    """Attention over earlier values, with a table of biases for the youngest lags."""

    def __init__(self, lags: int) -> None:
        super().__init__()
        self.sharpness = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.zeros(lags, dtype=torch.float64))
        self.rest = torch.nn.Parameter(torch.tensor(-4.0, dtype=torch.float64))  # of older ones

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of what each value follows, of what the next one follows, and the biases."""
        last = torch.stack([x, torch.nn.functional.pad(x, (1, -1))], dim=-1)
        follows = torch.nn.functional.pad(last, (0, 0, 1, -1))
        query, key = (polynomial_features(self.sharpness * y, 2) for y in (last, follows))
        older = self.rest.expand(max(0, len(x) - len(self.bias)))
        return query, key, torch.cat([self.bias[: len(x)], older])

    def forward(self, x: Tensor) -> Tensor:
        """Return the forecast of x[t + 1] at each t, from x[0..t]."""
        query, key, bias = self.weights(x)
        return relative_attention(query, key, x[:, None], bias)[:, 0]


def error(forecast: Tensor, x: Tensor, rows: slice) -> float:
    """Return the root mean square error of forecasts of the next values."""
    return float((forecast[:-1] - x[1:])[rows].square().mean().sqrt())


def dense_forecast(model: Forecaster, x: Tensor) -> Tensor:
    """Return the same forecasts by the n x n matrix of weights."""
    query, key, bias = model.weights(x)
    lag = torch.arange(len(x))[:, None] - torch.arange(len(x))
    weights = (query @ key.mT * bias.exp()[lag.clamp(min=0)]).tril()
    return weights @ x / weights.sum(-1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=4000)
    parser.add_argument("--period", type=int, default=24, help="values of a season")
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=150, help="of gradient descent")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    x = series(options.points, options.period, options.noise)
    half = options.points // 2
    learned, held_out = slice(4 * options.period, half), slice(half, None)
    model = Forecaster(lags=3 * options.period)
    before = error(model(x).detach(), x, held_out)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    begun = time.perf_counter()
    for _ in range(options.steps):
        optimizer.zero_grad()
        loss = (model(x)[:-1] - x[1:])[learned].square().mean()
        loss.backward()
        optimizer.step()
    taken = time.perf_counter() - begun
    forecast = model(x).detach()
    season = torch.nn.functional.pad(x, (options.period - 1, 1 - options.period))
    print(f"{options.points:,} values, period {options.period}, noise {options.noise}")
    print(f"{options.steps} steps: {taken:.1f} s")
    print("\nforecasts of the second half, root mean square error (the noise alone is the least):")
    print(f"  the last value:         {error(x, x, held_out):.3f}")
    print(f"  one season ago:         {error(season, x, held_out):.3f}")
    print(f"  attention, bias 0:      {before:.3f}")
    print(f"  attention, bias learned: {error(forecast, x, held_out):.3f}")
    strongest = model.bias.detach().topk(3).indices.sort().values.tolist()
    print(f"\nstrongest lags: {', '.join(map(str, strongest))} (multiples of the period, less one)")
    few = x[:1500]
    with torch.no_grad():
        off = (dense_forecast(model, few) - model(few)).abs().max()
    print(f"largest difference to the dense computation of {len(few):,} values: {float(off):.1e}")


if __name__ == "__main__":
    main()
