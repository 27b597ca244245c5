"""Low rank times conv: weights that are a kernel of features times a function of the lag."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..checks import check_alike, check_finite, check_float_tensor, check_nonnegative, compute_dtype
from ..convolve import DEFAULT_MAX_BYTES, fft_kernel_gradient, segment_product
from ..errors import ConvBasisError, InputError
from ..transforms import final, no_forward_mode, refuse_transforms

_ENTRIES = 1 << 23  # numbers in the columns of convolutions at a time


def lowrank_toeplitz_matmul(u1: Tensor, u2: Tensor, kernel: Tensor, x: Tensor) -> Tensor:
    """Return ``((u1 u2^T)∘conv(kernel)) @ x``.

    Row i is the sum of ``(u1_i·u2_j) kernel[i - j] x_j`` over j <= i.

    Args:
        u1: ``(..., n, r)``; float64, float32, bfloat16 or float16.
        u2: ``(..., n, r)``, same dtype and device.
        kernel: ``(n,)`` or ``(..., n)``, same dtype and device.
        x: ``(..., n, c)``, same dtype and device. Batch dimensions broadcast.

    Returns:
        ``(..., n, c)``, dtype of x. Half types are computed in float32. Differentiable once with
        respect to all four; the gradients are such products, and a correlation for the kernel.

    Raises:
        InputError: (a ValueError) shapes, dtypes or devices that do not fit; NaN or Inf.

    Complexity:
        O(n r c log n) time: r products with conv(kernel), one for each column of u1 and u2, of c
        columns each; taken some at a time, in memory of the inputs and 2^23 numbers.

    Source:
        "Masked low rank" of docs/mathematics.md: the sum over p of diag(u1_p) conv(kernel) diag(u2_p).

    Example:
        >>> import torch
        >>> from convbasis.lowrank import lowrank_toeplitz_matmul
        >>> ones = torch.ones(3, 1)
        >>> lowrank_toeplitz_matmul(2 * ones, ones, torch.tensor([1.0, 0.5, 0.0]), ones)[:, 0]
        tensor([2., 3., 3.])
    """
    refuse_transforms("lowrank_toeplitz_matmul", "masked_lowrank_matmul or causal_toeplitz_matmul")
    batch = _checked(u1=u1, u2=u2, kernel=kernel, x=x)
    n, c = x.shape[-2:]
    if 0 in batch or n == 0 or c == 0 or u1.shape[-1] == 0:
        return x.new_zeros((*batch, n, c))
    with torch.autocast(x.device.type, enabled=False):
        left, right, values = (
            tensor.to(compute_dtype(x.dtype)).expand(*batch, -1, -1).reshape(-1, *tensor.shape[-2:])
            for tensor in (u1, u2, x)
        )
        kernels = kernel.to(values.dtype).expand(*batch, n).reshape(-1, n)
        product: Tensor = _ToeplitzProduct.apply(left, right, kernels, values)
    return product.reshape(*batch, n, c).to(x.dtype)


def relative_attention(u1: Tensor, u2: Tensor, value: Tensor, lag_bias: Tensor) -> Tensor:
    """Return causal kernelised attention with a bias by relative position.

    Query i looks at key j <= i with weight ``(u1_i·u2_j) exp(lag_bias[i - j])``, normalised to sum 1.

    Args:
        u1: ``(..., n, r)`` features of the queries, as from `polynomial_features` or of your own;
            products with those of keys must be positive.
        u2: ``(..., n, r)`` features of the keys.
        value: ``(..., n, d_v)``.
        lag_bias: ``(n,)`` or ``(..., n)``, added to the logarithm of the weights, by lag.

    Returns:
        ``(..., n, d_v)``, dtype of the value; half types are computed in float32. Differentiable once
        with respect to all four.

    Raises:
        InputError: as `lowrank_toeplitz_matmul`.
        ConvBasisError: a normaliser is not positive, or so small that the dtype has no digits for it.

    Complexity: O(n r d_v log n) time.

    Example:
        >>> import torch
        >>> from convbasis.lowrank import polynomial_features, relative_attention
        >>> u1, u2 = (polynomial_features(0.1 * torch.randn(50, 4), 2) for _ in range(2))
        >>> relative_attention(u1, u2, torch.ones(50, 1), -torch.arange(50.0) / 9)[7]
        tensor([1.])
    """
    refuse_transforms("relative_attention", "scaled_dot_product_attention with attn_mask")
    batch = _checked(u1=u1, u2=u2, lag_bias=lag_bias, value=value)
    if 0 in (*batch, *value.shape[-2:]):
        return value.new_zeros((*batch, *value.shape[-2:]))
    with torch.autocast(value.device.type, enabled=False):
        # Sums over many keys leave the range of float16, averages do not.
        left, right, values, bias = (
            tensor.to(compute_dtype(value.dtype)) for tensor in (u1, u2, value, lag_bias)
        )
        # What all lags have in common cancels.
        kernel = (bias - bias.detach().amax(-1, keepdim=True)).exp()
        padded = torch.nn.functional.pad(values, (0, 1), value=1.0)
        sums = lowrank_toeplitz_matmul(left, right, kernel, padded)
        total = sums[..., -1:]
        limits = torch.finfo(total.dtype)
        # Numbers below the least one that is refused have fewer digits, or are 0.
        wrong = ~((total > limits.tiny / limits.eps) & total.isfinite())[..., 0]
        if bool(wrong.any()):
            row = wrong.nonzero()[0].tolist()
            raise ConvBasisError(
                f"the normaliser of row {row} is {float(total[(*row, 0)]):.3g}: products of features "
                f"must be positive, and lag_bias must not leave a row without weight in {total.dtype}"
            )
        output = sums[..., :-1] / total
    return output.to(value.dtype)


def rotary_features(u: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Return features rotated by their position, so that products depend on the lag too.

    Feature pairs (p, p + r/2) turn by ``i · base^(-2p/r)`` at token i, as rotary positions do. Then
    ``rotary(u1)_i · rotary(u2)_j`` is the sum over pairs of ``cos(w_p (i - j))`` times the pair's inner
    product and ``sin(w_p (i - j))`` times its cross product: low rank times conv with kernels that are
    low rank themselves, so that no transform is needed, only `masked_lowrank_matmul`.

    Products of rotated features may be negative, whatever the features were. As weights of attention
    they can leave a row with a normaliser that is not positive, which `relative_attention` refuses.

    Args:
        u: ``(..., n, r)``, r even.
        base: positive; the slowest pair turns about once in 2 pi base tokens.

    Returns:
        ``(..., n, r)``, dtype of u; half types are rotated in float32.

    Raises:
        InputError: an odd r, no floating-point tensor, or a base that is not positive.

    Example:
        >>> import torch
        >>> from convbasis.lowrank import rotary_features
        >>> rotary_features(torch.ones(2, 2))
        tensor([[ 1.0000,  1.0000],
                [-0.3012,  1.3818]])
    """
    check_float_tensor("u", u)
    if u.ndim < 2 or u.shape[-1] % 2:
        raise InputError(f"u has shape {tuple(u.shape)}; (..., n, r) with an even r is wanted")
    if check_nonnegative("base", base) == 0.0:
        raise InputError(
            "base=0 is not positive; the slowest pair turns about once in 2 pi base tokens"
        )
    n, r = u.shape[-2:]
    half = r // 2
    work = u.to(compute_dtype(u.dtype))
    speeds = base ** (-torch.arange(half, dtype=torch.float64, device=u.device) / max(1, half))
    angles = torch.arange(n, dtype=torch.float64, device=u.device)[:, None] * speeds
    cos, sin = angles.cos().to(work.dtype), angles.sin().to(work.dtype)
    first, second = work[..., :half], work[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(u.dtype)


def _checked(**given: Tensor) -> torch.Size:
    """Check two factors, what depends on the lag, and columns; return their common batch dimensions.

    Raises:
        InputError: dtypes, devices or shapes that do not fit; NaN or Inf. It has the names given.
    """
    for name, tensor in given.items():
        check_float_tensor(name, tensor)
    check_alike(**given)
    left, right, by_lag, x = given.values()
    *_, kernel, columns = given
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
    wanted = f"u1 and u2 must be (..., n, r), {kernel} (..., n) and {columns} (..., n, c) of one n"
    shapes = f"shapes are {shapes}; {wanted}"
    if min(left.ndim, right.ndim, x.ndim) < 2 or by_lag.ndim < 1:
        raise InputError(shapes)
    n = x.shape[-2]
    if left.shape[-2:] != right.shape[-2:] or left.shape[-2] != n or by_lag.shape[-1] != n:
        raise InputError(shapes)
    batches = (left.shape[:-2], right.shape[:-2], by_lag.shape[:-1], x.shape[:-2])
    try:
        batch = torch.broadcast_shapes(*batches)
    except RuntimeError:
        raise InputError(f"batch dimensions do not broadcast: {shapes}") from None
    for name, tensor in given.items():
        check_finite(name, tensor)
    return batch


def _columns(left: Tensor, x: Tensor) -> Iterator[slice]:
    """Yield slices of the r features whose columns are held at a time."""
    r = left.shape[-1]
    some = max(1, _ENTRIES // x.numel())
    for low in range(0, r, some):
        yield slice(low, min(r, low + some))


def _spread(features: Tensor, x: Tensor) -> Tensor:
    """Return each feature times each column, ``(P, 1, n, s·c)``."""
    return (features[..., None] * x[:, :, None]).flatten(2)[:, None]


def _multiply(left: Tensor, right: Tensor, kernels: Tensor, x: Tensor, transpose: bool) -> Tensor:
    """Return the product with conv, or with its transpose in its place, ``(P, n, c)``."""
    output = torch.zeros_like(x)
    starts = torch.zeros((1, 1, 1), dtype=torch.int64, device=x.device)
    for some in _columns(left, x):
        columns = _spread(right[..., some], x)
        found, _ = segment_product(kernels[:, None, None], starts, columns, transpose=transpose)
        found = found[:, 0].unflatten(-1, (-1, x.shape[-1]))
        output += torch.einsum("pns,pnsc->pnc", left[..., some], found)
    return output


class _ToeplitzProduct(torch.autograd.Function):
    """The product; its backward pass makes the columns anew."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, kernels: Tensor, x: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(left, right, kernels, x)
        return _multiply(left, right, kernels, x, False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Put the gradient in the place of each factor in turn, and correlate for the kernel."""
        left, right, kernels, x = ctx.saved_tensors
        gradient = grads[0].contiguous()
        found: list[Tensor | None] = [None] * 4
        with torch.no_grad():
            if ctx.needs_input_grad[0]:
                found[0] = _multiply(gradient, x, kernels, right, False)
            if ctx.needs_input_grad[1]:
                found[1] = _multiply(x, gradient, kernels, left, True)
            if ctx.needs_input_grad[2]:
                starts = torch.zeros((1, 1, 1), dtype=torch.int64, device=x.device)
                total = torch.zeros_like(kernels, dtype=torch.float64)
                for some in _columns(left, x):
                    inner, outer = _spread(right[..., some], x), _spread(left[..., some], gradient)
                    total += fft_kernel_gradient(
                        starts, inner.double(), outer.double(), 1, DEFAULT_MAX_BYTES
                    )[:, 0, 0]
                found[2] = total.to(kernels.dtype)
            if ctx.needs_input_grad[3]:
                found[3] = _multiply(right, left, kernels, gradient, True)
        if torch.is_grad_enabled():  # somebody may want to differentiate once more
            sources = (gradient, left, right, kernels, x)
            found = [
                None if one is None else final("lowrank_toeplitz_matmul", one, *sources)
                for one in found
            ]
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Refuse."""
        raise no_forward_mode("lowrank_toeplitz_matmul")
