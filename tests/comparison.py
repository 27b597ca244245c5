"""assert_close: three errors at once, because each alone hides something."""

from __future__ import annotations

import torch
from torch import Tensor


def errors(expected: Tensor, actual: Tensor, row_scale: Tensor | None = None) -> dict[str, float]:
    """Return the relative root-mean-square, relative maximum and worst-row relative error.

    Args:
        expected: ``(..., n, c)``.
        actual: same shape.
        row_scale: ``(..., n)`` what a row's error is compared with; by default its expected norm.
    """
    expected, actual = expected.double(), actual.double()
    difference = actual - expected
    rows = torch.linalg.vector_norm(difference, dim=-1)
    scale = torch.linalg.vector_norm(expected, dim=-1) if row_scale is None else row_scale.double()
    relative = torch.where(rows == 0, 0.0, rows / scale)
    tiny = torch.finfo(torch.float64).tiny
    return {
        "rms": float(difference.norm() / expected.norm().clamp(min=tiny)),
        "max": float(difference.abs().max() / expected.abs().max().clamp(min=tiny)),
        "worst row": float(relative.max()),
    }


def assert_close(
    expected: Tensor,
    actual: Tensor,
    *,
    whole: float,
    row: float,
    row_scale: Tensor | None = None,
) -> None:
    """Fail unless rms and maximum are within `whole` and the worst row is within `row`; NaN fails."""
    assert expected.shape == actual.shape, (
        f"shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    )
    assert expected.numel() > 0, "nothing to compare"
    found = errors(expected, actual, row_scale)
    limits = {"rms": whole, "max": whole, "worst row": row}
    bad = {name: value for name, value in found.items() if not value <= limits[name]}
    assert not bad, f"errors {found} exceed limits {limits}"
