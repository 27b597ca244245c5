"""How large the rounding of a transform is expected to be."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_norm(tensor: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return sums of squares, float64."""
    return torch.linalg.vector_norm(tensor.detach(), dim=dim).double().square()


def unit_noise(dtype: torch.dtype, length: int) -> float:
    """Return the relative error of a transform of this length: it grows with sqrt(log2 length).

    The factor makes the worst row of a product stay below the estimate: measured against direct
    evaluation on flat, decaying, random and impulse-like kernels and values (docs/numerics.md).
    """
    return 2.0 * torch.finfo(dtype).eps * float(length.bit_length()) ** 0.5
