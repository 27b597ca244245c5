"""Single keys that many queries look at: the first tokens (sinks) and the heaviest columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .beyond import Shared
from .piece import piece_attention
from .window import Window


def column_keys(key: Tensor, value: Tensor, columns: Tensor, before: Tensor) -> Shared:
    """Return chosen columns as keys of blocks of queries.

    Args:
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        columns: positions ``(R, c)``, n or more for none.
        before: ``(R or 1, blocks of queries)``, the first key in the window of each.
    """
    own = columns.clamp(max=key.shape[1] - 1)
    return Shared(key[0][own], value[0][own], _hidden(columns[:, None] >= before[..., None], key.dtype))


def column_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    window: Window,
    scale: float,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return attention over columns as far as they lie before a window of exact tokens, and its lse.

    Args:
        query: ``(R, m, d)``, tokens offset .. offset + m - 1.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        columns: positions ``(R, c)``; n or more for none.
        window: which keys are seen already.
        scale: factor of the logits.
        offset: position of the first query.

    Returns:
        output ``(R, m, d_v)`` and lse ``(R, m)``, -inf where no column is seen.
    """
    rows = torch.arange(offset, offset + query.shape[1], device=query.device)
    own = columns.clamp(max=key.shape[1] - 1)
    return chosen_attention(query, key[0][own], value[0][own], columns, window.first(rows), scale)


def chosen_attention(
    query: Tensor, keys: Tensor, values: Tensor, columns: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention over the keys of columns before the windows of queries, and its lse.

    Args:
        query: ``(R, m, d)``.
        keys: ``(R, c, d)``, of the columns.
        values: ``(R, c, d_v)``.
        columns: positions ``(R, c)``; past the last token for none.
        first: ``(m,)``, the first key in the window of each query.
        scale: factor of the logits.
    """
    outside = columns[:, None] >= first[:, None]
    output, lse = piece_attention(
        query[:, None],
        keys[:, None],
        values[:, None],
        scale,
        _hidden(outside, query.dtype)[:, None],
        visible=(columns.amin(-1, keepdim=True) < first)[:, None],
    )
    return output[:, 0], lse[:, 0]


def _hidden(outside: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias that hides keys."""
    zero = torch.zeros((), dtype=dtype, device=outside.device)
    return torch.where(outside, zero - torch.inf, zero)
