"""Masks of few distinct rows, or of few distinct columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..checks import describe
from ..errors import InputError
from .intervals import whole_numbers
from .mask import Mask


class _Groups(Mask):
    """Tokens on one side that fall into groups, each with one pattern of tokens on the other side."""

    def __init__(self, patterns: Tensor, group: Tensor) -> None:
        self.n = len(group)
        self._patterns, self._group = patterns, group

    @cached_property
    def _members(self) -> list[Tensor]:
        """The tokens of each group."""
        return [(self._group == at).nonzero()[:, 0] for at in range(len(self._patterns))]

    @cached_property
    def _seen(self) -> list[Tensor]:
        """The tokens of each pattern."""
        return [pattern.nonzero()[:, 0] for pattern in self._patterns]

    def _product(self, left: Tensor, right: Tensor, x: Tensor, by_rows: bool) -> Tensor:
        """Return the masked product where groups are of rows, or of columns."""
        output = torch.zeros_like(x)
        for members, seen in zip(self._members, self._seen, strict=True):
            rows, keys = (members, seen) if by_rows else (seen, members)
            rows, keys = rows.to(x.device), keys.to(x.device)
            state = right.index_select(1, keys).mT @ x.index_select(1, keys)
            output.index_add_(1, rows, left.index_select(1, rows) @ state)
        return output

    def _joined(self, other: _Groups) -> tuple[Tensor, Tensor]:
        """Return the patterns and groups of what both see."""
        both = self._group * len(other._patterns) + other._group
        pairs, group = both.unique(return_inverse=True)
        own = pairs.div(len(other._patterns), rounding_mode="floor")
        return self._patterns[own] & other._patterns[pairs % len(other._patterns)], group


def _checked(name: str, patterns: object, group: object, by_rows: bool) -> tuple[Tensor, Tensor]:
    """Return patterns ``(r', n)`` and the pattern of each token."""
    groups = whole_numbers("group", group)
    n = len(groups)
    wanted = f"(r', {n})" if by_rows else f"({n}, r')"
    if not isinstance(patterns, Tensor) or patterns.dtype != torch.bool or patterns.ndim != 2:
        raise InputError(f"{name} is {describe(patterns)}; a bool tensor {wanted} is wanted")
    found = (patterns if by_rows else patterns.mT).detach().to("cpu")
    if n < 1 or found.shape[1] != n:
        raise InputError(
            f"{name} has shape {tuple(patterns.shape)} and group {n} tokens; {wanted} is wanted, one "
            "token at least"
        )
    if not 0 <= int(groups.min()) <= int(groups.max()) < len(found):
        raise InputError(
            f"group ranges over {int(groups.min())}..{int(groups.max())}; with {len(found)} distinct "
            f"{name} it must lie in 0..{len(found) - 1}"
        )
    return found, groups


class DistinctRowsMask(_Groups):
    """Few distinct rows: row i sees what ``rows[group[i]]`` says.

    Args:
        rows: bool ``(r', n)``, the distinct rows.
        group: integers ``(n,)`` of 0..r' - 1.

    Complexity:
        A product takes O(r c (n + keys that the distinct rows see)) time, at most O(r' n r c).

    Source:
        "Distinct rows" of Conv-Basis (arXiv 2405.05219), section 6.

    Example:
        >>> import torch
        >>> from convbasis.lowrank import DistinctRowsMask
        >>> rows = torch.tensor([[True, False, False], [True, True, False]])
        >>> DistinctRowsMask(rows, [0, 1, 1]).to_dense().int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    """

    def __init__(self, rows: Tensor, group: Tensor | Sequence[int]) -> None:
        """Check and keep the rows."""
        super().__init__(*_checked("rows", rows, group, True))

    def to_dense(self) -> Tensor:
        """Return the mask as bool ``(n, n)``."""
        return self._patterns[self._group]

    def visible_keys(self) -> Tensor:
        """Return how many keys each row sees, int64 ``(n,)``."""
        return self._patterns.sum(1)[self._group]

    def product(self, left: Tensor, right: Tensor, x: Tensor, transpose: bool) -> Tensor:
        """Return the masked product, see `Mask.product`."""
        return self._product(left, right, x, not transpose)

    def _intersection(self, other: Mask) -> Mask | None:
        return DistinctRowsMask(*self._joined(other)) if isinstance(other, DistinctRowsMask) else None


class DistinctColumnsMask(_Groups):
    """Few distinct columns: key j is seen by the rows that ``columns[:, group[j]]`` says.

    Args:
        columns: bool ``(n, r')``, the distinct columns.
        group: integers ``(n,)`` of 0..r' - 1.

    Complexity:
        A product takes O(r c (n + rows that see the distinct columns)) time, at most O(r' n r c).

    Source:
        "Distinct columns" of Conv-Basis (arXiv 2405.05219), section 6.

    Example:
        >>> import torch
        >>> from convbasis.lowrank import DistinctColumnsMask
        >>> columns = torch.tensor([[True, False], [True, True], [True, True]])
        >>> DistinctColumnsMask(columns, [0, 1, 1]).to_dense().int().tolist()
        [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    """

    def __init__(self, columns: Tensor, group: Tensor | Sequence[int]) -> None:
        """Check and keep the columns."""
        super().__init__(*_checked("columns", columns, group, False))

    def to_dense(self) -> Tensor:
        """Return the mask as bool ``(n, n)``."""
        return self._patterns[self._group].mT

    def visible_keys(self) -> Tensor:
        """Return how many keys each row sees, int64 ``(n,)``."""
        members = torch.bincount(self._group, minlength=len(self._patterns))
        return (self._patterns * members[:, None]).sum(0)

    def product(self, left: Tensor, right: Tensor, x: Tensor, transpose: bool) -> Tensor:
        """Return the masked product, see `Mask.product`."""
        return self._product(left, right, x, transpose)

    def _intersection(self, other: Mask) -> Mask | None:
        if not isinstance(other, DistinctColumnsMask):
            return None
        patterns, group = self._joined(other)
        return DistinctColumnsMask(patterns.mT, group)
