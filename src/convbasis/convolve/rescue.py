"""From a transform to a result that is right in every row: float64 where float32 loses too many rows,
direct evaluation of what is still lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# A matrix with a larger share of lost rows is not mended row by row: it is transformed again in
# float64, and where that does not help either, evaluated directly as a whole.
_SHARE = 0.02

# Evaluate by transform: given matrix indices (g,), or None for all, and the dtype to work in, return
# results (g, n, ...) and which rows are lost, bool (g, n).
Transform = Callable[[Tensor | None, torch.dtype], tuple[tuple[Tensor, ...], Tensor]]
# Evaluate directly: given matrix indices (g,) and rows (g, m), ascending, return results (g, m, ...).
Direct = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Rescue(NamedTuple):
    """What the plain transform could not do."""

    rows: int  # rows evaluated directly, in matrices that kept their transform
    repeated: int  # matrices transformed again in float64
    direct: int  # matrices evaluated directly as a whole


def evaluate_safely(
    transform: Transform, direct: Direct, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], Rescue]:
    """Evaluate by transform, and mend what is lost in its rounding.

    Args:
        transform: evaluation by transform.
        direct: evaluation of rows without one.
        dtype: of the results; float32 or float64.

    Returns:
        results ``(G, n, ...)`` and what was mended.
    """
    results, lost = transform(None, dtype)
    if not bool(lost.any()):
        return results, Rescue(0, 0, 0)
    n = lost.shape[-1]
    repeated = 0
    if dtype == torch.float32:
        heavy = (lost.sum(-1) > _SHARE * n).nonzero()[:, 0]
        repeated = len(heavy)
        if repeated:
            fresh, still_lost = transform(heavy, torch.float64)
            results = _put(results, fresh, heavy)
            lost = lost.index_copy(0, heavy, still_lost)
    count = lost.sum(-1)
    whole = count > _SHARE * n
    some = ((count > 0) & ~whole).nonzero()[:, 0]
    rows_mended = int(count[some].sum())
    if rows_mended:
        width = int(count[some].max())
        # Ascending row numbers, filled up at the front with row 0, which is cheap to evaluate.
        rows = torch.where(lost[some], torch.arange(n, device=lost.device), -1)
        rows = rows.sort(dim=-1).values[:, n - width :]
        wanted = rows >= 0
        fresh = direct(some, rows.clamp(min=0))
        place = (some[:, None].expand_as(rows)[wanted], rows[wanted])
        for old, new in zip(results, fresh, strict=True):
            old.index_put_(place, new[wanted].to(old.dtype))
    heavy = whole.nonzero()[:, 0]
    if len(heavy):
        rows = torch.arange(n, device=lost.device).expand(len(heavy), n)
        results = _put(results, direct(heavy, rows), heavy)
    return results, Rescue(rows_mended, repeated, len(heavy))


def _put(results: tuple[Tensor, ...], fresh: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
    for old, new in zip(results, fresh, strict=True):
        old.index_copy_(0, index, new.to(old.dtype))
    return results
