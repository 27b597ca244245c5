"""Inputs shared by tests."""

from __future__ import annotations

import torch
from torch import Tensor


def random_starts(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Return k distinct ascending starts, the first one 0."""
    inner = torch.randperm(n - 1, generator=generator)[: k - 1] + 1
    return torch.cat([torch.zeros(1, dtype=torch.int64), inner.sort().values])


def random_basis(n: int, k: int, generator: torch.Generator, dtype=torch.float64):
    """Return random segment kernels, zeroed past the matrix, and starts."""
    starts = random_starts(n, k, generator)
    kernels = torch.randn(k, n, generator=generator, dtype=torch.float64)
    kernels *= torch.arange(n) < (n - starts)[:, None]
    return kernels.to(dtype), starts


def random_lower(n: int, generator: torch.Generator, batch=()) -> Tensor:
    """Return random lower-triangular matrices."""
    return torch.randn(*batch, n, n, generator=generator, dtype=torch.float64).tril()
