"""conv_basis_attention: causal softmax attention whose logits are replaced by a conv basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..basis import ConvBasis
from ..checks import (
    check_float_tensor,
    check_gradient,
    check_mask,
    check_positive_int,
    check_qkv,
    check_scale,
    describe,
)
from ..dispatch import Dispatch, check_backend, last_dispatch, merged, record_dispatch
from ..errors import InputError
from ..transforms import refuse_transforms, seen_through
from .call import Biases, Options, attend, folded
from .documents import Document, check_documents, cut, document_starts, grouped, joined
from .ops import ConvBasisAttentionFunction, TransformedAttentionFunction
from .segments import check_segments, starts_tensor

# Tensors that need no operator to be seen through: no tracing, no vmap, no subclass of its own ways.
_PLAIN = (Tensor, torch.nn.Parameter)


class AttentionStats(NamedTuple):
    """Attention output with what is known about it."""

    output: Tensor
    """``(B, H, n, d_v)``, dtype of the query."""
    lse: Tensor
    """``(B, H, n)`` natural log of the normaliser; -inf where no key is visible."""
    basis: ConvBasis
    """The conv basis of the logits without `key_bias`, batch ``(B, H)``, with the starts in use."""
    error_estimate: Tensor | None
    """None: the approximation error is not estimated."""
    dispatch: Dispatch
    """What ran, and how many rows and heads were evaluated directly."""


def conv_basis_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_bases: int | None = None,
    starts: Tensor | Sequence[int] | None = None,
    segment_length: int | None = None,
    window: int = 1,
    delta: float | None = None,
    epsilon: float = 0.0,
    search: str = "linear",
    scale: float | None = None,
    is_causal: bool = True,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    lag_bias: Tensor | None = None,
    document_lengths: Sequence[int] | None = None,
    gradient: str = "forward",
    backend: str = "auto",
    max_bytes: int | None = None,
) -> Tensor:
    """Return causal softmax attention with the logits replaced by a conv basis.

    The keys are split into k contiguous segments; in segment r, which begins at key s, the logit of
    query i and key j is taken to be ``scale · q[s + i - j]·k[s]``. This is exact where the logits
    have that structure, and an approximation elsewhere, whose error can be of any size.
    The segments are chosen by exactly one of `starts`, `segment_length` and `num_bases`.

    Args:
        query: ``(B, H, n, d)``; float64, float32, bfloat16 or float16.
        key: ``(B, H_kv, n, d)``, same dtype and device.
        value: ``(B, H_kv, n, d_v)``, same dtype and device.
        num_bases: recover at most this many segments for each head (see `recover`). Beside `starts`
            it must equal their number.
        starts: integers ``(k,)`` for all heads or ``(B, H, k)``: first key of each segment, the first
            one 0, strictly increasing; n fills up shorter ones in ``(B, H, k)``.
        segment_length: uniform segments of this many tokens.
        window: for recovered segments, the number of lags compared, in tokens.
        delta: for recovered segments, the least distance of two segments, in nats.
        epsilon: for recovered segments, a known bound on the errors of the logits, in nats.
        search: for recovered segments, ``"linear"`` or ``"binary"``.
        scale: factor of the logits; ``1/sqrt(d)`` by default.
        is_causal: must be True.
        enable_gqa: allow H to be a multiple of H_kv; each key-value head then serves H / H_kv
            consecutive query heads.
        key_padding_mask: bool ``(B, n)``, True for a real token. Padding keys vanish from numerator and
            normaliser; a segment that begins in padding takes its first real key. Entries of query,
            key and value at padding are never used: rows before the first and after the last real
            token are 0; where padding stands between real tokens, its queries count as 0.
        key_bias: ``(B, H, n)``, or what broadcasts to it, in nats: added to the logits of each key,
            which scales columns of the attention matrix. Not used at padding.
        lag_bias: ``(B, H, n)``, or what broadcasts to it, in nats: added to the logits by lag, query
            position minus key position.
        document_lengths: tokens of the documents that are packed one after the other, the same in all
            sequences of the batch; they add up to n. Segments begin anew in each, and no value or
            gradient crosses a border; `lag_bias` counts from the query as ever. `starts` must then be
            ``(k,)`` and hold the first token of each document.
        gradient: what the backward pass computes. ``"forward"``: the gradient of this very function, in
            which queries and the keys at segment starts get gradients; for models that are trained with
            a conv basis. ``"attention"``: the gradient of exact attention with these attention weights
            in place of its own (the paper's), which reaches every query and key; d_v times as much
            work. That of value is the same in both.
        backend: ``"partitioned"``, transforms of blocks; ``"direct"``, the matrix laid out some rows
            at a time, O(n^2); ``"fft"``, one transform of full length per basis; ``"reference"``,
            each row summed for itself in float64, O(n^2); or ``"auto"``, the least modelled time for
            these shapes. It changes how, never what is computed.
        max_bytes: bound on the working memory of the transforms, in bytes; 1 GiB by default.

    Returns:
        ``(B, H, n, d_v)``, dtype and device of the query; 0 for rows that see no key. Half types are
        computed in float32; under autocast the result has autocast's dtype. Differentiable once with
        respect to query, key, value and the biases, with the starts as constants; what was saved is of
        O(n d) size. `torch.compile` sees one opaque operator.

    Raises:
        InputError: (a ValueError) shapes, heads, dtypes, devices or options that do not fit; NaN or
            Inf in a real token; ``is_causal=False``.
        ConvBasisError: a gradient is differentiated once more.

    Causality:
        With `starts` or `segment_length` row i depends on tokens 0..i alone (up to the rounding of a
        transform). Recovered starts look ahead: a window of T lags sees T - 1 tokens more, and
        ``search="binary"`` or ``delta=None`` see everything; only the linear scan with ``window=1``
        and a given delta is causal.

    Accuracy:
        Worst row within 1e-4 (float32) or 1e-9 (float64) of the same conv basis evaluated directly,
        except where its terms cancel so far that a direct float64 sum would lose as much.
        Rows that would drown in the rounding of a transform are found and evaluated directly from
        the kernels; a float32 head that loses more than 2 % of its rows is transformed in float64,
        and one that still loses more is evaluated directly as a whole, which is logged as a warning.
        `last_dispatch` counts all of them.

    Complexity:
        O(n d_v log(n/k) + k n (d + d_v + log(n/k))) time and O(n (d + d_v)) memory for each head,
        within max_bytes beside inputs and result, for segments alike in length; direct heads take
        O(n^2) time. The backward pass takes about twice as much time and O(k n) memory more; with
        ``gradient="attention"`` d_v times as much, or O(n^2 (d + d_v)) where that is less.

    Source:
        F2 to F5 and "Gradients" of docs/mathematics.md; Conv-Basis (arXiv 2405.05219), Algorithm 1.

    Example:
        >>> import torch, convbasis as cb
        >>> q, k, v = torch.randn(3, 1, 2, 300, 16).unbind()
        >>> cb.conv_basis_attention(q, k, v, segment_length=64).shape
        torch.Size([1, 2, 300, 16])
    """
    call = _attend(
        query,
        key,
        value,
        num_bases=num_bases,
        starts=starts,
        segment_length=segment_length,
        window=window,
        delta=delta,
        epsilon=epsilon,
        search=search,
        scale=scale,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        key_padding_mask=key_padding_mask,
        key_bias=key_bias,
        lag_bias=lag_bias,
        document_lengths=document_lengths,
        gradient=gradient,
        backend=backend,
        max_bytes=max_bytes,
    )
    return call[0]


def conv_basis_attention_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_bases: int | None = None,
    starts: Tensor | Sequence[int] | None = None,
    segment_length: int | None = None,
    window: int = 1,
    delta: float | None = None,
    epsilon: float = 0.0,
    search: str = "linear",
    scale: float | None = None,
    is_causal: bool = True,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    lag_bias: Tensor | None = None,
    document_lengths: Sequence[int] | None = None,
    gradient: str = "forward",
    backend: str = "auto",
    max_bytes: int | None = None,
) -> AttentionStats:
    """Return `conv_basis_attention` with its log-sum-exp, conv basis and record of what ran.

    Args, errors, causality, accuracy and cost are those of `conv_basis_attention`; `document_lengths`
    is refused, since packed documents are no single conv basis.

    Returns:
        `AttentionStats`.

    Source:
        F2 to F5.

    Example:
        >>> import torch, convbasis as cb
        >>> q, k, v = torch.randn(3, 1, 2, 300, 16).unbind()
        >>> cb.conv_basis_attention_stats(q, k, v, num_bases=4).basis.shape
        torch.Size([1, 2, 300, 300])
    """
    refuse_transforms("conv_basis_attention_stats", "conv_basis_attention")
    if document_lengths is not None:
        raise InputError(
            "document_lengths was given, but packed documents are not one conv basis; call this "
            "function for each document, or conv_basis_attention for all"
        )
    output, lse, used = _attend(
        query,
        key,
        value,
        num_bases=num_bases,
        starts=starts,
        segment_length=segment_length,
        window=window,
        delta=delta,
        epsilon=epsilon,
        search=search,
        scale=scale,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        key_padding_mask=key_padding_mask,
        key_bias=key_bias,
        lag_bias=lag_bias,
        document_lengths=None,
        gradient=gradient,
        backend=backend,
        max_bytes=max_bytes,
    )
    batch, heads, n, _ = query.shape
    dispatch = last_dispatch()
    assert dispatch is not None
    with torch.autocast(query.device.type, enabled=False):
        # Unused bases at the end are left away where all heads have them.
        used = used[..., : max(1, int((used < n).sum(-1).max()))]
        biases = Biases(None, expanded_bias("lag_bias", lag_bias, query))
        factor = check_scale(scale, query.shape[-1])
        inputs = folded(query, key, value, key_padding_mask, biases, factor)
        clean = inputs._replace(starts=used.reshape(*inputs.query.shape[:2], -1)).cleaned()
        logits = clean.logits().view(batch, heads, -1, n)
        kept = logits.masked_fill(logits == -torch.inf, 0.0)  # outside the matrix, and padding
    return AttentionStats(output, lse, ConvBasis._trusted(kept, used), None, dispatch)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_bases: int | None,
    starts: Tensor | Sequence[int] | None,
    segment_length: int | None,
    window: int,
    delta: float | None,
    epsilon: float,
    search: str,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
    key_padding_mask: Tensor | None,
    key_bias: Tensor | None,
    lag_bias: Tensor | None,
    document_lengths: Sequence[int] | None,
    gradient: str,
    backend: str,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check what shapes and options can tell, and run: output, lse and starts ``(B, H, k)``.

    The operator is what can be compiled and differentiated; a plain call does without.
    """
    result = autocast_dtype(query)
    if result is not None:
        # As torch's own operators, but nothing is rounded before the result is.
        query, key, value = (
            tensor.float() if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor
            for tensor in (query, key, value)
        )
    check_qkv(query, key, value, enable_gqa)
    if is_causal is not True:
        raise InputError(
            f"is_causal={describe(is_causal)}: a conv basis is lower triangular, so attention is "
            "causal; leave is_causal=True"
        )
    factor = check_scale(scale, query.shape[-1])
    check_backend(backend)
    if max_bytes is not None:
        check_positive_int("max_bytes", max_bytes, "a number of bytes")
    check_mask(key_padding_mask, query.shape[0], query.shape[2], query.device)
    key_bias = expanded_bias("key_bias", key_bias, query)
    lag_bias = expanded_bias("lag_bias", lag_bias, query)
    check_gradient(gradient)
    if document_lengths is not None:
        return _packed(
            check_documents(document_lengths, query.shape[2]),
            (query, key, value, key_padding_mask, key_bias, lag_bias),
            starts,
            num_bases=num_bases,
            segment_length=segment_length,
            window=window,
            delta=delta,
            epsilon=epsilon,
            search=search,
            scale=scale,
            is_causal=is_causal,
            enable_gqa=enable_gqa,
            gradient=gradient,
            backend=backend,
            max_bytes=max_bytes,
        )
    begins = starts
    operation: type[ConvBasisAttentionFunction] = TransformedAttentionFunction
    if torch.compiler.is_compiling():  # a graph takes options as they are; the operator checks them
        begins = starts_tensor(starts, query.device)
        operation = ConvBasisAttentionFunction
    else:
        request = check_segments(
            query.shape[0],
            query.shape[1],
            query.shape[2],
            query.device,
            num_bases=num_bases,
            starts=starts,
            segment_length=segment_length,
            window=window,
            delta=delta,
            epsilon=epsilon,
            search=search,
        )
        begins = None if starts is None else request.starts
        tensors = [x for x in (query, key, value, key_bias, lag_bias) if x is not None]
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        recorded = recorded or seen_through(*tensors)
        if not recorded and all(type(tensor) in _PLAIN for tensor in tensors) and not query.is_meta:
            biases, options = Biases(key_bias, lag_bias), Options(factor, backend, max_bytes)
            call = attend(query, key, value, request, key_padding_mask, biases, options)
            output = call.output if result is None else call.output.to(result)
            return output, call.lse, call.starts
    output, lse, used = operation.apply(
        query,
        key,
        value,
        begins,
        key_padding_mask,
        key_bias,
        lag_bias,
        num_bases,
        segment_length,
        window,
        delta,
        epsilon,
        search,
        factor,
        backend,
        max_bytes,
        gradient,
    )
    return (output if result is None else output.to(result)), lse, used


def autocast_dtype(query: object) -> torch.dtype | None:
    """Return the dtype that results have under autocast; None where autocast has no say."""
    if not isinstance(query, Tensor) or not query.is_floating_point() or query.dtype == torch.float64:
        return None
    kind = query.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _packed(
    lengths: list[int],
    tensors: tuple[Tensor | None, ...],
    starts: object,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to each document by itself, those of a length together."""
    query, key, value, mask, key_bias, lag_bias = tensors
    assert query is not None
    assert key is not None
    assert value is not None
    n = query.shape[2]
    own_starts = None if starts is None else document_starts(starts, lengths, query.device)
    results: dict[Document, tuple[Tensor, Tensor]] = {}
    ran: list[Dispatch] = []
    for documents in grouped(lengths, apart=own_starts is not None):
        length = documents[0].stop - documents[0].start
        output, lse, _ = _attend(
            cut(query, documents, 2),
            cut(key, documents, 2),
            cut(value, documents, 2),
            key_padding_mask=cut(mask, documents, 1),
            key_bias=cut(key_bias, documents, 2),
            lag_bias=cut(lag_bias, [Document(0, length)] * len(documents), 2),
            starts=None if own_starts is None else own_starts[documents[0]],
            document_lengths=None,
            **options,
        )
        record = last_dispatch()
        if record is not None:
            ran.append(record)
        parts = zip(output.chunk(len(documents)), lse.chunk(len(documents)), strict=True)
        results.update(zip(documents, parts, strict=True))
    if ran and not torch.compiler.is_compiling():
        record_dispatch(merged(ran, len(lengths)))
    output, lse = (joined(results, index) for index in (0, 1))
    used = torch.zeros((*query.shape[:2], 0), dtype=torch.int64, device=query.device)
    assert output.shape[2] == n
    return output, lse, used


def expanded_bias(name: str, bias: object, query: Tensor) -> Tensor | None:
    """Return a bias as ``(B, H, n)``, without a copy."""
    if bias is None:
        return None
    tensor = check_float_tensor(name, bias)
    shape = query.shape[:3]
    if tensor.device != query.device:
        raise InputError(f"{name} is on {tensor.device} but query is on {query.device}")
    try:
        fits = torch.broadcast_shapes(tensor.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits or not tensor.ndim or tensor.shape[-1] != shape[-1]:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}; {tuple(shape)} or what broadcasts to it is "
            f"wanted: ({shape[1]}, {shape[2]}) say, with an entry for each of the {shape[2]} tokens"
        )
    return tensor.expand(shape)
