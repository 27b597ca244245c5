"""The gradient of the forward pass: of the attention that was computed, with its segments as constants.

With P the attention weights, Y the output and dY its gradient, the gradient of a logit is
``P (dY·v - dY·Y + dlse)``. Summed over the entries that share a logit, the columns of a segment at one
lag, that is a causal correlation; a transform serves it where rows are alike in size, in float64. Rows
whose normaliser is small beside the largest are evaluated entry by entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..convolve import DEFAULT_MAX_BYTES, fft_kernel_gradient, fft_product
from ..convolve.reference import row_entries
from .forward import Inputs

# Up to this length everything is evaluated entry by entry.
_SHORT = 256
# Smaller normalisers than this part of the largest would magnify the rounding of a float64 transform to
# more than 1e-7 of the largest gradient.
_RANGE = 1e-8


def conv_basis_bwd(
    inputs: Inputs,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor,
    max_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to query, key and value.

    Args:
        inputs: of the forward pass, starts ``(P, R, k)``.
        output: ``(P, R, n, d_v)``.
        lse: ``(P, R, n)``.
        grad_output: ``(P, R, n, d_v)``.
        grad_lse: ``(P, R, n)``.
        max_bytes: bound on the working memory of the transforms, in bytes; None for the default.

    Returns:
        ``(P, R, n, d)``, ``(P, n, d)`` and ``(P, n, d_v)``, float64.

    Complexity: O(k n d_v log n + k n d) time and O(k n) memory for each head.
    """
    clean = inputs._replace(work=torch.float64).cleaned()
    problems, sets, n, width = output.shape
    k = clean.starts.shape[-1]
    starts = clean.starts.expand(problems, sets, k)
    logits = clean.logits()
    visible = lse.isfinite()
    lse = lse.double().masked_fill(~visible, 0.0)
    counted = grad_output.double().masked_fill(~visible[..., None], 0.0)
    # One more column: the part of the gradient that all entries of a row share.
    shared = grad_lse.double().masked_fill(~visible, 0.0) - (counted * output.double()).sum(-1)
    rows = torch.cat([counted, shared[..., None]], dim=-1)
    real = clean.value.new_ones((problems, n)) if clean.real is None else clean.real.double()
    values = torch.cat([clean.value, real[..., None]], dim=-1)

    peak = lse.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    regular = visible & (lse - peak > torch.log(lse.new_tensor(_RANGE)))
    if n <= _SHORT:
        regular = torch.zeros_like(visible)
    of_kernels = torch.zeros_like(logits)
    of_values = torch.zeros_like(values)
    if bool(regular.any()):
        budget = DEFAULT_MAX_BYTES if max_bytes is None else max_bytes
        kernels = (logits - peak[..., None]).exp()
        scaled = (rows * (peak - lse).exp()[..., None]).masked_fill(~regular[..., None], 0.0)
        of_values += fft_product(kernels, starts, scaled, budget, transpose=True)[0].sum(1)
        correlation = fft_kernel_gradient(starts, values[:, None], scaled, k, budget)
        of_kernels += kernels * correlation
    irregular = (visible & ~regular).flatten(0, 1)
    for head in irregular.any(-1).nonzero()[:, 0].tolist():
        p, r = divmod(head, sets)
        chosen = irregular[head].nonzero()[None, :, 0]
        for block, entries, index in row_entries(logits[p, r][None], starts[p, r][None], chosen):
            own = chosen[0, block]
            extent = entries.shape[-1]
            weights = (entries[0] - lse[p, r, own, None]).exp() * real[p, :extent]
            change = rows[p, r, own]
            of_values[p, :extent] += weights.mT @ change
            change = weights * (change @ values[p, :extent].mT)
            of_kernels[p, r].view(-1).index_add_(0, index[0].flatten(), change.flatten())
    grads = (*_through_logits(clean, starts, of_kernels), of_values[..., :width])
    if clean.real is None:
        return grads
    unreal = ~clean.real[..., None]
    masks = (unreal[:, None], unreal, unreal)
    of_query, of_key, of_value = (g.masked_fill(m, 0.0) for g, m in zip(grads, masks, strict=True))
    return of_query, of_key, of_value


def _through_logits(clean: Inputs, starts: Tensor, of_kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and key from that of the kernels ``(P, R, k, n)``."""
    problems, sets, k, n = of_kernels.shape
    d = clean.query.shape[-1]
    # By query position instead of lag: entry s + t of column s.
    lag = torch.arange(n, device=starts.device) - starts[..., None]
    columns = of_kernels.gather(-1, lag.clamp(min=0)).masked_fill(lag < 0, 0.0) * clean.scale
    position = starts.clamp(max=n - 1).reshape(problems, sets * k)
    keys = clean.key.gather(1, position[..., None].expand(-1, -1, d)).view(problems, sets, k, d)
    of_query = columns.mT @ keys
    of_first = (columns @ clean.query).view(problems, sets * k, d)
    of_key = torch.zeros_like(clean.key)
    return of_query, of_key.scatter_add_(1, position[..., None].expand(-1, -1, d), of_first)
