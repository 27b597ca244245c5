"""One call of attention, checked: segments, forward pass, and the record of what ran."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_finite, compute_dtype
from ..convolve import DEFAULT_MAX_BYTES
from ..convolve.segments import lag_mask
from ..dispatch import Dispatch, record_dispatch
from ..errors import InputError
from .forward import Inputs, choose_for, conv_basis_fwd
from .segments import SegmentRequest, last_tokens, resolve_starts


class Options(NamedTuple):
    """How attention is computed, beside the segments."""

    scale: float
    backend: str
    max_bytes: int | None


class Biases(NamedTuple):
    """What is added to the logits, in nats; ``(B, H, n)`` each, or None."""

    key: Tensor | None = None
    lag: Tensor | None = None


class Call(NamedTuple):
    """What one call computed."""

    output: Tensor  # (B, H, n, d_v)
    lse: Tensor  # (B, H, n)
    starts: Tensor  # (B, H, k), maybe expanded
    dispatch: Dispatch


def folded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    biases: Biases,
    scale: float,
) -> Inputs:
    """Return the inputs with each key-value head as a problem, without copies; starts are not set."""
    heads, kv_heads = query.shape[1], key.shape[1]
    by_key, by_lag = (
        None if bias is None else bias.unflatten(1, (kv_heads, heads // kv_heads)).flatten(0, 1)
        for bias in biases
    )
    return Inputs(
        query.unflatten(1, (kv_heads, heads // kv_heads)).flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        torch.zeros((1, 1, 1), dtype=torch.int64, device=query.device),
        None if mask is None else mask.repeat_interleave(kv_heads, dim=0),
        scale,
        compute_dtype(query.dtype),
        by_key,
        by_lag,
        None if mask is None else last_tokens(mask).repeat_interleave(kv_heads),
    )


@torch.no_grad()
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    request: SegmentRequest,
    key_padding_mask: Tensor | None,
    biases: Biases,
    options: Options,
) -> Call:
    """Compute attention; shapes and options are known to fit, values are checked here."""
    batch, heads, n, _ = query.shape
    budget = DEFAULT_MAX_BYTES if options.max_bytes is None else options.max_bytes
    mask = key_padding_mask
    if mask is not None and bool(mask.all()):
        mask = None
    with torch.autocast(query.device.type, enabled=False):
        tokens = None if mask is None else mask[:, None, :, None]
        largest = [
            check_finite(name, tensor, tokens)
            for name, tensor in (("query", query), ("key", key), ("value", value))
        ]
        more = 0.0
        for name, bias in (("key_bias", biases.key), ("lag_bias", biases.lag)):
            if bias is not None:
                relevant = mask[:, None] if mask is not None and name == "key_bias" else None
                more += check_finite(name, bias, relevant)
        inputs = folded(query, key, value, mask, biases, options.scale)
        if request.starts is None or mask is not None:
            clean = inputs.cleaned()
            used = resolve_starts(request, clean.query, clean.key, options.scale, clean.real)
        else:
            used = resolve_starts(request, inputs.query, inputs.key, options.scale, None)
        inputs = inputs._replace(starts=used)
        _check_logits(inputs, largest[0] * largest[1], more)
        choice = choose_for(inputs, options.backend)
        forward = conv_basis_fwd(inputs, choice, result=query.dtype, max_bytes=budget)
    record_dispatch(forward.dispatch)
    output = forward.output.view(batch, heads, n, value.shape[-1])
    shared = used.shape[:2] == (1, 1)
    used = used.expand(batch, heads, -1) if shared else used.reshape(batch, heads, -1)
    return Call(output, forward.lse.view(batch, heads, n), used, forward.dispatch)


def _check_logits(inputs: Inputs, largest: float, more: float) -> None:
    """Check that no logit overflows, given the product of the largest entries of query and key, and the
    sum of the largest biases."""
    bound = largest * inputs.query.shape[-1] * max(1.0, abs(inputs.scale)) + more
    if bound < torch.finfo(inputs.work).max / 4:
        return
    clean = inputs.cleaned()
    logits = clean.logits()
    stop = None if clean.stop is None else clean.stop[:, None, None]
    outside = ~lag_mask(clean.starts, logits.shape[-1], stop)
    if not bool((logits.isfinite() | outside).all()):
        raise InputError(
            f"the logits scale·query·key overflow {inputs.work} (scale={inputs.scale}); make query and "
            "key smaller"
        )
