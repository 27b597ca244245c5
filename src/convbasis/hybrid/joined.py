"""Tensors put together, without a copy where there is only one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return the parts, one at least, along a dimension."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=dim)
