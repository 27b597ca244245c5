"""Rows that read from the same source, in tiles of equal height: ragged groups as batched matmuls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """Rows by source; a source with many rows has several tiles, which follow each other."""

    rows: Tensor
    """``(t, h)`` rows; where a tile is not full, the number of rows, for none."""
    source: Tensor
    """``(t,)`` what each tile reads from."""


def tiles_of(rows: Tensor, source: Tensor, height: int, total: int) -> Tiles:
    """Group rows by their source.

    Args:
        rows: ``(m,)``, each at most once, of 0..total - 1.
        source: ``(m,)`` integers >= 0.
        height: rows of a tile.
        total: number of rows that there are.
    """
    order = source.argsort(stable=True)
    rows, source = rows[order], source[order]
    sources, counts = source.unique_consecutive(return_counts=True)
    each = (counts + height - 1) // height
    group = torch.arange(len(sources), device=rows.device).repeat_interleave(each)
    number = torch.arange(len(group), device=rows.device) - (each.cumsum(0) - each)[group]
    ends = counts.cumsum(0)
    begin = (ends - counts)[group] + number * height
    index = begin[:, None] + torch.arange(height, device=rows.device)
    filled = index < ends[group, None]
    padded = torch.cat([rows, rows.new_tensor([total])])
    tiles = padded[torch.where(filled, index, len(rows))]
    return Tiles(tiles, sources[group])
