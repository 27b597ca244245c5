"""The local window: each query over the latest keys, in blocks of queries that share their keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kept import kept
from .joined import joined
from .piece import piece_attention

BLOCK = 64  # tokens of a block of keys
QUERIES = 128  # queries that choose blocks of keys together
_KEPT = 1 << 18  # entries of a mask of rows that is kept for the next head


class Window(NamedTuple):
    """Which of the latest keys a query sees."""

    tokens: int
    """The latest keys, the query's own included."""
    shared: int = 1
    """Queries whose windows begin at the same key, a whole multiple of 64: that of a block of keys, so
    that what lies before are whole blocks. 1 is for windows that all have the same length."""

    def first(self, rows: Tensor) -> Tensor:
        """Return the first key in the window of each row; below 0 where it reaches beyond them."""
        if self.shared == 1:
            return rows - self.tokens + 1
        begin = rows.div(self.shared, rounding_mode="floor") * self.shared - self.tokens + 1
        return begin.div(BLOCK, rounding_mode="floor") * BLOCK

    @property
    def group(self) -> int:
        """Queries that are attended together."""
        return QUERIES if self.shared == 1 else self.shared

    @property
    def begin(self) -> int:
        """The first row that has keys before its window."""
        if self.shared == 1:
            return self.tokens
        return -(-(self.tokens + BLOCK - 1) // self.shared) * self.shared

    @property
    def reach(self) -> int:
        """The most keys before queries that share them that their windows hold."""
        return -(-self.tokens // BLOCK) * BLOCK


@kept(8)
def _mask_of_groups(window: Window, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what hides keys from a whole group of queries, the same for each; nobody writes to it."""
    size = window.group
    rows = torch.arange(size, device=device)
    return _hidden(window, rows, torch.arange(-window.reach, size, device=device), dtype)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return attention over the windows, and its log-sum-exp.

    Args:
        query: ``(H, m, d)``, tokens offset .. offset + m - 1.
        key: ``(H_kv, offset + m, d)``.
        value: ``(H_kv, offset + m, d_v)``.
        window: which keys a query sees.
        offset: position of the first query.
        scale: factor of the logits.

    Returns:
        output ``(H, m, d_v)`` and lse ``(H, m)``.

    Complexity: O(m (window + 128) (d + d_v)) time.
    """
    end = offset + query.shape[1]
    # Whole groups of queries, whose windows lie within the keys, share one mask.
    first = -(-max(offset, window.reach) // window.group) * window.group
    last = max(first, end // window.group * window.group)
    parts = [
        *_rows(query, key, value, window, offset, (offset, min(first, end)), scale),
        *_groups(query, key, value, window, offset, (first, min(last, end)), scale),
        *_rows(query, key, value, window, offset, (last, end), scale),
    ]
    outputs, sums = zip(*parts, strict=True)
    return joined(outputs, 1), joined(sums, 1)


def _hidden(window: Window, rows: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what hides keys outside the windows of rows, ``(1, 1, rows, keys)``."""
    outside = (keys > rows[:, None]) | (keys < window.first(rows)[:, None])
    return torch.zeros(outside.shape, dtype=dtype, device=rows.device).masked_fill_(
        outside, -torch.inf
    )[None, None]


def _make_mask(
    window: Window, begin: int, low: int, high: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return what hides keys from `begin` on from rows low .. high - 1; nobody writes to it."""
    rows, keys = (torch.arange(first, high, device=device) for first in (low, begin))
    return _hidden(window, rows, keys, dtype)


_kept_mask = kept(16)(_make_mask)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    offset: int,
    rows: tuple[int, int],
    scale: float,
) -> list[tuple[Tensor, Tensor]]:
    """Return some rows, with masks of their own: those before the first full window, and the last."""
    found = []
    for low in range(rows[0], rows[1], 1024):
        high = min(rows[1], low + 1024)
        begin = max(0, int(window.first(torch.tensor([low]))))
        make = _kept_mask if (high - low) * (high - begin) <= _KEPT else _make_mask
        output, lse = piece_attention(
            query[None, :, low - offset : high - offset],
            key[None, :, begin:high],
            value[None, :, begin:high],
            scale,
            make(window, begin, low, high, query.dtype, query.device),
            visible=True,
        )
        found.append((output[0], lse[0]))
    return found


def _groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    offset: int,
    rows: tuple[int, int],
    scale: float,
) -> list[tuple[Tensor, Tensor]]:
    """Return whole groups of queries; the windows are views of the keys."""
    low, high = rows
    if low >= high:
        return []
    reach, size = window.reach, window.group

    def windows(tensor: Tensor) -> Tensor:
        return tensor[:, low - reach : high].unfold(1, reach + size, size).permute(1, 0, 3, 2)

    own = query[:, low - offset : high - offset].unflatten(1, (-1, size)).transpose(0, 1)
    mask = _mask_of_groups(window, query.dtype, query.device)
    output, lse = piece_attention(own, windows(key), windows(value), scale, mask, visible=True)
    return [(output.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2))]
