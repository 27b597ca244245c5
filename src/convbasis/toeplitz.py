"""causal_toeplitz_matmul: the product with one lower-triangular Toeplitz matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_alike, check_finite, check_float_tensor, compute_dtype
from .convolve import segment_product
from .dispatch import record_dispatch
from .errors import InputError


def causal_toeplitz_matmul(kernel: Tensor, x: Tensor) -> Tensor:
    """Return ``conv(kernel) @ x``: row i is the sum over j <= i of ``kernel[i - j] · x[j]``.

    A causal, linear convolution (nothing wraps around), with a matrix that is not symmetric: entry
    (i, j) is ``kernel[i - j]`` on and below the diagonal and 0 above it.

    Args:
        kernel: ``(n,)`` or ``(..., n)``, one kernel for each member of a batch.
        x: ``(n,)`` where kernel is; else ``(..., n, c)``, with batch dimensions that broadcast with the
            kernel's; same dtype and device.

    Returns:
        the shape of x with the batch dimensions broadcast, in its dtype. Half types are computed in
        float32. Differentiable with respect to both.

    Raises:
        InputError: (a ValueError) shapes, dtypes or devices that do not fit; NaN or Inf.

    Complexity:
        O(n c log n) time, or O(n^2 c) where that is faster. Rows that would drown in the rounding of
        the transforms are found and evaluated directly. `last_dispatch` says what ran.

    Source:
        F4 of docs/mathematics.md; Conv-Basis (arXiv 2405.05219), section 3.

    Example:
        >>> import torch, convbasis as cb
        >>> cb.causal_toeplitz_matmul(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 1.0]))
        tensor([1., 2., 4.])
    """
    for name, tensor in (("kernel", kernel), ("x", x)):
        check_float_tensor(name, tensor)
    check_alike(kernel=kernel, x=x)
    if x.ndim == 1 and kernel.ndim == 1:
        return causal_toeplitz_matmul(kernel, x[:, None])[:, 0]
    if kernel.ndim < 1 or x.ndim < 2 or x.shape[-2] != kernel.shape[-1]:
        raise InputError(
            f"kernel has shape {tuple(kernel.shape)} and x {tuple(x.shape)}; kernel must be (..., n) "
            "and x (..., n, c) with the same n, or both (n,)"
        )
    for name, tensor in (("kernel", kernel), ("x", x)):
        check_finite(name, tensor)
    n, columns = x.shape[-2:]
    try:
        batch = torch.broadcast_shapes(kernel.shape[:-1], x.shape[:-2])
    except RuntimeError:
        raise InputError(
            f"batch dimensions {tuple(kernel.shape[:-1])} of kernel and {tuple(x.shape[:-2])} of x do "
            "not broadcast"
        ) from None
    if n == 0 or columns == 0:
        return x.new_zeros((*batch, n, columns))
    work = compute_dtype(x.dtype)
    problems = batch.numel()
    if kernel.ndim == 1:  # one matrix: all columns at once
        folded = x.movedim(-2, 0).reshape(1, 1, n, problems * columns)
        kernels = kernel.view(1, 1, 1, n)
    else:
        folded = x.expand(*batch, n, columns).reshape(problems, 1, n, columns)
        kernels = kernel.expand(*batch, n).reshape(problems, 1, 1, n)
    starts = torch.zeros((1, 1, 1), dtype=torch.int64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        product, dispatch = segment_product(kernels.to(work), starts, folded.to(work))
    record_dispatch(dispatch)
    if kernel.ndim == 1:
        product = product.view(n, *batch, columns).movedim(0, -2)
    return product.reshape(*batch, n, columns).to(x.dtype)
