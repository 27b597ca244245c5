"""A learned bias by lag: a value for each small lag, and knots that thin out where lags are large."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EXACT = 32  # lags with a value of their own
_PER_OCTAVE = 4  # knots for each doubling of larger lags
_OCTAVES = 17  # up to 32 · 2^17 = 4,194,304 tokens; constant past it


_KNOTS = (
    *(float(lag) for lag in range(_EXACT)),
    *(_EXACT * 2 ** (i / _PER_OCTAVE) for i in range(_OCTAVES * _PER_OCTAVE + 1)),
)


class LagBias(nn.Module):
    """Piecewise linear in the logarithm of the lag; zero at first."""

    def __init__(self, num_heads: int) -> None:
        """Make a table of (num_heads, knots)."""
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, len(_KNOTS)))

    def forward(self, n: int) -> Tensor:
        """Return the biases of the lags 0 .. n - 1 in nats, ``(num_heads, n)``."""
        knots = torch.tensor(_KNOTS, device=self.table.device, dtype=torch.float64)
        lags = torch.arange(n, device=self.table.device, dtype=torch.float64)
        low = (torch.searchsorted(knots, lags, right=True) - 1).clamp(max=len(knots) - 2)
        # Linear in the lag up to the last exact one, in its logarithm from there on.
        below, above = knots[low], knots[low + 1]
        straight = (lags - below) / (above - below)
        bent = (lags.clamp(min=1) / below.clamp(min=1)).log() / (above / below.clamp(min=1)).log()
        part = torch.where(lags < _EXACT, straight, bent).clamp(0, 1).to(self.table.dtype)
        # Of heads that are spread over ranks, this rank's.
        table = self.table.to_local() if hasattr(self.table, "to_local") else self.table
        return table[:, low] * (1 - part) + table[:, low + 1] * part
