"""The conv basis of a given lower-triangular matrix (F1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .arrays import SupportsArray, is_array, tensor_from
from .basis import ConvBasis
from .checks import check_finite, check_float_tensor, check_nonnegative
from .errors import InputError
from .transforms import refuse_mapping


def decompose(H: Tensor | SupportsArray, *, tol: float = 0.0) -> ConvBasis:
    """Return the smallest conv basis of a lower-triangular matrix, exact or within a tolerance.

    A sweep over the columns in lag coordinates. At ``tol = 0`` a segment ends where a column differs
    from the stored one; the result is the unique smallest basis and represents H exactly. At
    ``tol > 0`` a segment takes in columns as long as one kernel, midway between their extremes at
    each lag, is within tol of all of them; no basis with entry errors of at most tol has fewer
    segments.

    Args:
        H: ``(..., n, n)`` floating point, zero above the diagonal. A NumPy array, or what becomes one
            through ``__array__``, gives a basis on the CPU in its dtype; integers and bools float64.
        tol: the largest error of an entry, in the units of H.

    Returns:
        A `ConvBasis` with ``max |to_dense() - H| <= tol``; k = 0 for the zero matrix. In a batch k is
        the largest of the members', `ConvBasis.ranks` tells each one's. Gradients reach H through the
        exact decomposition (tol = 0) alone.

    Raises:
        InputError: H is no tensor of floating-point or array of real numbers, not square, not lower
            triangular, or not finite; tol is negative or not finite.

    Complexity:
        O(n^2) time and O(k n) memory for each matrix.

    Source:
        F1, F2; Conv-Basis (arXiv 2405.05219), section 3.

    Example:
        >>> import torch, convbasis as cb
        >>> H = torch.tensor([[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [3.0, 2.0, 5.0]])
        >>> cb.decompose(H).starts
        tensor([0, 2])
    """
    if is_array(H):
        H = tensor_from("H", H)
    H = check_float_tensor("H", H)
    if H.ndim < 2 or H.shape[-1] != H.shape[-2] or H.shape[-1] == 0:
        raise InputError(
            f"H has shape {tuple(H.shape)}; square matrices (..., n, n) with n >= 1 are wanted"
        )
    within = check_nonnegative("tol", tol)
    refuse_mapping("decompose", H)
    check_finite("H", H)
    above = H.detach().triu(1)
    if bool((above != 0).any()):
        where = (above != 0).nonzero()[0].tolist()
        raise InputError(
            f"H is not lower triangular: entry {where} is {float(above[tuple(where)])}; "
            "pass H.tril() if what is above the diagonal does not count"
        )
    *batch, n, _ = H.shape
    matrices = H.reshape(-1, n, n)
    starts, kernels = _exact(matrices) if within == 0 else _within(matrices.detach(), within)
    k = starts.shape[-1]
    return ConvBasis._trusted(kernels.view(*batch, k, n), starts.view(*batch, k))


def _exact(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return starts ``(G, k)`` and kernels ``(G, k, n)`` of the exact decomposition.

    Inside a segment equal columns are transitively equal, so neighbours can be compared at once.
    """
    n = matrices.shape[-1]
    differs = (matrices[:, 1:, 1:] != matrices[:, :-1, :-1]).tril().any(-2)
    first = (matrices[:, :, :1] != 0).any(-2)
    is_start = torch.cat([first, differs], dim=-1)
    k = int(is_start.sum(-1).max()) if is_start.numel() else 0
    positions = torch.where(is_start, torch.arange(n, device=matrices.device), n)
    starts = positions.sort(dim=-1).values[:, :k]
    return starts, _lag_columns(matrices, starts)


def _lag_columns(matrices: Tensor, columns: Tensor) -> Tensor:
    """Return columns ``(G, k)`` in lag coordinates, ``(G, k, n)``, zero-filled; n gives zeros."""
    n = matrices.shape[-1]
    rows = columns[..., None] + torch.arange(n, device=matrices.device)
    inside = rows < n
    index = (rows.clamp(max=n - 1) * n + columns.clamp(max=n - 1)[..., None]).flatten(1)
    return matrices.flatten(1).gather(1, index).view(rows.shape).masked_fill(~inside, 0.0)


def _within(matrices: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Return starts and kernels of the greedy sweep with entry errors of at most tol."""
    groups, n, _ = matrices.shape
    columns = matrices.mT.contiguous()
    low, high = torch.zeros_like(columns[:, 0]), torch.zeros_like(columns[:, 0])
    started = torch.zeros((groups, 1), dtype=matrices.dtype, device=matrices.device)
    starts: list[list[int]] = [[] for _ in range(groups)]
    kernels: list[list[Tensor]] = [[] for _ in range(groups)]
    for j in range(n):
        column = columns[:, j, j:]
        new_low = torch.minimum(low[:, : n - j], column)
        new_high = torch.maximum(high[:, : n - j], column)
        # Before the first start the kernel is not free but 0.
        middle = _middle(new_low, new_high) * started
        error = torch.maximum(new_high - middle, middle - new_low).amax(-1)
        begins = error > tol
        for g in begins.nonzero()[:, 0].tolist():
            if starts[g]:
                kernels[g].append(_middle(low[g], high[g]))
            starts[g].append(j)
            started[g] = 1.0
            low[g, : n - j] = high[g, : n - j] = column[g]
            low[g, n - j :] = high[g, n - j :] = 0.0
        keep = begins[:, None]
        low[:, : n - j] = torch.where(keep, low[:, : n - j], new_low)
        high[:, : n - j] = torch.where(keep, high[:, : n - j], new_high)
    for g in range(groups):
        if starts[g]:
            kernels[g].append(_middle(low[g], high[g]))
    k = max((len(s) for s in starts), default=0)
    filled = [s + [n] * (k - len(s)) for s in starts]
    zero = columns.new_zeros(n)
    rows = [row for ks in kernels for row in ks + [zero] * (k - len(ks))]
    stacked = torch.stack(rows) if rows else columns.new_zeros((0, n))
    found = torch.tensor(filled, dtype=torch.int64, device=matrices.device).view(groups, k)
    return found, stacked.view(groups, k, n)


def _middle(low: Tensor, high: Tensor) -> Tensor:
    """Return the midpoint, exactly low where both agree."""
    return torch.where(low == high, low, low + (high - low) / 2)
