"""Hybrid attention as one operation, for transforms of torch.func, which cannot see its choices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..transforms import as_batch, no_forward_mode, second_derivative
from .heads import attend_heads
from .settings import Settings


class HybridFunction(torch.autograd.Function):
    """Attention whose backward pass makes it anew; mapped over, the members are a larger batch."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        settings: Settings,
        scale: float,
    ) -> Tensor:
        """Attend."""
        return attend_heads(query, key, value, settings, scale, mask, False)[0].output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the inputs."""
        *tensors, ctx.settings, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Attend again, and differentiate that."""
        query, key, value, mask = ctx.saved_tensors
        found = _Gradient.apply(grads[0], query, key, value, mask, ctx.settings, ctx.scale)
        return *found, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Refuse."""
        raise no_forward_mode("hybrid_attention")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        """Take what is mapped over as more sequences of the batch."""
        size = info.batch_size
        tensors = [as_batch(arg, dim, size) for arg, dim in zip(args[:4], in_dims[:4], strict=True)]
        return HybridFunction.apply(*tensors, *args[4:]).unflatten(0, (size, -1)), 0


class _Gradient(torch.autograd.Function):
    """The gradients of query, key and value."""

    @staticmethod
    def forward(
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        settings: Settings,
        scale: float,
    ) -> tuple[Tensor, ...]:
        """Attend and differentiate."""
        own = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with torch.enable_grad():
            output = attend_heads(own[0], own[1], own[2], settings, scale, mask, False)[0].output
        return torch.autograd.grad(output, own, grad_output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Refuse."""
        raise second_derivative("hybrid_attention")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse."""
        raise second_derivative("hybrid_attention")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Take what is mapped over as more sequences of the batch."""
        size = info.batch_size
        tensors = [as_batch(arg, dim, size) for arg, dim in zip(args[:5], in_dims[:5], strict=True)]
        found = _Gradient.apply(*tensors, *args[5:])
        return tuple(x.unflatten(0, (size, -1)) for x in found), (0, 0, 0)
