"""Rows of attention as they come: in place where nothing is recorded, joined in the end otherwise."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class PutDown(ABC):
    """Output and log-sum-exp of R heads, put down some rows at a time."""

    @abstractmethod
    def put(self, low: int, output: Tensor, lse: Tensor) -> None:
        """Put down the rows from `low` on, ``(R, m, d_v)`` and ``(R, m)``.

        Where rows are joined, they come in order; else they may come from several threads.
        """

    @abstractmethod
    def all(self) -> tuple[Tensor, Tensor]:
        """Return all rows, ``(R, n, d_v)`` and ``(R, n)``."""


def put_down(query: Tensor, key: Tensor, value: Tensor, into: Tensor | None) -> PutDown:
    """Return where rows of attention go: to `into` ``(R, n, d_v)``, or to memory of their own."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return _Joined()
    return _InPlace(query, value, into)


class _Joined(PutDown):
    """Rows that are joined in the end."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._sums: list[Tensor] = []

    def put(self, low: int, output: Tensor, lse: Tensor) -> None:
        self._outputs.append(output)
        self._sums.append(lse)

    def all(self) -> tuple[Tensor, Tensor]:
        if len(self._outputs) == 1:
            return self._outputs[0], self._sums[0]
        return torch.cat(self._outputs, dim=1), torch.cat(self._sums, dim=1)


class _InPlace(PutDown):
    """Rows that are written where they belong."""

    def __init__(self, query: Tensor, value: Tensor, into: Tensor | None) -> None:
        shape = query.shape[:2]
        self._output = value.new_empty((*shape, value.shape[-1])) if into is None else into
        self._lse = query.new_empty(shape)

    def put(self, low: int, output: Tensor, lse: Tensor) -> None:
        self._output[:, low : low + output.shape[1]] = output
        self._lse[:, low : low + lse.shape[1]] = lse

    def all(self) -> tuple[Tensor, Tensor]:
        return self._output, self._lse
