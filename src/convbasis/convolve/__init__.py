"""Products of segmented lower-triangular matrices with vectors, behind one function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Dispatch, resolve_backend
from .fft import fft_product
from .guard import lost_rows, reached_rows
from .reference import product_rows
from .rescue import evaluate_safely

DEFAULT_MAX_BYTES = 256 << 20
"""Working memory of the transforms, in bytes, where the caller names none."""

# The largest relative error of a row of a product that a transform may leave.
_TOLERANCE = {torch.float32: 1.5e-5, torch.float64: 1e-10}


def segment_product(
    kernels: Tensor,
    starts: Tensor,
    x: Tensor,
    *,
    backend: str = "auto",
    max_bytes: int = DEFAULT_MAX_BYTES,
    transpose: bool = False,
) -> tuple[Tensor, Dispatch]:
    """Multiply segmented matrices, or their transposes, with x.

    Rows that would drown in the rounding of a transform are evaluated directly.

    Args:
        kernels: ``(P, R, k, n)`` float32 or float64, k >= 0, zero past lag n - 1 - start.
        starts: ``(P, R, k)`` or ``(1, 1, k)``.
        x: ``(P, R, n, c)`` or ``(P, 1, n, c)``, dtype of kernels.
        backend: ``"auto"``, ``"fft"`` or ``"reference"``.
        max_bytes: bound on the transforms' working memory, in bytes.
        transpose: multiply with the transposes.

    Returns:
        the product ``(P, R, n, c)`` and what was run.
    """
    problems, sets, k, n = kernels.shape
    groups, columns = problems * sets, x.shape[-1]
    chosen_backend, reason = resolve_backend(backend, n)
    if k == 0 or groups * columns == 0:
        zero = kernels.new_zeros((problems, sets, n, columns))
        return zero, Dispatch(chosen_backend, "the result is zero or empty")
    flat_kernels = kernels.reshape(groups, k, n)
    flat_starts = starts.expand(problems, sets, k).reshape(groups, k)
    flat_x = x.expand(problems, sets, n, columns)

    def direct(chosen: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        values = flat_x[chosen // sets, chosen % sets]
        own_kernels, own_starts = flat_kernels[chosen], flat_starts[chosen]
        return (product_rows(own_kernels, own_starts, values, rows, transpose=transpose),)

    if chosen_backend == "reference":
        everything = torch.arange(groups, device=x.device)
        rows = torch.arange(n, device=x.device).expand(groups, n)
        (product,) = direct(everything, rows)
        return product.view(problems, sets, n, columns), Dispatch("reference", reason)

    def transform(chosen: Tensor | None, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        parts = (kernels, starts, x)
        if chosen is not None:
            values = flat_x[chosen // sets, chosen % sets]
            parts = (flat_kernels[chosen, None], flat_starts[chosen, None], values[:, None])
        own_kernels, own_starts, values = parts[0].to(dtype), parts[1], parts[2].to(dtype)
        product, noise = fft_product(own_kernels, own_starts, values, max_bytes, transpose=transpose)

        def magnitude() -> Tensor:
            norms = torch.linalg.vector_norm(values.detach(), dim=-1, keepdim=True)
            sizes = own_kernels.detach().abs()
            return fft_product(sizes, own_starts, norms, max_bytes, transpose=transpose)[0][..., 0]

        reached = reached_rows(own_starts, values, transpose=transpose)
        product = product.masked_fill(~reached[..., None], 0.0)
        lost = lost_rows(
            product,
            noise,
            reached,
            magnitude,
            tolerance=_TOLERANCE[kernels.dtype],
        )
        return (product.reshape(-1, n, columns),), lost.reshape(-1, n)

    (product,), rescue = evaluate_safely(transform, direct, kernels.dtype)
    dispatch = Dispatch("fft", reason, *rescue)
    dispatch.warn_if_direct(groups)
    return product.view(problems, sets, n, columns), dispatch


__all__ = [
    "DEFAULT_MAX_BYTES",
    "evaluate_safely",
    "fft_product",
    "lost_rows",
    "reached_rows",
    "segment_product",
]
