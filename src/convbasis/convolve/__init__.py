"""Products of segmented lower-triangular matrices with vectors, behind one function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Dispatch, resolve_backend
from .fft import fft_product
from .guard import lost_rows, reached_rows
from .reference import product_rows
from .rescue import Rescue, replace_lost

DEFAULT_MAX_BYTES = 256 << 20
"""Working memory of the transforms, in bytes, where the caller names none."""


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
    groups = problems * sets
    flat_kernels = kernels.reshape(groups, k, n)
    flat_starts = starts.expand(problems, sets, k).reshape(groups, k)
    flat_x = x.expand(problems, sets, n, x.shape[-1])

    def evaluate(chosen: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        values = flat_x[chosen // sets, chosen % sets]
        chosen_kernels, chosen_starts = flat_kernels[chosen], flat_starts[chosen]
        return (product_rows(chosen_kernels, chosen_starts, values, rows, transpose=transpose),)

    chosen_backend, reason = resolve_backend(backend, n)
    if k == 0:
        zero = kernels.new_zeros((problems, sets, n, x.shape[-1]))
        return zero, Dispatch(chosen_backend, "the zero matrix")
    if chosen_backend == "reference":
        everything = torch.arange(groups, device=x.device)
        rows = torch.arange(n, device=x.device).expand(groups, n)
        (product,) = evaluate(everything, rows)
        return product.view(problems, sets, n, -1), Dispatch("reference", reason)

    product, noise = fft_product(kernels, starts, x, max_bytes, transpose=transpose)

    def magnitude() -> Tensor:
        norms = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
        sizes = kernels.detach().abs()
        return fft_product(sizes, starts, norms, max_bytes, transpose=transpose)[0][..., 0]

    reached = reached_rows(starts, x, transpose=transpose)
    product = product.masked_fill(~reached[..., None], 0.0)
    lost = lost_rows(product, noise, reached, magnitude)
    (product,), rescue = replace_lost((product.reshape(groups, n, -1),), lost.view(groups, n), evaluate)
    dispatch = Dispatch("fft", reason, rescue.rows, rescue.matrices)
    dispatch.warn_if_direct(groups)
    return product.view(problems, sets, n, -1), dispatch


__all__ = [
    "DEFAULT_MAX_BYTES",
    "Rescue",
    "fft_product",
    "lost_rows",
    "reached_rows",
    "replace_lost",
    "segment_product",
]
