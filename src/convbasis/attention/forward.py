"""Attention from segment kernels of logits: exp, product, normaliser, and the rows that need care."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..convolve import evaluate_safely, fft_product, lost_rows, reached_rows
from ..convolve.reference import softmax_rows
from ..convolve.segments import segment_stops
from ..convolve.sums import row_sums
from ..dispatch import Dispatch, resolve_backend

# The largest relative error of an output row that a transform may leave. What a later token can do to
# an earlier row is of that size, and causality is promised to 1e-12 and 1e-5.
_TOLERANCE = {torch.float32: 1.5e-5, torch.float64: 2e-12}


class Forward(NamedTuple):
    """Result of `conv_basis_fwd`."""

    output: Tensor  # (P, R, n, d_v)
    lse: Tensor  # (P, R, n)
    dispatch: Dispatch


def conv_basis_fwd(
    logits: Tensor,
    starts: Tensor,
    value: Tensor,
    real: Tensor | None,
    *,
    backend: str,
    max_bytes: int,
) -> Forward:
    """Return softmax attention under segmented logits.

    Args:
        logits: ``(P, R, k, n)`` segment kernels, -inf past lag n - 1 - start and for the queries after
            the last real token; finite elsewhere.
        starts: ``(P, R, k)`` or ``(1, 1, k)``.
        value: ``(P, 1, n, d_v)``, dtype of logits, zero at padding.
        real: bool ``(P, n)``, False for padding; None where there is none.
        backend: see `resolve_backend`.
        max_bytes: bound on the transforms' working memory, in bytes.
    """
    problems, sets, k, n = logits.shape
    groups, width = problems * sets, value.shape[-1]
    flat_logits = logits.reshape(groups, k, n)
    flat_starts = starts.expand(problems, sets, k).reshape(groups, k)

    def direct(chosen: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        owner = chosen // sets
        mask = None if real is None else real[owner]
        return softmax_rows(flat_logits[chosen], flat_starts[chosen], value[owner, 0], rows, mask)

    chosen_backend, reason = resolve_backend(backend, n)
    if chosen_backend == "reference":
        everything = torch.arange(groups, device=value.device)
        output, lse = direct(everything, torch.arange(n, device=value.device).expand(groups, n))
        dispatch = Dispatch("reference", reason)
    else:

        def transform(chosen: Tensor | None, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
            parts, mask = (logits, starts, value), real
            if chosen is not None:
                owner = chosen // sets
                parts = (flat_logits[chosen, None], flat_starts[chosen, None], value[owner])
                mask = None if real is None else real[owner]
            own_logits, own_starts, values = parts[0].to(dtype), parts[1], parts[2].to(dtype)
            output, lse, lost = _transform(
                own_logits, own_starts, values, mask, logits.dtype, max_bytes
            )
            return (output.reshape(-1, n, width), lse.reshape(-1, n)), lost.reshape(-1, n)

        (output, lse), rescue = evaluate_safely(transform, direct, logits.dtype)
        dispatch = Dispatch("fft", reason, *rescue)
        dispatch.warn_if_direct(groups)
    output, lse = output.view(problems, sets, n, width), lse.view(problems, sets, n)
    if real is not None:
        hidden = ~_visible_rows(real)[:, None]
        output = output.masked_fill(hidden[..., None], 0.0)
        lse = lse.masked_fill(hidden, -torch.inf)
    return Forward(output, lse, dispatch)


def _visible_rows(real: Tensor) -> Tensor:
    """Return the rows from the first to the last real token, bool ``(P, n)``."""
    return real.cummax(-1).values & real.flip(-1).cummax(-1).values.flip(-1)


def _transform(
    logits: Tensor,
    starts: Tensor,
    value: Tensor,
    real: Tensor | None,
    result: torch.dtype,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, lse and which rows are lost in rounding, worked in the dtype of logits."""
    peak = logits.detach().amax((-1, -2), keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    kernels = (logits - peak).exp()
    numerator, noise = fft_product(kernels, starts, value, max_bytes)
    normaliser, doubtful = _normaliser(kernels, starts, real, max_bytes)

    def magnitude() -> Tensor:
        norms = torch.linalg.vector_norm(value.detach(), dim=-1, keepdim=True)
        return fft_product(kernels.detach(), starts, norms, max_bytes)[0][..., 0]

    visible = torch.ones_like(normaliser, dtype=torch.bool)
    if real is not None:
        visible = _visible_rows(real)[:, None].expand(normaliser.shape)
    reached = reached_rows(starts, value)
    lost = lost_rows(
        numerator,
        noise,
        reached,
        magnitude,
        tolerance=_TOLERANCE[result],
    )
    lost = (lost | doubtful) & visible
    # A row that sees only zero values is zero, whatever the transform says.
    usable = visible & ~lost
    divisor = torch.where(usable, normaliser, 1.0)
    output = (numerator / divisor[..., None].to(numerator.dtype)).masked_fill(
        ~(usable & reached)[..., None], 0.0
    )
    lse = torch.where(visible, divisor.log() + peak[..., 0].double(), -torch.inf)
    return output, lse.to(logits.dtype), lost


def _normaliser(
    kernels: Tensor, starts: Tensor, real: Tensor | None, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """Return the row sums over real keys, float64 ``(P, R, n)``, and which of them are doubtful."""
    n = kernels.shape[-1]
    stops = segment_stops(starts, n)
    # Below this, entries of a row have left the range of normal numbers.
    least = torch.finfo(kernels.dtype).tiny / torch.finfo(kernels.dtype).eps
    if real is None:
        sums = row_sums(kernels, starts, stops)
        return sums, sums.detach() < least
    problems, sets, k, _ = kernels.shape
    starts, stops = (t.expand(problems, sets, k) for t in (starts, stops))
    before = torch.nn.functional.pad(real.cumsum(-1), (1, 0))[:, None].expand(-1, sets, -1)
    count = before.gather(-1, stops) - before.gather(-1, starts)
    # Segments begin at a real key: without holes their real keys are starts .. starts + count - 1.
    ends = starts + count
    if bool((before.gather(-1, ends) - before.gather(-1, starts) == count).all()):
        sums = row_sums(kernels, starts, ends)
        return sums, sums.detach() < least
    weight = real[:, None, :, None].double()
    sums, noise = fft_product(kernels.double(), starts, weight, max_bytes)
    sums = sums[..., 0]
    good = noise <= sums.detach() * 1e-12
    return sums, ~(good & (sums.detach() >= least))
