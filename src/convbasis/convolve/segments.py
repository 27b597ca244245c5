"""Where each column of a segmented matrix takes its kernel from.

Shapes in this package: kernels ``(P, R, k, n)``, starts and stops ``(P, R, k)`` or ``(1, 1, k)``,
``x`` ``(P, R, n, c)`` or ``(P, 1, n, c)``. P counts the problems and R the kernel sets that share
one ``x`` (the query heads of a key-value head); neither is ever repeated in memory. Segment r owns
the columns ``starts[r] <= j < stops[r]`` and has the kernel ``kernels[r]``, indexed by lag. Unused
segments have start n.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_stops(starts: Tensor, n: int) -> Tensor:
    """Return the column after each segment's last one: the next start, or n."""
    return torch.cat([starts[..., 1:], starts.new_full((*starts.shape[:-1], 1), n)], dim=-1)


def column_segments(starts: Tensor, n: int) -> Tensor:
    """Return the segment index of every column, ``(..., n)``; -1 before the first start."""
    columns = torch.arange(n, device=starts.device).expand(*starts.shape[:-1], n)
    return torch.searchsorted(starts.contiguous(), columns.contiguous(), right=True) - 1


def lag_mask(starts: Tensor, n: int, stop: Tensor | None = None) -> Tensor:
    """Return True where a kernel entry means something: ``start + lag < n``; ``(..., k, n)``.

    With stop, which broadcasts with starts, ``start + lag < stop``: rows from stop on are padding.
    """
    limit = starts.new_tensor(n) if stop is None else stop
    return torch.arange(n, device=starts.device) < (limit - starts)[..., None]
