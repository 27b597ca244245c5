"""Rows of attention as they come: in place where nothing is recorded, joined in the end otherwise."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .joined import joined


class PutDown(ABC):
    """Output and log-sum-exp of R heads, put down some rows at a time."""

    def __init__(self, heads: int, device: torch.device, measured: bool) -> None:
        """Make room for so many heads; `measured` says that squares are wanted."""
        self._norms: list[tuple[int, int, Tensor]] | None = [] if measured else None
        one_by_one = device.type == "cpu"
        self.apart = [slice(head, head + 1) for head in range(heads)] if one_by_one else [slice(None)]
        """Heads of which rows may be put down by themselves, in order: an accelerator takes all at
        once, of a processor's threads each takes one."""

    def put(self, low: int, output: Tensor, lse: Tensor, heads: slice = slice(None)) -> None:
        """Put down the rows of some heads from `low` on, ``(R, m, d_v)`` and ``(R, m)``.

        Where rows are joined, they come in order; else they may come from several threads.
        """
        if self._norms is not None:
            norms = torch.linalg.vector_norm(output.detach(), dim=(1, 2))
            self._norms.append((heads.start or 0, low, norms))
        self._keep(low, output, lse, heads)

    @abstractmethod
    def _keep(self, low: int, output: Tensor, lse: Tensor, heads: slice) -> None:
        """Keep what is put down."""

    @abstractmethod
    def all(self) -> tuple[Tensor, Tensor]:
        """Return all rows, ``(R, n, d_v)`` and ``(R, n)``."""

    def squares(self) -> Tensor | None:
        """Return the square of the norm of each head's output ``(R,)`` float64, if it was measured: as
        rows were put down, which are in the processor's caches then."""
        if self._norms is None:
            return None
        in_turn = sorted(self._norms, key=lambda own: own[:2])  # threads end in any order
        of_heads = [
            torch.stack([norms for first, _, norms in in_turn if first == (heads.start or 0)])
            for heads in self.apart
        ]
        return torch.cat([norms.double().square().sum(0) for norms in of_heads])


def put_down(
    query: Tensor, key: Tensor, value: Tensor, into: Tensor | None, measured: bool = False
) -> PutDown:
    """Return where rows of attention go: to `into` ``(R, n, d_v)``, or to memory of their own.

    `measured` says that squares are wanted.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return _Joined(len(query), query.device, measured)
    return _InPlace(query, value, into, measured)


class _Joined(PutDown):
    """Rows that are joined in the end."""

    def __init__(self, heads: int, device: torch.device, measured: bool) -> None:
        super().__init__(heads, device, measured)
        self._rows: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def _keep(self, low: int, output: Tensor, lse: Tensor, heads: slice) -> None:
        self._rows.setdefault(heads.start or 0, []).append((output, lse))

    def all(self) -> tuple[Tensor, Tensor]:
        of_heads = [list(zip(*rows, strict=True)) for rows in self._rows.values()]
        outputs, sums = zip(*((joined(x, 1), joined(y, 1)) for x, y in of_heads), strict=True)
        return joined(outputs, 0), joined(sums, 0)


class _InPlace(PutDown):
    """Rows that are written where they belong."""

    def __init__(self, query: Tensor, value: Tensor, into: Tensor | None, measured: bool) -> None:
        super().__init__(len(query), query.device, measured)
        shape = query.shape[:2]
        self._output = value.new_empty((*shape, value.shape[-1])) if into is None else into
        self._lse = query.new_empty(shape)

    def _keep(self, low: int, output: Tensor, lse: Tensor, heads: slice) -> None:
        self._output[heads, low : low + output.shape[1]] = output
        self._lse[heads, low : low + lse.shape[1]] = lse

    def all(self) -> tuple[Tensor, Tensor]:
        return self._output, self._lse
