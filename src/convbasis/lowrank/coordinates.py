"""Coordinates of queries and keys in which the logits are largest in the first ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_RIDGE = 1e-9


class Coordinates(NamedTuple):
    """Two maps with ``(q A)·(k B) = q·k``."""

    of_query: Tensor
    """``(..., d, d)``, A."""
    of_key: Tensor
    """``(..., d, d)``, B."""


def balanced_coordinates(query: Tensor, key: Tensor) -> Coordinates:
    """Return coordinates in which queries and keys have the same, diagonal, decreasing second moments.

    The first p of them give the best approximation of all logits by rank p in the Frobenius norm
    (a singular value decomposition of ``Q K^T``, by the Gram matrices of Q and of K). Every token is
    looked at; the maps are taken as constants by gradients.

    Args:
        query: ``(..., n, d)``.
        key: ``(..., n, d)``.

    Complexity: O(n d^2 + d^3).
    """
    with torch.no_grad():
        roots, inverses = [], []
        for tensor in (query.double(), key.double()):
            values, vectors = torch.linalg.eigh(tensor.mT @ tensor)
            # What is never used keeps a little, so that the maps can be inverted.
            mean = values.mean(-1, keepdim=True)
            values = values.clamp(min=0.0) + _RIDGE * torch.where(mean > 0.0, mean, 1.0)
            roots.append(vectors * values.sqrt()[..., None, :])
            inverses.append(vectors / values.sqrt()[..., None, :])
        left, sizes, right = torch.linalg.svd(roots[0].mT @ roots[1])
        half = sizes.sqrt()[..., None, :]
        of_query, of_key = inverses[0] @ left * half, inverses[1] @ right.mT * half
        return Coordinates(of_query.to(query.dtype), of_key.to(key.dtype))


def largest_norms(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest norms of first coordinates, and of those behind them.

    Args:
        tensor: ``(..., n, d)``.

    Returns:
        two float64 ``(..., d)``: entry p - 1 for the first p coordinates, and for all but these.
    """
    squares = tensor.detach().double().square()
    first = squares.cumsum(-1)
    rest = squares.flip(-1).cumsum(-1).flip(-1) - squares
    return first.amax(-2).sqrt(), rest.clamp(min=0.0).amax(-2).sqrt()
