"""Rotary position embedding: queries and keys turned by their positions, so that products see lags."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, first: int, base: float) -> Tensor:
    """Turn the pairs ``(x[i], x[i + d/2])`` by position · base^(-2i/d).

    Args:
        x: ``(B, H, n, d)``, d even.
        first: position of the first token.
        base: of the frequencies.
    """
    n, d = x.shape[-2:]
    position = torch.arange(first, first + n, device=x.device, dtype=torch.float64)
    frequency = base ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)
    angle = position[:, None] * frequency
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1)
