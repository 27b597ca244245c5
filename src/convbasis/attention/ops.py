"""Attention as opaque operators, so that it can be compiled, exported and differentiated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..convolve import DEFAULT_MAX_BYTES
from ..transforms import as_batch, final, no_forward_mode
from .backward import conv_basis_bwd
from .call import Biases, Options, attend, folded
from .gradients import Wanted
from .segments import check_segments


@torch.library.custom_op("convbasis::attention", mutates_args=())
def attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    key_padding_mask: Tensor | None,
    key_bias: Tensor | None,
    lag_bias: Tensor | None,
    num_bases: int | None,
    segment_length: int | None,
    window: int,
    delta: float | None,
    epsilon: float,
    search: str,
    scale: float,
    backend: str,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output ``(B, H, n, d_v)``, lse ``(B, H, n)`` and the starts used ``(B, H, k)``.

    k is the number of starts given, of uniform segments, or num_bases; unused starts are n.
    """
    batch, heads, n, _ = query.shape
    request = check_segments(
        batch,
        heads,
        n,
        query.device,
        num_bases=num_bases,
        starts=starts,
        segment_length=segment_length,
        window=window,
        delta=delta,
        epsilon=epsilon,
        search=search,
        warn=False,
    )
    biases, options = Biases(key_bias, lag_bias), Options(scale, backend, max_bytes)
    call = attend(query, key, value, request, key_padding_mask, biases, options)
    missing = _num_starts(n, starts, num_bases, segment_length) - call.starts.shape[-1]
    used = torch.nn.functional.pad(call.starts, (0, missing), value=n)
    return call.output.contiguous(), call.lse.contiguous(), used.clone()


@attention_op.register_fake
def _(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    starts,
    key_padding_mask,
    key_bias,
    lag_bias,
    num_bases,
    segment_length,
    *_options,
):
    batch, heads, n, _ = query.shape
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    count = _num_starts(n, starts, num_bases, segment_length)
    return (
        query.new_empty((batch, heads, n, value.shape[-1])),
        query.new_empty((batch, heads, n), dtype=work),
        query.new_empty((batch, heads, count), dtype=torch.int64),
    )


def _num_starts(
    n: int, starts: Tensor | None, num_bases: int | None, segment_length: int | None
) -> int:
    if starts is not None:
        return starts.shape[-1]
    if segment_length is not None:
        return -(-n // segment_length)
    return num_bases or 1


@torch.library.custom_op("convbasis::attention_backward", mutates_args=())
def attention_backward_op(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    starts: Tensor,
    key_padding_mask: Tensor | None,
    key_bias: Tensor | None,
    lag_bias: Tensor | None,
    scale: float,
    gradient: str,
    backend: str,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `attention_op` with respect to query, key, value and the biases.

    Those of biases that were not given are empty.
    """
    inputs = folded(query, key, value, key_padding_mask, Biases(key_bias, lag_bias), scale)
    shape = inputs.query.shape[:2]
    inputs = inputs._replace(starts=starts.reshape(*shape, -1))
    with torch.autocast(query.device.type, enabled=False):
        grads = conv_basis_bwd(
            inputs,
            output.reshape(*shape, *output.shape[2:]),
            lse.reshape(*shape, -1),
            grad_output.reshape(*shape, *output.shape[2:]),
            grad_lse.reshape(*shape, -1),
            Wanted(
                gradient,
                lag_bias is not None,
                backend,
                DEFAULT_MAX_BYTES if max_bytes is None else max_bytes,
            ),
        )
    tensors = (query, key, value, key_bias, lag_bias)
    results = [
        query.new_empty(0)
        if tensor is None or grad is None
        else grad.reshape(tensor.shape).to(tensor.dtype).contiguous()
        for grad, tensor in zip(grads, tensors, strict=True)
    ]
    return results[0], results[1], results[2], results[3], results[4]


@attention_backward_op.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output,
    grad_lse,
    query,
    key,
    value,
    output,
    lse,
    starts,
    key_padding_mask,
    key_bias,
    lag_bias,
    *_options,
):
    return tuple(
        query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (query, key, value, key_bias, lag_bias)
    )


@attention_backward_op.register_vmap
def _(info, in_dims, *args):  # type: ignore[no-untyped-def]
    # Whatever is a tensor has the batch first.
    folded_args = [
        as_batch(arg, dim, info.batch_size) if isinstance(arg, Tensor) else arg
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    found = attention_backward_op(*folded_args)
    results = [x.unflatten(0, (info.batch_size, -1)) if x.numel() else x for x in found]
    return tuple(results), tuple(0 if x.numel() else None for x in found)


class ConvBasisAttentionFunction(torch.autograd.Function):
    """Save for the backward pass, and restore."""

    @staticmethod
    def forward(  # one by one: a compiler would take variable arguments for an old-style context
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor | None,
        mask: Tensor | None,
        key_bias: Tensor | None,
        lag_bias: Tensor | None,
        num_bases: int | None,
        segment_length: int | None,
        window: int,
        delta: float | None,
        epsilon: float,
        search: str,
        scale: float,
        backend: str,
        max_bytes: int | None,
        gradient: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run `attention_op`."""
        with torch.no_grad():
            return attention_op(
                query,
                key,
                value,
                starts,
                mask,
                key_bias,
                lag_bias,
                num_bases,
                segment_length,
                window,
                delta,
                epsilon,
                search,
                scale,
                backend,
                max_bytes,
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Save the inputs, the results and the segments."""
        query, key, value, _, mask, key_bias, lag_bias, *_, scale, backend, max_bytes, gradient = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(query, key, value, mask, key_bias, lag_bias, *output)
        ctx.options = scale, gradient, backend, max_bytes

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Run `attention_backward_op`."""
        query, key, value, mask, key_bias, lag_bias, output, lse, starts = ctx.saved_tensors
        with torch.no_grad():
            found = attention_backward_op(
                grads[0],
                grads[1],
                query,
                key,
                value,
                output,
                lse,
                starts,
                mask,
                key_bias,
                lag_bias,
                *ctx.options,
            )
        if torch.is_grad_enabled():  # somebody may want to differentiate once more
            sources = [x for x in (*grads[:2], query, key, value, key_bias, lag_bias) if x is not None]
            found = [final("conv_basis_attention", grad, *sources) for grad in found]
        of_key_bias = None if key_bias is None else found[3]
        of_lag_bias = None if lag_bias is None else found[4]
        return (*found[:3], None, None, of_key_bias, of_lag_bias, *(None,) * 10)


class TransformedAttentionFunction(ConvBasisAttentionFunction):
    """The same for `torch.func`; a compiler takes no function with rules of its own for that."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse."""
        raise no_forward_mode("conv_basis_attention")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Take what is mapped over as more sequences of the batch."""
        size = info.batch_size
        query, key, value, starts, *more = (
            as_batch(arg, dim, size) if index != 3 else arg
            for index, (arg, dim) in enumerate(zip(args[:7], in_dims[:7], strict=True))
        )
        if starts is not None and starts.ndim > 1:
            starts = starts.repeat(size, 1, 1)
        results = TransformedAttentionFunction.apply(query, key, value, starts, *more, *args[7:])
        return tuple(x.unflatten(0, (size, -1)) for x in results), (0, 0, 0)
