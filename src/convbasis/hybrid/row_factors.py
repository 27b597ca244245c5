"""Row factors of a far field: what the weights of a query's far keys add up to.

A row's factor is the logit of the mean far key, corrected by ridge regression on the query over rows
that were computed exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sampling import SampledRows
from .window import Window


def row_factors(
    query: Tensor,
    key: Tensor,
    seen: Tensor,
    window: Window,
    scale: float,
    sampled: SampledRows,
    targets: Tensor,
    model: Tensor,
) -> Tensor:
    """Return the logarithms of the row factors, ``(R, n)``.

    Args:
        query: ``(R, n, d)``.
        key: ``(1, n, d)``.
        seen: ``(R, n)``, True for keys that count elsewhere.
        window: of exact tokens.
        scale: factor of the logits.
        sampled: exact rows.
        targets: ``(R, s)`` logarithms of their far weights, -inf for none.
        model: ``(R, n)`` logarithms of the far weights without row factors.
    """
    rows = sampled.rows
    usable = (targets > -torch.inf).double()[..., None]
    numbers = (~seen).to(query.dtype)
    mean = torch.einsum("rn,nd->rd", numbers, key[0]) / numbers.sum(-1, keepdim=True).clamp(min=1.0)
    start = (query @ mean[..., None])[..., 0] * scale
    want = (targets - model[:, rows] - start[:, rows]).nan_to_num(0.0).clamp(-30.0, 30.0)
    x = torch.nn.functional.pad(query[:, rows], (0, 1), value=1.0).double() * usable
    spread = query.double().square().mean((1, 2)).clamp(min=1e-12)
    ridge = (
        torch.eye(x.shape[-1], dtype=torch.float64, device=x.device) * spread[:, None, None] * len(rows)
    )
    ridge[:, -1, -1] = 1e-6  # all rows in common are hardly held back
    solution = torch.linalg.solve(x.mT @ x + ridge, x.mT @ want.double()[..., None])
    change = torch.nn.functional.pad(query, (0, 1), value=1.0).double() @ solution
    return start + change[..., 0].to(start.dtype)
