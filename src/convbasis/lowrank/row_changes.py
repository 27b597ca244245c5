"""RowChangeMask: each row's keys by what changes from the row before."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..checks import check_positive_int, describe
from ..errors import InputError
from .intervals import IntervalMask, whole_numbers
from .mask import Mask
from .ranges import Ranges


class RowChangeMask(Mask):
    """Row i sees what row i - 1 sees, with some keys added and some removed; nothing before row 0.

    Args:
        additions: for each row the keys that it sees and the row before does not.
        removals: for each row the keys that the row before sees and it does not.

    Raises:
        InputError: no lists of integers; a key beyond the sequence, added while it is visible, removed
            while it is not, or both added and removed in one row.

    Complexity:
        A key is seen by runs of rows, one from each addition to the next removal, and a run of rows is
        to a key what an interval of keys is to a row: a product takes O(r c (n + changes)) time, and
        memory O((r + c) (n + changes)).

    Source:
        "Row change by an amortised constant" of Conv-Basis (arXiv 2405.05219), section 6.

    Example:
        >>> from convbasis.lowrank import RowChangeMask
        >>> RowChangeMask([[0], [1], [2]], [[], [], [0]]).to_dense().int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    def __init__(self, additions: Sequence[Sequence[int]], removals: Sequence[Sequence[int]]) -> None:
        """Check the changes, and keep the runs of rows that see a key."""
        additions, removals = _listed("additions", additions), _listed("removals", removals)
        check_positive_int("the number of rows", len(additions), "one row at least")
        if len(additions) != len(removals):
            raise InputError(
                f"additions has {len(additions)} rows but removals has {len(removals)}; each needs n"
            )
        self.n = len(additions)
        keys, rows, signs = [], [], []
        for name, changes, sign in (("additions", additions, 1), ("removals", removals, -1)):
            counts = torch.tensor([len(change) for change in changes])
            flat = whole_numbers(name, [key for change in changes for key in change])
            if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < self.n:
                raise InputError(
                    f"{name} holds keys {int(flat.min())}..{int(flat.max())}; they must lie in "
                    f"0..{self.n - 1}"
                )
            keys.append(flat)
            rows.append(torch.arange(self.n).repeat_interleave(counts))
            signs.append(torch.full_like(flat, sign))
        self._keep(*_runs(torch.cat(keys), torch.cat(rows), torch.cat(signs), self.n))

    def _keep(self, keys: Tensor, first: Tensor, last: Tensor) -> None:
        """Keep runs: each key with the first and the last row that sees it."""
        self.keys, self.first, self.last = keys, first, last
        self._ranges: dict[torch.device, Ranges] = {}

    @classmethod
    def _of_runs(cls, n: int, keys: Tensor, first: Tensor, last: Tensor) -> RowChangeMask:
        mask = cls.__new__(cls)
        mask.n = n
        mask._keep(keys, first, last)
        return mask

    def to_dense(self) -> Tensor:
        """Return the mask as bool ``(n, n)``."""
        change = torch.zeros((self.n + 1, self.n), dtype=torch.int64)
        one = torch.ones_like(self.keys)
        change.index_put_((self.first, self.keys), one, accumulate=True)
        change.index_put_((self.last + 1, self.keys), -one, accumulate=True)
        return change.cumsum(0)[: self.n] > 0

    def visible_keys(self) -> Tensor:
        """Return how many keys each row sees, int64 ``(n,)``."""
        change = torch.zeros(self.n + 1, dtype=torch.int64)
        one = torch.ones_like(self.keys)
        change.index_add_(0, self.first, one).index_add_(0, self.last + 1, -one)
        return change.cumsum(0)[: self.n]

    def product(self, left: Tensor, right: Tensor, x: Tensor, transpose: bool) -> Tensor:
        """Return the masked product, see `Mask.product`."""
        keys = self.keys.to(x.device)
        if x.device not in self._ranges:
            self._ranges[x.device] = Ranges(self.first.to(x.device), self.last.to(x.device), self.n)
        ranges = self._ranges[x.device]
        if not transpose:
            own = (tensor.index_select(1, keys) for tensor in (right, x))
            return ranges.transposed(left, *own)
        found = ranges.product(left.index_select(1, keys), right, x)
        return torch.zeros_like(x).index_add_(1, keys, found)

    def _intersection(self, other: Mask) -> Mask | None:
        if isinstance(other, RowChangeMask):
            keys = torch.cat([self.keys, self.keys, other.keys, other.keys])
            rows = torch.cat([self.first, self.last + 1, other.first, other.last + 1])
            one = [torch.ones_like(mask.keys) for mask in (self, other)]
            signs = torch.cat([one[0], -one[0], one[1], -one[1]])
            order = (keys * (self.n + 1) + rows).argsort(stable=True)
            keys, rows, signs = keys[order], rows[order], signs[order]
            both = signs.cumsum(0) == 2
            # What both see begins at a change and ends at the next one.
            at = both.nonzero()[:, 0]
            keys, first, last = keys[at], rows[at], rows[at + 1] - 1
        elif isinstance(other, IntervalMask):
            lower, upper = _filled(other)
            if bool((lower.diff() < 0).any()) or bool((upper.diff() < 0).any()):
                return None
            # Where both ends never decrease, a key is seen by one run of rows.
            keys = self.keys
            first = torch.maximum(self.first, torch.searchsorted(upper, keys))
            last = torch.minimum(self.last, torch.searchsorted(lower, keys, right=True) - 1)
        else:
            return None
        some = last >= first
        return RowChangeMask._of_runs(self.n, keys[some], first[some], last[some])


def _listed(name: str, changes: object) -> list[list[int]]:
    """Return the keys of each row."""
    if not isinstance(changes, Iterable):
        raise InputError(f"{name} is {describe(changes)}; a list of keys for each row is wanted")
    return [_positions(f"{name} of row {row}", change) for row, change in enumerate(changes)]


def _positions(name: str, keys: object) -> list[int]:
    if not isinstance(keys, Iterable):
        raise InputError(f"{name} is {describe(keys)}; a list of keys is wanted")
    found = []
    for key in keys:
        if isinstance(key, bool) or not hasattr(key, "__index__"):
            raise InputError(f"{name} holds {describe(key)}; integers, positions of keys, are wanted")
        try:
            found.append(operator.index(key))
        except TypeError:  # a tensor that is no integer
            raise InputError(f"{name} holds {describe(key)}; integers are wanted") from None
    return found


def _filled(mask: IntervalMask) -> tuple[Tensor, Tensor]:
    """Return the ends of intervals, those of an empty one between those of the rows around it."""
    upper = torch.where(mask.upper >= mask.lower, mask.upper, -1).cummax(0).values
    lower = torch.where(mask.upper >= mask.lower, mask.lower, upper + 1)
    return lower, upper


def _runs(keys: Tensor, rows: Tensor, signs: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys with the first and last row of each run, from additions (1) and removals (-1)."""
    order = (keys * n + rows).argsort(stable=True)
    keys, rows, signs = keys[order], rows[order], signs[order]
    same = keys[1:] == keys[:-1]
    twice = same & (rows[1:] == rows[:-1])
    if bool(twice.any()):
        at = int(twice.nonzero()[0, 0])
        raise InputError(f"row {int(rows[at])} changes key {int(keys[at])} more than once")
    begins = torch.cat([torch.ones(min(1, len(keys)), dtype=torch.bool), ~same])
    before = torch.cat([signs.new_full((min(1, len(keys)),), -1), signs[:-1]])
    before = torch.where(begins, -1, before)
    wrong = signs == before
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        row, key = int(rows[at]), int(keys[at])
        if int(signs[at]) > 0:
            raise InputError(f"row {row} adds key {key}, which is already visible")
        raise InputError(f"row {row} removes key {key}, which is not visible")
    added = signs > 0
    ends = torch.cat([rows[1:], rows.new_zeros(min(1, len(rows)))])
    ends = torch.where(torch.cat([same, same.new_zeros(min(1, len(rows)))]), ends, n)
    return keys[added], rows[added], ends[added] - 1
