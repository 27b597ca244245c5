"""conv_basis_attention over several ranks: heads, columns or spectra for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention import conv_basis_attention as attention_of_one
from ..attention.documents import check_documents, document_starts
from ..attention.functional import autocast_dtype, expanded_bias
from ..attention.segments import check_segments
from ..checks import (
    check_finite,
    check_float_tensor,
    check_gradient,
    check_positive_int,
    check_scale,
    compute_dtype,
    describe,
)
from ..dispatch import Dispatch, check_backend, last_dispatch, logger, record_dispatch
from ..errors import InputError
from .by_spectra import Given, attend_by_spectra
from .call import Tokens, begin, graph_of_its_own, opened, told
from .cost_spectra import spectra_pay
from .first_keys import first_real_keys, segment_logits_of, unit_keys
from .grid import Grid, grid_for
from .shares import Piece, Sizes, check_layout, for_heads, shares, whole_heads
from .transport import Part, Roads, gather_tokens, spread

_HALF = (torch.bfloat16, torch.float16)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def conv_basis_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: Any = None,
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
    layout: str = "auto",
    exchange: str = "auto",
    timeout: float = 300.0,
) -> Tensor:
    """Return `convbasis.conv_basis_attention` of a sequence whose tokens are spread over ranks.

    All ranks of the mesh call it together, each with its own tokens: the sequence is theirs in the
    order of the ranks. Each computes some heads for all tokens, or, where there are fewer heads than
    ranks, some value columns of a head; one exchange brings it what that takes, another brings every
    rank the output of its tokens. Many ranks of few heads exchange spectra of their tokens instead.
    Backward goes the same way back, so that all ranks must call it.

    Args:
        query: ``(B, H, m, d)``, of this rank's m tokens, which may differ from rank to rank and may be
            0; or a DTensor ``(B, H, n, d)`` that is Shard(2) in one dimension of its mesh.
        key: ``(B, H_kv, m, d)``, the same.
        value: ``(B, H_kv, m, d_v)``, the same.
        mesh: DeviceMesh of one dimension, the ranks; not needed with DTensors.
        num_bases: as all that follow, see `convbasis.conv_basis_attention`; the same in all ranks,
            apart from what is said here.
        starts: positions in the whole sequence.
        segment_length: uniform segments of this many tokens.
        window: for recovered segments.
        delta: for recovered segments.
        epsilon: for recovered segments.
        search: for recovered segments.
        scale: factor of the logits.
        is_causal: must be True.
        enable_gqa: allow H to be a multiple of H_kv.
        key_padding_mask: bool ``(B, m)``, of this rank's tokens.
        key_bias: ``(B, H, m)``, of this rank's tokens.
        lag_bias: ``(B, H, n)``, or what broadcasts to it, whole and the same in all ranks. Its gradient
            in a rank is of what that rank computes: the sum over the ranks is the gradient.
        document_lengths: of the whole sequence.
        gradient: ``"forward"`` or ``"attention"``.
        backend: as with one process.
        max_bytes: as with one process.
        layout: ``"heads"``, whole heads for each rank; ``"columns"``, value columns; ``"spectra"``,
            each rank transforms its tokens and multiplies some frequencies, in float64: for segments
            and gradients of which logits can travel, ``backend="auto"`` and no max_bytes. Where
            rounding is too large a part of a row it becomes ``"columns"``, and `last_dispatch` says so.
            ``"auto"``: heads where there are as many as ranks, else spectra where they take fewer
            bytes and no more operations than columns, else columns. It changes how, never what is
            computed.
        exchange: what travels beside the values: ``"queries"``, queries and keys; ``"logits"``, the
            logits of each query with the first keys of all segments, for given segments and
            ``gradient="forward"``; ``"auto"``, logits where columns are spread, queries are not of a
            half type and k <= d, else queries. It changes how, never what is computed.
        timeout: seconds in which each exchange is over, or an error names the rank that is missing.
            A rank counts as missing when it comes later than half of that.

    Returns:
        ``(B, H, m, d_v)`` of this rank's tokens; a DTensor placed as the query if that is one.

    Raises:
        InputError: (a ValueError) what cannot be used, in this rank.
        DistributedError: another rank has something else or refuses its tensors, has died or hangs; the
            message names it.

    Accuracy:
        That of one process, whatever the number of ranks. With whole heads and queries a rank computes
        what one process does, to the last bit where it chooses the same backend; otherwise rounding
        differs as it does between backends: by up to 5e-5 in rows with small gradients at n = 4,097
        (docs/distributed.md).

    Complexity:
        With W ranks, time and memory of one process for H / W heads. A rank sends (2 d + 2 d_v) n / W²
        numbers of each head to each other rank, or (k + 2 d_v) n / W² with logits. Where columns are
        spread, logits (or queries and keys) go to all ranks of a head: k n or 2 d n numbers in each.
        With spectra a rank sends at most 2 k + 2 d_v (2 + k / b) numbers of float64 for each of its
        tokens and heads, with b blocks of all ranks, about as many as segments.

    Source:
        All-to-all between tokens and heads: DeepSpeed-Ulysses (arXiv 2309.14509). Columns: F4, a
        convolution takes each column by itself.

    Example:
        With two processes, ``torchrun --nproc-per-node 2``: see docs/several-machines.md.
    """
    kind, parts, ranks = opened(mesh, timeout, query=query, key=key, value=value)
    result = autocast_dtype(parts[0])
    if result is not None and len({x.dtype for x in parts if isinstance(x, Tensor)}) > 1:
        # As with one process; alike ones travel as they are, and are computed in float32 anyway.
        parts = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in parts]
    same = {
        "num_bases": num_bases,
        "starts": starts,
        "segment_length": segment_length,
        "window": window,
        "delta": delta,
        "epsilon": epsilon,
        "search": search,
        "scale": scale,
        "is_causal": is_causal,
        "document_lengths": document_lengths,
        "gradient": gradient,
        "backend": backend,
        "max_bytes": max_bytes,
        "layout": layout,
        "exchange": exchange,
    }

    def described() -> dict[str, Any]:
        found = {name: told(value) for name, value in same.items()}
        graded = torch.is_grad_enabled()
        by_key = expanded_bias("key_bias", key_bias, parts[0])
        found["key_bias"] = None
        if by_key is not None:
            real = None if key_padding_mask is None else key_padding_mask[:, None]
            check_finite("key_bias", by_key, real)
            found["key_bias"] = [str(by_key.dtype), graded and by_key.requires_grad]
        if lag_bias is not None:  # its shape needs the number of all tokens
            check_float_tensor("lag_bias", lag_bias)
            check_finite("lag_bias", lag_bias)
            if lag_bias.device != parts[0].device:
                raise InputError(f"lag_bias is on {lag_bias.device} but query is on {parts[0].device}")
            found["lag_bias"] = [
                list(lag_bias.shape),
                str(lag_bias.dtype),
                graded and lag_bias.requires_grad,
            ]
        return found

    tokens = begin(ranks, parts[0], parts[1], parts[2], key_padding_mask, enable_gqa, described)
    options = {
        "num_bases": num_bases,
        "starts": starts,
        "segment_length": segment_length,
        "window": window,
        "delta": delta,
        "epsilon": epsilon,
        "search": search,
    }
    with torch.autocast(parts[0].device.type, enabled=False), graph_of_its_own():
        output = _attend(
            tokens,
            parts[0],
            parts[1],
            parts[2],
            key_padding_mask,
            key_bias,
            lag_bias,
            document_lengths,
            options,
            scale=scale,
            is_causal=is_causal,
            gradient=gradient,
            backend=backend,
            max_bytes=max_bytes,
            layout=layout,
            exchange=exchange,
        )
    output = output.to(parts[0].dtype if result is None else result)
    return kind.wrap(output)


def _attend(
    tokens: Tokens,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_bias: Tensor | None,
    lag_bias: Tensor | None,
    document_lengths: Sequence[int] | None,
    segments: dict[str, Any],
    *,
    scale: float | None,
    is_causal: bool,
    gradient: str,
    backend: str,
    max_bytes: int | None,
    layout: str,
    exchange: str,
) -> Tensor:
    """Run; the tensors are checked, the arguments are the same in all ranks."""
    batch, heads, _, d = query.shape
    n = tokens.n
    if is_causal is not True:
        raise InputError(f"is_causal={describe(is_causal)}: a conv basis is causal")
    check_layout(layout)
    check_backend(backend)
    check_gradient(gradient)
    factor = check_scale(scale, d)
    if max_bytes is not None:
        check_positive_int("max_bytes", max_bytes, "a number of bytes")
    whole = query.new_zeros((1, 1, 1, 1)).expand(batch, heads, n, d)
    lag_bias = expanded_bias("lag_bias", lag_bias, whole)
    key_bias = expanded_bias("key_bias", key_bias, query)
    tensors = [query, key, value]
    if key_bias is not None:
        if key_bias.dtype != query.dtype:
            key_bias = key_bias.to(compute_dtype(query.dtype))
        tensors.append(key_bias[..., None])
    if any(tensor.dtype != query.dtype for tensor in tensors):
        tensors = [tensor.float() if tensor.dtype in _HALF else tensor for tensor in tensors]
    query, key, value = tensors[:3]
    given = None
    if document_lengths is not None:
        document_lengths = check_documents(document_lengths, n)
        if segments["starts"] is None:
            check_segments(batch, heads, n, query.device, **segments, warn=False)
        else:
            document_starts(segments["starts"], document_lengths, query.device)
    else:
        given = check_segments(batch, heads, n, query.device, **segments, warn=False).starts
    reason = _why_no_spectra(exchange, given, gradient, backend, max_bytes)
    if layout == "spectra" and reason is not None:
        raise InputError(f"layout='spectra' cannot be used with {reason}: use layout='auto'")
    real = tokens.gather_mask(mask)
    sizes = Sizes(heads, key.shape[1], value.shape[-1])
    pieces = shares(layout, sizes, tokens.ranks.size)
    by_segment = _logits_travel(exchange, given, gradient)
    if exchange == "auto":
        spread_out = not whole_heads(layout, sizes, tokens.ranks.size)
        few = given is not None and given.shape[-1] <= d
        by_segment &= spread_out and few and query.dtype not in _HALF
        by_segment |= layout == "spectra"
    grid: Grid | None = None
    if by_segment:
        assert given is not None
        # Logits of a half type would be rounded as those of one process are not.
        tensors = [tensor.to(compute_dtype(tensor.dtype)) for tensor in tensors]
        query, key, value = tensors[:3]
        if mask is not None:
            query, key = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (query, key))
        places = first_real_keys(given, real, batch, n)
        first = gather_tokens(tokens.ranks, tokens.lengths, key, places)
        logits = segment_logits_of(query, first, factor)
        if reason is None:
            grid = _grid(layout, tokens, given, query, key, value, key_bias is not None)
        if grid is not None:
            by_key = tensors[3] if key_bias is not None else None
            output = attend_by_spectra(
                tokens, grid, Given(logits, value, by_key, lag_bias), places, real
            )
            if output is not None:
                why = f"{grid.blocks} blocks over {tokens.ranks.size} ranks, which exchange spectra"
                record_dispatch(Dispatch("spectra", why))
                return output
        tensors = [logits, value, *tensors[3:]]
        segments = {"starts": given}
    roads = Roads(
        tokens.ranks,
        tokens.lengths,
        [[part for piece in own for part in _parts(piece, by_segment, tensors)] for own in pieces],
        pieces,
        heads,
        value.shape[-1],
    )
    own_pieces = pieces[tokens.ranks.rank]

    def local(arrived: list[Tensor], everywhere: list[Tensor]) -> list[Tensor]:
        parts = iter(arrived)
        outputs = []
        for piece in own_pieces:
            q = next(parts)
            own = dict(segments)
            if given is not None and given.ndim == 3:
                own["starts"] = given[:, piece.heads]
            v, sharing = next(parts) if by_segment else None, heads // key.shape[1]
            if by_segment:
                assert given is not None
                assert v is not None
                k = unit_keys(given, n, q).expand(batch, v.shape[1], -1, -1)
            else:
                k, v = next(parts), next(parts)
            k, v = (for_heads(piece, sharing, x) for x in (k, v))
            outputs.append(
                attention_of_one(
                    q,
                    k,
                    v,
                    **own,
                    scale=1.0 if by_segment else scale,
                    enable_gqa=True,
                    key_padding_mask=real,
                    key_bias=next(parts)[..., 0] if key_bias is not None else None,
                    lag_bias=everywhere[0][:, piece.heads] if everywhere else None,
                    document_lengths=document_lengths,
                    gradient=gradient,
                    backend=backend,
                    max_bytes=max_bytes,
                )
            )
        return outputs

    output = spread(roads, local, tensors, [] if lag_bias is None else [lag_bias])
    if grid is not None:
        _tell_lost(bool(own_pieces))
    return output


def _why_no_spectra(
    exchange: str, given: Tensor | None, gradient: str, backend: str, max_bytes: int | None
) -> str | None:
    """Return what keeps ranks from exchanging spectra, or None."""
    if given is None or given.ndim != 1:
        return "segments that are recovered, packed or different in each head"
    if gradient != "forward":
        return f"gradient={gradient!r}"
    if exchange == "queries":
        return f"exchange={exchange!r}"
    if backend != "auto":
        return f"backend={backend!r}"
    return None if max_bytes is None else f"max_bytes={max_bytes}"


def _grid(
    layout: str, tokens: Tokens, given: Tensor, query: Tensor, key: Tensor, value: Tensor, biased: bool
) -> Grid | None:
    """Return the blocks of ranks that exchange spectra; None where they do not."""
    ranks, starts = tokens.ranks.size, tuple(given.tolist())
    sizes = Sizes(query.shape[1], key.shape[1], value.shape[-1])
    if layout == "auto" and not whole_heads(layout, sizes, ranks):
        wanted = spectra_pay(
            tokens.n, ranks, sizes, query.shape[-1], starts, value.element_size(), biased
        )
    else:
        wanted = layout == "spectra"
    if not wanted:
        return None
    value_heads = sizes.heads if biased else sizes.kv_heads
    return grid_for(tokens.n, ranks, starts, sizes.heads, value_heads, sizes.width + 1)


def _tell_lost(computed: bool) -> None:
    """Record that columns took the place of spectra.

    Args:
        computed: whether this rank has computed anything, and recorded it.
    """
    ran = last_dispatch() if computed else None
    reason = "rows are lost in the rounding of spectra over ranks, so that columns are spread"
    logger.warning("%s", reason)
    if ran is None:
        record_dispatch(Dispatch("none", reason))
    else:
        record_dispatch(replace(ran, reason=f"{ran.reason}; {reason}"))


def _logits_travel(exchange: object, given: Tensor | None, gradient: str) -> bool:
    """Return whether logits can travel instead of queries and keys, as far as that is asked for."""
    if exchange not in ("auto", "queries", "logits"):
        raise InputError(
            f"exchange={describe(exchange)} is not known; use 'auto', 'queries' or 'logits'"
        )
    can = given is not None and given.ndim == 1 and gradient == "forward"
    if exchange == "logits" and not can:
        raise InputError(
            "exchange='logits' needs segment_length, or starts (k,) for all heads, no packed "
            "documents, and gradient='forward'; use exchange='auto'"
        )
    return can and exchange != "queries"


def _parts(piece: Piece, by_segment: bool, tensors: Sequence[Tensor]) -> list[Part]:
    """Return which parts of the tensors a piece needs: logits or queries and keys, values, biases."""
    heads = [piece.heads, piece.kv_heads] if by_segment else [piece.heads, *[piece.kv_heads] * 2]
    parts = [
        (place, own, slice(0, tensor.shape[-1]))
        for place, (tensor, own) in enumerate(zip(tensors, [*heads, piece.heads], strict=False))
    ]
    values = len(heads) - 1
    parts[values] = (values, piece.kv_heads, piece.columns)
    return parts
