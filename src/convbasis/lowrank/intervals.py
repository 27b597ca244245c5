"""Masks whose rows each see one interval of keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..checks import check_nonnegative_int, check_positive_int, describe
from ..errors import InputError
from .mask import Mask
from .prefix import prefix_product
from .ranges import Ranges


def whole_numbers(name: str, values: object) -> Tensor:
    """Return integers as an int64 tensor ``(m,)`` on the CPU.

    Raises:
        InputError: no integers, or not one dimension.
    """
    if not isinstance(values, Tensor):
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise InputError(f"{name} is {describe(values)}; a tensor or list of integers is wanted")
        try:
            values = torch.tensor(values, dtype=None if len(values) else torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{name} cannot be read as integers: {error}") from None
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise InputError(f"{name} has dtype {values.dtype}; integers are wanted")
    if values.ndim != 1:
        raise InputError(f"{name} has shape {tuple(values.shape)}; one dimension is wanted")
    return values.detach().to("cpu", torch.int64)


class IntervalMask(Mask):
    """Row i sees the keys lower[i]..upper[i], both included ("continuous row").

    Args:
        lower: integers ``(n,)``, positions of keys.
        upper: integers ``(n,)``. A row with ``upper[i] < lower[i]`` sees nothing, and its output is 0.
            A row may look ahead (``upper[i] > i``): `is_causal` tells whether one does.

    Raises:
        InputError: an interval that is not empty leaves 0..n-1, or the lengths differ.

    Complexity:
        A product takes O(n c r (1 + log(L/64) / 64)) time for a longest interval of L. Intervals are
        sums of at most two states of chunks and of two parts of chunks; no prefix sums are subtracted,
        which would lose digits in float32.

    Source:
        "Continuous row" of Conv-Basis (arXiv 2405.05219), section 6; "Masked low rank" of
        docs/mathematics.md.

    Example:
        >>> from convbasis.lowrank import IntervalMask
        >>> IntervalMask([0, 0, 1], [0, -1, 2]).to_dense().int().tolist()
        [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    """

    def __init__(self, lower: Tensor | Sequence[int], upper: Tensor | Sequence[int]) -> None:
        """Check the intervals, and keep them."""
        low, high = whole_numbers("lower", lower), whole_numbers("upper", upper)
        if len(low) != len(high):
            raise InputError(f"lower has {len(low)} entries but upper has {len(high)}; one per row")
        check_positive_int("the number of rows", len(low), "one row at least")
        self.n = len(low)
        filled = high >= low
        outside = filled & ((low < 0) | (high >= self.n))
        if bool(outside.any()):
            row = int(outside.nonzero()[0, 0])
            raise InputError(
                f"row {row} sees {int(low[row])}..{int(high[row])}, beyond the keys 0..{self.n - 1}: "
                "cut it, for example with lower.clamp(min=0)"
            )
        self.lower = torch.where(filled, low, 0)
        self.upper = torch.where(filled, high, -1)
        self._ranges: dict[torch.device, Ranges] = {}

    @property
    def is_causal(self) -> bool:
        """Whether no row sees a later key."""
        return bool((self.upper <= torch.arange(self.n)).all())

    def to_dense(self) -> Tensor:
        """Return the mask as bool ``(n, n)``."""
        keys = torch.arange(self.n)
        return (keys >= self.lower[:, None]) & (keys <= self.upper[:, None])

    def visible_keys(self) -> Tensor:
        """Return how many keys each row sees, int64 ``(n,)``."""
        return self.upper - self.lower + 1

    @cached_property
    def _sees_all_before(self) -> bool:
        return bool((self.lower == 0).all()) and bool((self.upper == torch.arange(self.n)).all())

    def product(self, left: Tensor, right: Tensor, x: Tensor, transpose: bool) -> Tensor:
        """Return the masked product, see `Mask.product`."""
        if self._sees_all_before:
            return prefix_product(left, right, x, transpose)
        if x.device not in self._ranges:
            self._ranges[x.device] = Ranges(self.lower.to(x.device), self.upper.to(x.device), self.n)
        ranges = self._ranges[x.device]
        return ranges.transposed(left, right, x) if transpose else ranges.product(left, right, x)

    def _intersection(self, other: Mask) -> Mask | None:
        if not isinstance(other, IntervalMask):
            return None
        return IntervalMask(
            torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper)
        )


class CausalMask(IntervalMask):
    """Row i sees the keys 0..i.

    Args:
        n: number of tokens.

    Complexity:
        A product takes O(n c r) time, by states of chunks that are summed up as the sequence goes on.

    Example:
        >>> from convbasis.lowrank import CausalMask
        >>> CausalMask(3).to_dense().int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    def __init__(self, n: int) -> None:
        """Keep n."""
        check_positive_int("n", n, "a number of tokens")
        super().__init__(torch.zeros(n, dtype=torch.int64), torch.arange(n))


class SlidingWindowMask(IntervalMask):
    """Row i sees the latest `window` keys, its own included.

    Args:
        n: number of tokens.
        window: number of keys.

    Example:
        >>> from convbasis.lowrank import SlidingWindowMask
        >>> SlidingWindowMask(4, 2).to_dense().int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """

    def __init__(self, n: int, window: int) -> None:
        """Check and keep the sizes."""
        check_positive_int("n", n, "a number of tokens")
        self.window = check_positive_int("window", window, "a number of keys")
        rows = torch.arange(n)
        super().__init__((rows - self.window + 1).clamp(min=0), rows)


class DocumentMask(IntervalMask):
    """Documents packed in one sequence: row i sees the keys of its own document up to i.

    Args:
        lengths: tokens of each document, positive; n is their sum.

    Example:
        >>> from convbasis.lowrank import DocumentMask
        >>> DocumentMask([2, 1]).to_dense().int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """

    def __init__(self, lengths: Tensor | Sequence[int]) -> None:
        """Check and keep the lengths."""
        found = whole_numbers("lengths", lengths)
        if not len(found) or bool((found <= 0).any()):
            raise InputError(
                f"lengths={found.tolist()[:8]}: one document at least, each of one token at least"
            )
        self.lengths = found
        starts = found.cumsum(0) - found
        super().__init__(starts.repeat_interleave(found), torch.arange(int(found.sum())))


class ShiftedGroupMask(IntervalMask):
    """Groups of equal length that are shifted, as in LongLoRA: row i sees its own group up to i.

    Half of the heads of LongLoRA see groups from 0 on (``shift=0``), the others groups that are shifted
    by half a group. There the tokens before the first border are joined with those behind the last one;
    here they are a shorter group, since a row would else see keys that come later in the sequence.

    Args:
        n: number of tokens.
        group: tokens of a group.
        shift: position of the first border, of 0..group - 1; ``group // 2`` by default.

    Source:
        Conv-Basis (arXiv 2405.05219), section 6, "row change by an amortised constant": its example.

    Example:
        >>> from convbasis.lowrank import ShiftedGroupMask
        >>> ShiftedGroupMask(4, 2).to_dense().int().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    """

    def __init__(self, n: int, group: int, shift: int | None = None) -> None:
        """Check and keep the sizes."""
        check_positive_int("n", n, "a number of tokens")
        self.group = check_positive_int("group", group, "a number of tokens")
        self.shift = self.group // 2 if shift is None else check_nonnegative_int("shift", shift)
        if self.shift >= self.group:
            raise InputError(f"shift={shift} is not below group={group}")
        rows = torch.arange(n)
        begin = (rows - self.shift).div(self.group, rounding_mode="floor") * self.group + self.shift
        super().__init__(begin.clamp(min=0), rows)
