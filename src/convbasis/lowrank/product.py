"""masked_lowrank_matmul: the product with a masked low-rank matrix that is never formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_alike, check_finite, check_float_tensor, compute_dtype, describe
from ..errors import InputError
from ..transforms import front, refuse_nested_forward_mode, seen_through
from .mask import Mask


def masked_lowrank_matmul(u1: Tensor, u2: Tensor, x: Tensor, mask: Mask) -> Tensor:
    """Return ``(W∘(u1 u2^T)) @ x``: row i is the sum of ``(u1_i·u2_j) x_j`` over the keys j it sees.

    Args:
        u1: ``(..., n, r)``; float64, float32, bfloat16 or float16.
        u2: ``(..., n, r)``, same dtype and device.
        x: ``(..., n, c)``, same dtype and device. Batch dimensions broadcast.
        mask: of n tokens, from `convbasis.lowrank`; the same for the whole batch.

    Returns:
        ``(..., n, c)``, dtype of x; a row that sees nothing is 0. Half types are computed in float32.
        Differentiable with respect to u1, u2 and x any number of times: each gradient is such a product
        too, and costs as much.

    Raises:
        InputError: (a ValueError) shapes, dtypes or devices that do not fit; NaN or Inf.

    Complexity:
        That of the mask: O(n r c) time for causal masks; O(n r c (1 + log(L/64) / 64)) for windows,
        documents and other intervals, L the longest; O((n + changes) r c) for row changes. Memory:
        inputs, output, and bounded numbers of states of chunks, of 128 tokens for causal masks and of
        64 for others, never n r c numbers.

    Source:
        "Masked low rank" of docs/mathematics.md; Conv-Basis (arXiv 2405.05219), section 6.

    Example:
        >>> import torch, convbasis as cb
        >>> u1, u2, x = torch.ones(3, 1), torch.ones(3, 1), torch.tensor([[1.0], [2.0], [4.0]])
        >>> cb.masked_lowrank_matmul(u1, u2, x, cb.lowrank.CausalMask(3))[:, 0]
        tensor([1., 3., 7.])
    """
    for name, tensor in (("u1", u1), ("u2", u2), ("x", x)):
        check_float_tensor(name, tensor)
        if tensor.ndim < 2:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; (..., n, columns) is wanted")
    check_alike(u1=u1, u2=u2, x=x)
    if not isinstance(mask, Mask):
        raise InputError(f"mask is {describe(mask)}; one of convbasis.lowrank is wanted")
    if u1.shape[-2:] != u2.shape[-2:] or x.shape[-2] != u1.shape[-2] or u1.shape[-2] != mask.n:
        raise InputError(
            f"u1 has shape {tuple(u1.shape)}, u2 {tuple(u2.shape)}, x {tuple(x.shape)} and mask "
            f"{mask.n} tokens; u1 and u2 must be (..., n, r) and x (..., n, c), all of the mask's n"
        )
    try:
        batch = torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in (u1, u2, x)))
    except RuntimeError:
        raise InputError(
            f"batch dimensions {tuple(u1.shape[:-2])} of u1, {tuple(u2.shape[:-2])} of u2 and "
            f"{tuple(x.shape[:-2])} of x do not broadcast"
        ) from None
    for name, tensor in (("u1", u1), ("u2", u2), ("x", x)):
        check_finite(name, tensor)
    n, c = x.shape[-2:]
    if 0 in batch or u1.shape[-1] == 0 or c == 0:
        return x.new_zeros((*batch, n, c))
    with torch.autocast(x.device.type, enabled=False):
        left, right, values = (
            tensor.to(compute_dtype(x.dtype)).expand(*batch, -1, -1).reshape(-1, *tensor.shape[-2:])
            for tensor in (u1, u2, x)
        )
        product = lowrank_product(left, right, values, mask)
    return product.reshape(*batch, n, c).to(x.dtype)


def lowrank_product(
    left: Tensor, right: Tensor, x: Tensor, mask: Mask, transpose: bool = False
) -> Tensor:
    """Return `Mask.product`, differentiable."""
    tensors = (left, right, x)
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not differentiated and not seen_through(*tensors):
        return mask.product(left, right, x, transpose)
    found: Tensor = _MaskedProduct.apply(left, right, x, mask, transpose)
    return found


class _MaskedProduct(torch.autograd.Function):
    """A masked product; linear in each factor, so that its derivatives are masked products again."""

    @staticmethod
    def forward(left: Tensor, right: Tensor, x: Tensor, mask: Mask, transpose: bool) -> Tensor:
        """Multiply."""
        product = mask.product(left, right, x, transpose)
        # Forward mode wants a tensor of its own, not a view of one that is longer.
        return product.clone() if product._is_view() else product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the factors."""
        left, right, x, ctx.mask, ctx.transpose = inputs
        ctx.save_for_backward(left, right, x)
        ctx.save_for_forward(left, right, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Put the gradient g in: (W∘(g x^T)) right, (W^T∘(x g^T)) left, (W^T∘(right left^T)) g."""
        left, right, x = ctx.saved_tensors
        gradient, mask = grads[0].contiguous(), ctx.mask
        of_left = of_right = of_x = None
        if ctx.needs_input_grad[0]:
            of_left = _MaskedProduct.apply(gradient, x, right, mask, ctx.transpose)
        if ctx.needs_input_grad[1]:
            of_right = _MaskedProduct.apply(x, gradient, left, mask, not ctx.transpose)
        if ctx.needs_input_grad[2]:
            of_x = _MaskedProduct.apply(right, left, gradient, mask, not ctx.transpose)
        return of_left, of_right, of_x, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Multiply with the change of each factor."""
        refuse_nested_forward_mode()
        factors = ctx.saved_tensors
        changes = []
        for at, tangent in enumerate(tangents[:3]):
            if tangent is not None:
                own = [tangent if at == i else factor for i, factor in enumerate(factors)]
                changes.append(_MaskedProduct.apply(*own, ctx.mask, ctx.transpose))
        return torch.stack(changes).sum(0)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        """Take what is mapped over as a larger batch."""
        size = info.batch_size
        tensors = [front(args[at], in_dims[at], size).flatten(0, 1) for at in range(3)]
        return _MaskedProduct.apply(*tensors, *args[3:]).unflatten(0, (size, -1)), 0
