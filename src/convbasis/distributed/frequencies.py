"""From transforms of some rows to some frequencies of all rows, and back: the two are adjoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grid import Grid
from .ranks import Ranks
from .transport import exchange


def to_frequencies(ranks: Ranks, grid: Grid, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return this rank's frequencies of the rows of all ranks, ``(rows of all, F, 2)``.

    Args:
        ranks: the processes.
        grid: which frequencies are whose.
        rows: ``(r, bins, 2)``, real and imaginary parts, of this rank.
        counts: rows of each rank.
    """
    cuts = [grid.frequencies(rank) for rank in range(ranks.size)]
    width = cuts[ranks.rank].stop - cuts[ranks.rank].start
    blocks = [[rows[:, cut]] for cut in cuts]
    arrived = exchange(ranks, blocks, [[(count, width, 2)] for count in counts], rows, "spectra")
    return torch.cat([block for (block,) in arrived])


def to_rows(ranks: Ranks, grid: Grid, spectra: Tensor, counts: Sequence[int]) -> Tensor:
    """Return all frequencies of this rank's rows, ``(r, bins, 2)``.

    Args:
        ranks: the processes.
        grid: which frequencies are whose.
        spectra: ``(rows of all, F, 2)``, this rank's frequencies.
        counts: rows of each rank.
    """
    cuts = [grid.frequencies(rank) for rank in range(ranks.size)]
    shapes = [[(counts[ranks.rank], cut.stop - cut.start, 2)] for cut in cuts]
    blocks = [[block] for block in spectra.split(list(counts))]
    arrived = exchange(ranks, blocks, shapes, spectra, "products of spectra")
    return torch.cat([block for (block,) in arrived], dim=1)
