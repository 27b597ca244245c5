"""hybrid_attention: exact attention over a few keys of each query, and a far field for the rest."""

from __future__ import annotations

from torch import Tensor

from ..checks import (
    check_finite,
    check_mask,
    check_qkv,
    check_scale,
    describe,
)
from ..errors import InputError
from ..transforms import refuse_transforms, seen_through
from .heads import HybridStats, attend_heads
from .operation import HybridFunction
from .settings import Settings, check_settings


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = 256,
    sinks: int = 4,
    columns: int = 64,
    blocks: int = 0,
    far_field: str = "none",
    num_segments: int = 128,
    key_weights: bool = False,
    samples: int = 64,
    scale: float | None = None,
    is_causal: bool = True,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    seed: int = 0,
    strict: bool = False,
    correction: bool = False,
) -> Tensor:
    """Return causal softmax attention that is exact on a few keys of each query; the others are far.

    Each query attends exactly to a local window, to the first tokens, to the heaviest columns of its
    head, and to the blocks of 64 keys that are heaviest for its block of 128 queries. The far field
    stands for all other keys, under the same normaliser. On a trained model's heads this is close to
    exact attention where `conv_basis_attention` is not; `hybrid_attention_stats` tells how close.

    Args:
        query: ``(B, H, n, d)``; float64, float32, bfloat16 or float16.
        key: ``(B, H_kv, n, d)``, same dtype and device.
        value: ``(B, H_kv, n, d_v)``, same dtype and device.
        window: the latest keys that a query sees, in tokens, its own included. With columns or segments
            it reaches back to the edge of a block, up to 126 tokens more, which costs nothing; with
            blocks up to 190 more, strictly 126.
        sinks: first tokens that every query sees.
        columns: heaviest single keys that every later query of a head sees, found from sampled rows.
        blocks: blocks of 64 keys for each block of 128 queries, found from four rows of each; in the
            mean over a head, in which those that need more get up to four times as many. With
            strict=True for each block of 64 queries, and to each as many.
        far_field: the keys that are left: ``"none"``, dropped; ``"segments"``, seen as means of
            segments; ``"conv"``, seen through one convolution between row and column factors;
            ``"lowrank"``, seen through a polynomial of their logits against their mean, between
            such factors. The last two cannot leave out what blocks see, so that blocks must be 0.
        num_segments: at most that many segments, of whole blocks.
        key_weights: weigh the keys of a segment, and the segments, by what sampled rows look at.
        samples: rows of exact attention for columns and fits; the estimate takes twice as many others,
            strictly at most one in 8.
        scale: factor of the logits; ``1/sqrt(d)`` by default.
        is_causal: must be True.
        enable_gqa: allow H to be a multiple of H_kv.
        key_padding_mask: bool ``(B, n)``, True for a real token. Positions are counted in real tokens:
            each sequence gives what it gives without its padding. Rows at padding are 0.
        seed: of all samples; the same input gives the same output.
        strict: choose for each query from earlier tokens alone, see below; without ``"conv"``,
            ``"lowrank"`` and correction, and with ``samples / 8`` sampled rows for each 512 tokens.
        correction: compute four rows of each 128 exactly, and add their mean difference, interpolated,
            to the rows between them.

    Returns:
        ``(B, H, n, d_v)``, dtype and device of the query. Differentiable with respect to query, key and
        value, what was chosen and fitted taken as constant.

    Raises:
        InputError: shapes, dtypes or options that do not fit; NaN or Inf in a real token.

    Causality:
        Columns, blocks and fits look at later queries: for prompts, of which only what comes after is
        used, not for training. With strict=True row i depends on tokens 0..i alone: columns and key
        weights are made for stretches of 512 tokens from rows of the stretches before, blocks chosen
        from rows of the block of queries before. What a prompt looks at is then found one stretch, or
        one block, later; where there is more than a window and first tokens, the first 512 are exact.
        `HybridState` gives the same in chunks.

    Complexity:
        O(n w (d + d_v)) time for w keys of each query, plus O(n^2 d / 32) for the choice of blocks and
        as much again for correction, plus O(s n d) for s samples, with strict=True for s of each
        4,096 tokens, and O(n^2 d / 512) for segments. O(n (d + d_v)) memory; ``"conv"`` and
        ``"lowrank"`` take s n numbers more for each head that is at work: on a processor one for each
        thread.

    Source:
        "Near and far keys" of docs/mathematics.md.

    Example:
        >>> import torch, convbasis as cb
        >>> q, k, v = torch.randn(3, 1, 2, 500, 16).unbind()
        >>> cb.hybrid_attention(q, k, v, window=64, columns=16, blocks=1).shape
        torch.Size([1, 2, 500, 16])
    """
    settings = Settings(
        window,
        sinks,
        columns,
        blocks,
        far_field,
        num_segments,
        key_weights,
        samples,
        seed,
        strict,
        correction,
    )
    tensors = _checked(query, key, value, settings, is_causal, enable_gqa, key_padding_mask)
    factor = check_scale(scale, query.shape[-1])
    if seen_through(*tensors):
        output: Tensor = HybridFunction.apply(*tensors, key_padding_mask, settings, factor)
        return output
    return attend_heads(*tensors, settings, factor, key_padding_mask, False)[0].output


def hybrid_attention_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = 256,
    sinks: int = 4,
    columns: int = 64,
    blocks: int = 0,
    far_field: str = "none",
    num_segments: int = 128,
    key_weights: bool = False,
    samples: int = 64,
    scale: float | None = None,
    is_causal: bool = True,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    seed: int = 0,
    strict: bool = False,
    correction: bool = False,
) -> HybridStats:
    """Return `hybrid_attention` with its log-sum-exp, an estimate of its error, and what ran.

    Args, errors, causality and cost are those of `hybrid_attention`; the estimate takes O(s n d) more.

    Returns:
        `HybridStats`.

    Example:
        >>> import torch, convbasis as cb
        >>> q, k, v = torch.randn(3, 1, 2, 500, 16).unbind()
        >>> cb.hybrid_attention_stats(q, k, v, window=64).error_estimate.shape
        torch.Size([1, 2])
    """
    refuse_transforms("hybrid_attention_stats", "hybrid_attention")
    settings = Settings(
        window,
        sinks,
        columns,
        blocks,
        far_field,
        num_segments,
        key_weights,
        samples,
        seed,
        strict,
        correction,
    )
    tensors = _checked(query, key, value, settings, is_causal, enable_gqa, key_padding_mask)
    factor = check_scale(scale, query.shape[-1])
    return attend_heads(*tensors, settings, factor, key_padding_mask, True)[0]


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: Settings,
    is_causal: bool,
    enable_gqa: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check everything, and return the tensors."""
    check_qkv(query, key, value, enable_gqa)
    if is_causal is not True:
        raise InputError(f"is_causal={describe(is_causal)}: hybrid attention is causal")
    check_settings(settings)
    check_mask(mask, query.shape[0], query.shape[2], query.device)
    relevant = None if mask is None else mask[:, None, :, None]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_finite(name, tensor, relevant)
    return query, key, value
