"""What `torch.func` makes of a call: whether it sees through it, and tensors that it maps over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .errors import ConvBasisError, InputError


def transforming() -> bool:
    """Whether a transform of torch.func is at work."""
    # What torch.autograd.Function itself asks; there is no public name for it.
    return torch._C._are_functorch_transforms_active()


def seen_through(*tensors: Tensor) -> bool:
    """Whether a call must be one operation to torch.func or to forward-mode differentiation."""
    return transforming() or any(unpack_dual(tensor).tangent is not None for tensor in tensors)


def may_make_anew() -> bool:
    """Whether the backward pass may make tensors anew by torch.utils.checkpoint.

    It saves them by hooks, which transforms of torch.func forbid, also to what runs inside of an
    operation under them.
    """
    return torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]


def front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Return a tensor with the dimension that is mapped over first; expanded if it has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def as_batch(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Return a tensor, or None, with what is mapped over as more members of its first dimension."""
    return None if tensor is None else front(tensor, dim, size).flatten(0, 1)


class _Box:
    """What `_Entries` found; transforms take it as it is."""

    entries: Tensor
    mapped = False


class _Entries(torch.autograd.Function):
    """Hand out the entries that are under all transforms."""

    @staticmethod
    def forward(tensor: Tensor, box: _Box) -> Tensor:
        """Keep the tensor; the result means nothing."""
        box.entries = tensor
        return tensor.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, tensor: Tensor, box: _Box) -> tuple[Tensor, None]:
        """Take all members at once."""
        box.mapped = True
        return _Entries.apply(tensor, box), None


def plain(tensor: Tensor) -> tuple[Tensor, bool]:
    """Return the entries of all members that vmap runs over, and whether it runs over this tensor.

    Args:
        tensor: of any shape; values alone are looked at, so that the shape of the result is free.
    """
    if not transforming():
        return tensor.detach(), False
    box = _Box()
    _Entries.apply(tensor.detach(), box)
    return box.entries, box.mapped


def refuse_mapping(name: str, tensor: Tensor) -> None:
    """Refuse vmap, where members may differ in the shape of their results.

    Raises:
        InputError: vmap runs over the tensor.
    """
    if plain(tensor)[1]:
        raise InputError(
            f"{name} cannot be mapped by torch.func.vmap: its members may need different numbers of "
            "bases; give them as one batch instead"
        )


def refuse_transforms(name: str, instead: str) -> None:
    """Refuse every transform.

    Raises:
        InputError: one is at work.
    """
    if transforming():
        raise InputError(f"{name} does not run under transforms of torch.func; use {instead} there")


def refuse_nested_forward_mode() -> None:
    """Refuse forward mode over forward mode, where torch loses the outer tangents of own operations.

    Raises:
        ConvBasisError: two such transforms are at work.
    """
    stack = torch._C._functorch.get_interpreter_stack() or []
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1:
        raise ConvBasisError(
            "forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) is not available; use "
            "reverse mode for the inner one: jacfwd of jacrev, or torch.func.hessian"
        )


def no_forward_mode(name: str) -> ConvBasisError:
    """Return the error of a function without forward-mode derivatives."""
    return ConvBasisError(
        f"{name} has no forward-mode derivative (jvp, jacfwd, hessian); use reverse mode: grad, vjp or "
        "jacrev"
    )


class _Final(torch.autograd.Function):
    """A gradient that refuses to be differentiated again, rather than passing for a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        """Return the gradient."""
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the name."""
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise second_derivative(ctx.name)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Refuse."""
        raise second_derivative(ctx.name)


def second_derivative(name: str) -> ConvBasisError:
    """Return the error of a function without second derivatives."""
    return ConvBasisError(
        f"the gradient of {name} was differentiated once more; only first derivatives are implemented: "
        "detach the gradient, or use exact attention where second ones are needed"
    )


def final(name: str, gradient: Tensor, *sources: Tensor) -> Tensor:
    """Return a gradient that raises `ConvBasisError` when it is differentiated.

    Args:
        name: of the function whose gradient it is.
        gradient: computed without a graph.
        sources: everything that it depends on.
    """
    return _Final.apply(name, gradient, *sources)
