"""Products of segmented lower-triangular matrices with vectors, behind one function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Dispatch
from ..transforms import as_batch, front, refuse_nested_forward_mode, seen_through
from .choice import DEFAULT_MAX_BYTES, Work, choose
from .direct import direct_product
from .fft import fft_kernel_gradient, fft_product
from .gradients import partitioned_transposed
from .guard import lost_rows, reached_rows
from .partition import Partition, Sizes
from .partitioned import partitioned_blocks
from .reference import product_rows
from .rescue import evaluate_safely
from .segments import lag_mask, segment_stops
from .spectra import row_noise
from .windows import KernelWindows, LogitWindows

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

    Rows that would drown in the rounding of a transform are evaluated directly. Differentiable any
    number of times, forwards and backwards, with respect to kernels and x, and mapped by vmap.

    Args:
        kernels: ``(P, R, k, n)`` float32 or float64, k >= 0, zero past lag n - 1 - start.
        starts: ``(P, R, k)`` or ``(1, 1, k)``.
        x: ``(P, R, n, c)`` or ``(P, 1, n, c)``, dtype of kernels.
        backend: one of `BACKENDS`.
        max_bytes: bound on the transforms' working memory, in bytes.
        transpose: multiply with the transposes.

    Returns:
        the product ``(P, R, n, c)`` and what was run.
    """
    differentiated = torch.is_grad_enabled() and (kernels.requires_grad or x.requires_grad)
    if not differentiated and not seen_through(kernels, x):
        return _evaluate(kernels, starts, x, backend, max_bytes, transpose)
    record = _Record()
    product = _SegmentProduct.apply(kernels, starts, x, backend, max_bytes, transpose, record)
    return product, record.dispatch


class _Record:
    """Where a product leaves what it ran; transforms take it as it is."""

    dispatch: Dispatch


class _SegmentProduct(torch.autograd.Function):
    """A product, its derivatives, which are products too, and many products at once."""

    @staticmethod
    def forward(
        kernels: Tensor,
        starts: Tensor,
        x: Tensor,
        backend: str,
        max_bytes: int,
        transpose: bool,
        record: _Record,
    ) -> Tensor:
        """Multiply; what was run goes into the record."""
        product, record.dispatch = _evaluate(kernels, starts, x, backend, max_bytes, transpose)
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what is multiplied."""
        kernels, starts, x, ctx.backend, ctx.max_bytes, ctx.transpose, _ = inputs
        ctx.save_for_backward(kernels, starts, x)
        ctx.save_for_forward(kernels, starts, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Multiply the gradient with the transposes, and correlate it with x."""
        kernels, starts, x = ctx.saved_tensors
        gradient = grads[0].contiguous()
        of_kernels = of_x = None
        if ctx.needs_input_grad[2]:
            options = "auto", ctx.max_bytes, not ctx.transpose, _Record()
            of_x = _SegmentProduct.apply(kernels, starts, gradient, *options)
            if x.shape[1] == 1:
                of_x = of_x.sum(1, keepdim=True)
        if ctx.needs_input_grad[0] and kernels.numel():
            inner, outer = x.double(), gradient.double()
            if ctx.transpose:
                shape = outer.shape
                inner, outer = outer, inner.expand(shape)
            k = kernels.shape[-2]
            of_kernels = _KernelGradient.apply(starts, inner, outer, k, ctx.max_bytes).to(kernels.dtype)
        elif ctx.needs_input_grad[0]:
            of_kernels = torch.zeros_like(kernels)
        return of_kernels, None, of_x, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Multiply each factor with the change of the other."""
        refuse_nested_forward_mode()
        kernels, starts, x = ctx.saved_tensors
        of_kernels, _, of_x, *_ = tangents
        options = ctx.backend, ctx.max_bytes, ctx.transpose
        changes = []
        if of_kernels is not None:
            changes.append(_SegmentProduct.apply(of_kernels, starts, x, *options, _Record()))
        if of_x is not None:
            changes.append(_SegmentProduct.apply(kernels, starts, of_x, *options, _Record()))
        return torch.stack(changes).sum(0)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, kernels: Tensor, starts: Tensor, x: Tensor, *options: Any
    ) -> tuple[Tensor, int]:
        """Take what is mapped over as more columns of x, or else as more matrices."""
        size = info.batch_size
        if in_dims[0] is None:
            columns = x.movedim(in_dims[2], -2)  # (P, R, n, size, c)
            product = _SegmentProduct.apply(kernels, starts, columns.flatten(-2), *options)
            return product.unflatten(-1, columns.shape[-2:]), 3
        if starts.shape[0] > 1:
            starts = starts.repeat(size, 1, 1)
        factors = as_batch(kernels, in_dims[0], size), starts, as_batch(x, in_dims[2], size)
        product = _SegmentProduct.apply(*factors, *options)
        return product.unflatten(0, (size, -1)), 0


class _KernelGradient(torch.autograd.Function):
    """`fft_kernel_gradient`, linear in x and in the gradient, with its own derivatives."""

    @staticmethod
    def forward(starts: Tensor, x: Tensor, gradient: Tensor, k: int, max_bytes: int) -> Tensor:
        """Correlate."""
        return fft_kernel_gradient(starts, x, gradient, k, max_bytes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save what is correlated."""
        starts, x, gradient, ctx.k, ctx.max_bytes = inputs
        ctx.save_for_backward(starts, x, gradient)
        ctx.save_for_forward(starts, x, gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Multiply with the matrices whose kernels are the incoming gradient."""
        starts, x, gradient = ctx.saved_tensors
        kernels = grads[0].masked_fill(~lag_mask(starts, x.shape[-2]), 0.0)
        of_x = of_gradient = None
        if ctx.needs_input_grad[1]:
            options = "auto", ctx.max_bytes, True, _Record()
            of_x = _SegmentProduct.apply(kernels, starts, gradient, *options)
            if x.shape[1] == 1:
                of_x = of_x.sum(1, keepdim=True)
        if ctx.needs_input_grad[2]:
            options = "auto", ctx.max_bytes, False, _Record()
            of_gradient = _SegmentProduct.apply(kernels, starts, x, *options)
        return None, of_x, of_gradient, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Correlate each factor with the change of the other."""
        refuse_nested_forward_mode()
        starts, x, gradient = ctx.saved_tensors
        _, of_x, of_gradient, *_ = tangents
        changes = []
        if of_x is not None:
            changes.append(_KernelGradient.apply(starts, of_x, gradient, ctx.k, ctx.max_bytes))
        if of_gradient is not None:
            changes.append(_KernelGradient.apply(starts, x, of_gradient, ctx.k, ctx.max_bytes))
        return torch.stack(changes).sum(0)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, starts: Tensor, x: Tensor, gradient: Tensor, k: int, max_bytes: int
    ) -> tuple[Tensor, int]:
        """Take what is mapped over as more matrices."""
        size = info.batch_size
        if starts.shape[0] > 1:
            starts = starts.repeat(size, 1, 1)
        x, gradient = front(x, in_dims[1], size), front(gradient, in_dims[2], size)
        found = _KernelGradient.apply(starts, x.flatten(0, 1), gradient.flatten(0, 1), k, max_bytes)
        return found.unflatten(0, (size, -1)), 0


def _evaluate(
    kernels: Tensor, starts: Tensor, x: Tensor, backend: str, max_bytes: int, transpose: bool
) -> tuple[Tensor, Dispatch]:
    problems, sets, k, n = kernels.shape
    groups, columns = problems * sets, x.shape[-1]
    longest = int((segment_stops(starts, n) - starts).max()) if starts.numel() else 0
    choice = choose(backend, Work(n, k, columns, 0, longest, groups, kernels.dtype))
    if k == 0 or groups * columns == 0:
        zero = kernels.new_zeros((problems, sets, n, columns))
        return zero, Dispatch(choice.backend, "the result is zero or empty")
    flat_kernels = kernels.reshape(groups, k, n)
    flat_starts = starts.expand(problems, sets, k).reshape(groups, k)
    flat_x = x.expand(problems, sets, n, columns)

    def direct(chosen: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        values = flat_x[chosen // sets, chosen % sets]
        own_kernels, own_starts = flat_kernels[chosen], flat_starts[chosen]
        return (product_rows(own_kernels, own_starts, values, rows, transpose=transpose),)

    if choice.backend == "reference":
        everything = torch.arange(groups, device=x.device)
        rows = torch.arange(n, device=x.device).expand(groups, n)
        (product,) = direct(everything, rows)
        return product.view(problems, sets, n, columns), Dispatch("reference", choice.reason)
    if choice.backend == "direct":
        # Summed in float64: rows may cancel, and float32 would leave 1e-6 of the largest entry.
        wide = flat_kernels.double(), starts.flatten(0, 1), flat_x.flatten(0, 1).double()
        product = direct_product(*wide, transpose).to(kernels.dtype)
        return product.view(problems, sets, n, columns), Dispatch("direct", choice.reason)

    def multiply(own: Tensor, begins: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if choice.sizes is None:
            return fft_product(own, begins, values, max_bytes, transpose=transpose)
        return _partitioned(own, begins, values, choice.sizes, max_bytes, transpose)

    def transform(chosen: Tensor | None, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        parts = (kernels, starts, x)
        if chosen is not None:
            values = flat_x[chosen // sets, chosen % sets]
            parts = (flat_kernels[chosen, None], flat_starts[chosen, None], values[:, None])
        own_kernels, own_starts, values = parts[0].to(dtype), parts[1], parts[2].to(dtype)
        product, noise = multiply(own_kernels, own_starts, values)

        def magnitude() -> Tensor:
            norms = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
            return multiply(own_kernels.abs(), own_starts, norms)[0][..., 0]

        reached = reached_rows(own_starts, values, transpose=transpose)
        product = product.masked_fill(~reached[..., None], 0.0)
        lost = lost_rows(
            torch.linalg.vector_norm(product, dim=-1, dtype=torch.float64),
            noise,
            reached,
            magnitude,
            worked=dtype,
            tolerance=_TOLERANCE[kernels.dtype],
        )
        return (product.reshape(-1, n, columns),), lost.reshape(-1, n)

    (product,), rescue = evaluate_safely(transform, direct, kernels.dtype)
    dispatch = Dispatch(choice.backend, choice.reason, *rescue)
    dispatch.warn_if_direct(groups)
    return product.view(problems, sets, n, columns), dispatch


def _partitioned(
    kernels: Tensor, starts: Tensor, x: Tensor, sizes: Sizes, max_bytes: int, transpose: bool
) -> tuple[Tensor, Tensor]:
    """Multiply by partitioned convolution, matrix by matrix; as `fft_product`, noise ``(P, R, n)``."""
    problems, sets, k, n = kernels.shape
    lists = starts.expand(problems, sets, k).tolist()
    product = kernels.new_zeros((problems, sets, n, x.shape[-1]))
    noise = kernels.new_zeros((problems, sets, n), dtype=torch.float64)
    for p in range(problems):
        for r in range(sets):
            partition = Partition(lists[p][r], n, sizes)
            if not partition.pieces:
                continue
            windows = KernelWindows(kernels[p, r], partition)
            values = x[p, r if x.shape[1] > 1 else 0]
            if transpose:
                product[p, r], noise[p, r] = partitioned_transposed(
                    windows, partition, values, max_bytes
                )
                continue
            energies = kernels.new_zeros(n)
            for block in partitioned_blocks(windows, partition, values, None, max_bytes):
                rows = slice(*block.rows)
                columns = slice(*block.columns)
                product[p, r, rows, columns] = block.values.mT.flatten(0, 1)
                height = block.values.shape[-1]
                energies[rows] += block.energy[:, 0].repeat_interleave(height)
            noise[p, r] = row_noise(energies, sizes.transform, kernels.dtype)
    return product, noise


__all__ = [
    "DEFAULT_MAX_BYTES",
    "KernelWindows",
    "LogitWindows",
    "Partition",
    "Sizes",
    "Work",
    "choose",
    "evaluate_safely",
    "fft_kernel_gradient",
    "fft_product",
    "lost_rows",
    "partitioned_blocks",
    "reached_rows",
    "row_noise",
    "segment_product",
]
