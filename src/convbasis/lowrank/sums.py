"""Attention whose weights are a sum of matrices, each with its own algorithm, under one normaliser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checks import (
    check_alike,
    check_finite,
    check_float_tensor,
    check_qkv,
    check_scale,
    compute_dtype,
    describe,
)
from ..errors import InputError
from ..transforms import refuse_transforms

_ENTRIES = 1 << 21  # numbers in gathered keys and values at a time


class Part(NamedTuple):
    """Attention by one part of the weights; the stats of other attentions serve as well."""

    output: Tensor
    """``(..., n, d_v)``, averages with the part's own normaliser."""
    lse: Tensor
    """``(..., n)`` natural log of that normaliser; -inf where the part has no weight."""


def merge_parts(parts: Sequence[tuple[Tensor, Tensor]]) -> Part:
    """Return attention whose weights are the sum of the parts' weights, under one normaliser.

    Parts may be over disjoint keys, as exact attention over a window and an approximation of the rest,
    or over the same ones: what is added up are weights and weighted values. Each part is an average and
    the logarithm of its normaliser, as `conv_basis_attention_stats`, `hybrid_attention_stats`,
    `lowrank_attention_stats` and `sparse_attention_stats` return them.

    Args:
        parts: pairs of an output ``(..., n, d_v)`` and a log-sum-exp ``(..., n)``, alike in shape,
            dtype of outputs and device.

    Returns:
        `Part`; 0 and -inf for rows without weight in any part. Differentiable with respect to both.

    Raises:
        InputError: no part, or shapes that differ.

    Source:
        "Near and far keys" of docs/mathematics.md: ``output = sum of exp(lse_p - lse) output_p``.

    Example:
        >>> import torch
        >>> from convbasis.lowrank import merge_parts
        >>> two = torch.tensor(2.0).log().view(1)
        >>> merged = merge_parts([(torch.ones(1, 1), two), (torch.zeros(1, 1), torch.zeros(1))])
        >>> merged.output, merged.lse.exp()
        (tensor([[0.6667]]), tensor([3.]))
    """
    if not parts:
        raise InputError("parts is empty; one pair of an output and a log-sum-exp at least is wanted")
    (first, _), *_others = parts
    for output, lse in parts:
        check_float_tensor("an output", output)
        check_float_tensor("a log-sum-exp", lse)
        check_alike(first=first, output=output)
        if lse.device != first.device:
            raise InputError(f"a log-sum-exp is on {lse.device} but the outputs are on {first.device}")
        if output.shape != first.shape or lse.shape != first.shape[:-1]:
            raise InputError(
                f"a part has an output of shape {tuple(output.shape)} and a log-sum-exp of "
                f"{tuple(lse.shape)}; the first output has {tuple(first.shape)}: all must be alike"
            )
    sums = torch.stack([lse.to(compute_dtype(first.dtype)) for _, lse in parts])
    weighs = sums.detach().amax(0) > -torch.inf
    # Rows without weight are computed as if they had some, so that no gradient becomes NaN.
    safe = torch.where(weighs, sums, 0.0)
    lse = safe.logsumexp(0)
    shares = (safe - lse).exp()
    outputs = torch.stack([output.to(sums.dtype) for output, _ in parts])
    output = (shares[..., None] * outputs).sum(0).masked_fill(~weighs[..., None], 0.0)
    return Part(output.to(first.dtype), lse.masked_fill(~weighs, -torch.inf))


def sparse_attention_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Part:
    """Return exact attention of each query over a list of keys of its own.

    Args:
        query: ``(B, H, n, d)``; float64, float32, bfloat16 or float16.
        key: ``(B, H_kv, n, d)``, same dtype and device.
        value: ``(B, H_kv, n, d_v)``, same dtype and device.
        keys: integers ``(n, s)``, or ``(B, H, n, s)``: positions of keys, in each row each once; -1 for
            none. Keys later than the query count as well: leave them out where attention is causal.
        scale: factor of the logits; ``1/sqrt(d)`` by default.
        enable_gqa: allow H to be a multiple of H_kv.

    Returns:
        `Part`; 0 and -inf for a row that lists nothing. Differentiable with respect to query, key and
        value.

    Raises:
        InputError: (a ValueError) shapes or dtypes that do not fit; a position beyond the sequence, or
            twice in a row; NaN or Inf.

    Complexity: O(n s (d + d_v)) time.

    Example:
        >>> import torch
        >>> from convbasis.lowrank import sparse_attention_stats
        >>> q = k = v = torch.ones(1, 1, 3, 2)
        >>> lists = torch.tensor([[-1, -1], [0, -1], [0, 2]])
        >>> sparse_attention_stats(q, k, v, lists).lse[0, 0]
        tensor([  -inf, 1.4142, 2.1074])
    """
    refuse_transforms("sparse_attention_stats", "scaled_dot_product_attention with attn_mask")
    check_qkv(query, key, value, enable_gqa)
    batch, heads, n, d = query.shape
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_finite(name, tensor)
    if (
        not isinstance(keys, Tensor)
        or keys.dtype not in (torch.int64, torch.int32)
        or keys.shape[:-1] not in ((n,), (batch, heads, n))
    ):
        raise InputError(
            f"keys is {describe(keys)}; integers ({n}, s) or ({batch}, {heads}, {n}, s) are wanted"
        )
    if keys.numel() and not -1 <= int(keys.min()) <= int(keys.max()) < n:
        raise InputError(
            f"keys range over {int(keys.min())}..{int(keys.max())}; positions 0..{n - 1} are wanted, "
            "-1 for none"
        )
    ordered = keys.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise InputError("a row of keys lists a key twice; it would count twice")
    factor = check_scale(scale, d)
    work = compute_dtype(query.dtype)
    every = keys.to(query.device, torch.int64).expand(batch, heads, n, -1)
    rows = max(1, _ENTRIES // max(1, keys.shape[-1] * (d + value.shape[-1])))
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    outputs, sums = [], []
    with torch.autocast(query.device.type, enabled=False):
        for b in range(batch):
            for h in range(heads):
                own = h // (heads // key.shape[1])
                k, v = key[b, own].to(work), value[b, own].to(work)
                for low in range(0, n, rows):
                    q = query[b, h, low : low + rows].to(work) * factor
                    given = q, k, v, every[b, h, low : low + rows]
                    # Gathered keys are made anew by the backward pass.
                    output, lse = (
                        checkpoint(_over_lists, *given, use_reentrant=False, preserve_rng_state=False)
                        if differentiated
                        else _over_lists(*given)
                    )
                    outputs.append(output)
                    sums.append(lse)
    shape = (batch, heads, n)
    return Part(torch.cat(outputs).view(*shape, -1).to(query.dtype), torch.cat(sums).view(shape))


def _over_lists(query: Tensor, key: Tensor, value: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention of queries ``(m, d)`` over their lists ``(m, s)``, and its log-sum-exp."""
    at = keys.clamp(min=0).flatten()
    own_keys, values = (tensor.index_select(0, at).unflatten(0, keys.shape) for tensor in (key, value))
    logits = (own_keys @ query[..., None])[..., 0].masked_fill(keys < 0, -torch.inf)
    weighs = (keys >= 0).any(-1)
    logits = torch.where(weighs[:, None], logits, 0.0)
    lse = logits.logsumexp(-1)
    output = ((logits - lse[:, None]).exp()[:, None] @ values)[:, 0]
    return output.masked_fill(~weighs[:, None], 0.0), lse.masked_fill(~weighs, -torch.inf)
