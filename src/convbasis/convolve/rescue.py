"""Replace lost rows by directly evaluated ones, vectorised over matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .guard import DIRECT_SHARE

# Given matrix indices (g,) and rows (g, m), ascending: results (g, m, ...), a tuple of tensors.
RowEvaluator = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Rescue(NamedTuple):
    """What was evaluated directly."""

    rows: int  # single rows, in matrices that kept their transform
    matrices: int  # whole matrices


def replace_lost(
    results: tuple[Tensor, ...], lost: Tensor, evaluate: RowEvaluator
) -> tuple[tuple[Tensor, ...], Rescue]:
    """Evaluate the lost rows directly, and every row of a matrix that lost more than 2 % of them.

    Args:
        results: tensors ``(G, n, ...)``.
        lost: bool ``(G, n)``.
        evaluate: the direct evaluation.

    Returns:
        the results with those rows replaced (out of place), and the counts.
    """
    count = lost.sum(-1)
    n = lost.shape[-1]
    whole = count > DIRECT_SHARE * n
    some = (count > 0) & ~whole
    rescue = Rescue(rows=int(count[some].sum()), matrices=int(whole.sum()))
    if rescue.rows:
        groups = some.nonzero()[:, 0]
        width = int(count[groups].max())
        # Ascending row numbers, padded at the front with row 0, which is cheap to evaluate.
        rows = torch.where(lost[groups], torch.arange(n, device=lost.device), -1)
        rows = rows.sort(dim=-1).values[:, n - width :]
        wanted = rows >= 0
        fresh = evaluate(groups, rows.clamp(min=0))
        place = (groups[:, None].expand_as(rows)[wanted], rows[wanted])
        results = tuple(
            old.index_put(place, new[wanted]) for old, new in zip(results, fresh, strict=True)
        )
    if rescue.matrices:
        groups = whole.nonzero()[:, 0]
        rows = torch.arange(n, device=lost.device).expand(len(groups), n)
        fresh = evaluate(groups, rows)
        results = tuple(old.index_copy(0, groups, new) for old, new in zip(results, fresh, strict=True))
    return results, rescue
