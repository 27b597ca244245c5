"""Which rows of a product drown in the rounding of its transforms.

The rounding of an FFT is spread evenly over all rows of a transform: it is relative to the largest
ones, and a row that is small beside them can be all noise. Such a row is found here, to be evaluated
directly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# In units of float64's rounding, the error against |A||x| that a direct sum in float64 would have too:
# where terms cancel in a row, direct evaluation would bring nothing.
_INHERENT = 8.0


def reached_rows(starts: Tensor, x: Tensor, *, transpose: bool = False) -> Tensor:
    """Return False for the rows that see only zeros of x: their product is exactly zero.

    Args:
        starts: ``(P, R, k)`` or ``(1, 1, k)``.
        x: ``(P, R, n, c)`` or ``(P, 1, n, c)``.
        transpose: the product is with the transposes.

    Returns:
        bool ``(P, R, n)``, or with 1 in place of P or R.
    """
    n = x.shape[-2]
    owned = torch.arange(n, device=x.device) >= starts[..., :1]
    nonzero = (x.detach() != 0).any(-1)
    if transpose:
        return nonzero.flip(-1).cummax(-1).values.flip(-1) & owned
    return (nonzero & owned).cummax(-1).values


def lost_rows(
    norms: Tensor,
    noise: Tensor,
    reached: Tensor,
    magnitude: Callable[[], Tensor],
    *,
    worked: torch.dtype,
    tolerance: float,
) -> Tensor:
    """Find the rows whose rounding error is too large to be used.

    Args:
        norms: ``(P, R, n)``, Euclidean norms of the rows of the product.
        noise: ``(P, R, 1)`` or ``(P, R, n)``, expected error of a row in the Euclidean norm.
        reached: what `reached_rows` says; the other rows are never lost.
        magnitude: returns ``(P, R, n)``, the product of absolute values ``|A| |x|`` with ``|x|`` the
            row norms of x; only called when some row of a float64 transform is doubtful.
        worked: dtype that the transform worked in.
        tolerance: the largest relative error of a row that passes.

    Returns:
        bool ``(P, R, n)``, True where the row must be evaluated directly.
    """
    finite = norms.isfinite()
    doubtful = ~(finite & (noise <= tolerance * norms)) & reached
    if worked != torch.float64 or not bool(doubtful.any()):
        return doubtful
    inherent = _INHERENT * torch.finfo(torch.float64).eps * magnitude()
    return doubtful & ~(finite & (noise <= inherent))
