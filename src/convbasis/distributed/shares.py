"""Which heads and value columns each rank computes for the whole sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import describe
from ..errors import InputError

LAYOUTS = ("auto", "heads", "columns")


class Piece(NamedTuple):
    """Consecutive query heads with some of their value columns; whole heads if there are several."""

    heads: slice
    kv_heads: slice
    columns: slice


class Sizes(NamedTuple):
    """What the shares depend on."""

    heads: int
    kv_heads: int
    width: int
    """Value columns of a head."""


def length_of(part: slice) -> int:
    """Return how many heads or columns a part has."""
    return int(part.stop - part.start)


def check_layout(layout: object) -> None:
    """Check the name of a layout of attention with a conv basis."""
    known = (*LAYOUTS, "spectra")
    if layout not in known:
        raise InputError(
            f"layout={describe(layout)} is not known; use one of {', '.join(map(repr, known))}"
        )


def whole_heads(layout: str, sizes: Sizes, ranks: int) -> bool:
    """Return whether a layout leaves heads whole."""
    return layout == "heads" or (layout == "auto" and sizes.heads >= ranks)


def shares(layout: str, sizes: Sizes, ranks: int) -> list[list[Piece]]:
    """Return the pieces of each rank; together they are all columns of all heads, in order.

    Args:
        layout: ``"heads"``, whole heads, as evenly as they can be dealt out; ``"columns"``, as many
            value columns of consecutive heads for each rank; ``"auto"``, the first where there is a
            head for each rank, else the second.
        sizes: of the attention.
        ranks: number of processes.
    """
    heads, kv_heads, width = sizes
    sharing = heads // kv_heads
    unit = width if whole_heads(layout, sizes, ranks) else 1  # what cannot be cut
    total = heads * width // unit
    found = []
    for rank in range(ranks):
        low, high = (unit * (total * edge // ranks) for edge in (rank, rank + 1))
        pieces = []
        while low < high:
            head, column = divmod(low, width)
            whole = (high - low) // width if column == 0 else 0
            last = head + max(1, whole)
            stop = width if whole else min(width, column + high - low)
            pieces.append(
                Piece(
                    slice(head, last),
                    slice(head // sharing, (last - 1) // sharing + 1),
                    slice(column, stop),
                )
            )
            low = (last - 1) * width + stop
        found.append(pieces)
    return found


def for_heads(piece: Piece, sharing: int, tensor: Tensor) -> Tensor:
    """Return keys or values ``(B, H_kv, n, ·)`` of a piece so that all its heads share them alike."""
    low, high = piece.heads.start, piece.heads.stop
    if tensor.shape[1] == 1 or (low % sharing == 0 and high % sharing == 0):
        return tensor
    index = torch.arange(low, high, device=tensor.device) // sharing - piece.kv_heads.start
    return tensor.index_select(1, index)
