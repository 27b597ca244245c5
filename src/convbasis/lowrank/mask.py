"""What every mask can do: be counted, be shown densely in tests, be intersected, multiply."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ..errors import InputError


class Mask(ABC):
    """Which keys each query sees: a 0/1 matrix ``(n, n)`` that is never formed.

    Attributes:
        n: number of tokens.
    """

    n: int

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return the mask as bool ``(n, n)``, entry (i, j) True where row i sees key j; for tests."""

    @abstractmethod
    def visible_keys(self) -> Tensor:
        """Return how many keys each row sees, int64 ``(n,)``."""

    @abstractmethod
    def product(self, left: Tensor, right: Tensor, x: Tensor, transpose: bool) -> Tensor:
        """Return ``(W∘(left right^T)) x``, or with the transpose of W in its place.

        Args:
            left: ``(P, n, r)``.
            right: ``(P, n, r)``.
            x: ``(P, n, c)``.
            transpose: whether W is transposed.
        """

    def count(self) -> int:
        """Return the number of visible pairs of a query and a key."""
        return int(self.visible_keys().sum())

    def __and__(self, other: object) -> Mask:
        """Return the mask of what both see.

        Raises:
            InputError: the two differ in n, or what both see has no structure with a fast product.
        """
        if not isinstance(other, Mask):
            return NotImplemented
        if other.n != self.n:
            raise InputError(f"masks of {self.n} and of {other.n} tokens have no intersection")
        found = self._intersection(other) or other._intersection(self)
        if found is None:
            raise InputError(
                f"what both {type(self).__name__} and {type(other).__name__} see has no structure with "
                "a fast product; intersect masks of intervals, masks of row changes, of distinct rows "
                "or of distinct columns with their like, or row changes with intervals whose both "
                "ends never decrease"
            )
        return found

    @abstractmethod
    def _intersection(self, other: Mask) -> Mask | None:
        """Return the mask of what both see, None where this class knows of none."""

    def __repr__(self) -> str:
        """Show the class and the number of tokens."""
        return f"{type(self).__name__}(n={self.n})"
