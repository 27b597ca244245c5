"""What exact attention of a few rows says about the rows between them.

In four rows of each 128 the difference of exact and approximate output is known. Its mean over the four
changes slowly from one block of rows to the next: every row gets it, interpolated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import exact_rows, with_gradient
from .selection import rows_of_blocks
from .window import QUERIES


def corrected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    begin: int,
    scale: float,
    seed: int,
    known: Tensor | None,
) -> tuple[Tensor, int]:
    """Return the output with the rows from `begin` on corrected, and how many exact rows it took.

    Args:
        query: ``(R, n, d)``.
        key: ``(1, n, d)``.
        value: ``(1, n, d_v)``.
        output: ``(R, n, d_v)``, of approximate attention; overwritten where no gradient is wanted.
        begin: the first row that is not exact.
        scale: factor of the logits.
        seed: of the rows.
        known: ``(R, c, 4, d_v)``, exact attention in the four rows of each 128 from `begin` on, of a
            choice with the same seed; None if they are to be computed.

    Complexity: O(n^2 (d + d_v) / 32) time, next to nothing if the rows are known.
    """
    n = query.shape[1]
    first, last = -(-begin // QUERIES), n // QUERIES  # whole blocks of rows
    if first >= last:
        return output, 0
    device = query.device
    rows = rows_of_blocks(QUERIES, seed, last, n)[first:].to(device).flatten()
    if known is None:
        exact = exact_rows(query, key, value, rows, scale)
    else:
        exact = with_gradient(known[:, first:last].flatten(1, 2), query, key, value, rows, scale)
    means = (exact - output[:, rows]).unflatten(1, (last - first, -1)).mean(2)
    # Between the middles of two blocks, a part of the one and of the other.
    at = (torch.arange(begin, n, device=device) - first * QUERIES + 0.5) / QUERIES - 0.5
    at = at.clamp(0, last - first - 1)
    low = at.long()
    high = (low + 1).clamp(max=last - first - 1)
    share = (at - low).to(means.dtype)[:, None]
    change = torch.lerp(means.index_select(1, low), means.index_select(1, high), share)
    recorded = torch.is_grad_enabled() and output.requires_grad
    better = output.clone() if recorded else output
    better[:, begin:] += change
    return better.index_copy_(1, rows, exact), len(rows)
