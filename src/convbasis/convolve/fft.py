"""Products by fast Fourier transform, one full-length convolution per segment (F4).

O(k n c log n) time. The values of a segment are transformed in place on the sequence axis, multiplied
with the transform of its kernel and summed over segments in the frequency domain, so that one inverse
transform serves all segments. Lengths are at least the length of the linear convolution: nothing
wraps around. Conjugates are made, never only marked: in a compiled graph an operator misses the mark.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lengths import fast_length
from .noise import squared_norm, unit_noise
from .segments import lag_mask, segment_stops

# Bytes of the columns that are correlated at a time: with more, most of the time goes into new pages.
_AT_ONCE = 1 << 25


def fft_product(
    kernels: Tensor, starts: Tensor, x: Tensor, max_bytes: int, *, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """Multiply segmented matrices, or their transposes, with x by FFT.

    Args:
        kernels: ``(P, R, k, n)`` float32 or float64, k >= 1, zero past lag n - 1 - start.
        starts: ``(P, R, k)`` or ``(1, 1, k)``.
        x: ``(P, R, n, c)`` or ``(P, 1, n, c)``, dtype of kernels.
        max_bytes: bound on the transforms' working memory, in bytes; never below one column.
        transpose: multiply with the transposes.

    Returns:
        the product ``(P, R, n, c)`` and the expected rounding error of its rows in the Euclidean
        norm, float64: ``(P, R, 1)``, or ``(P, R, n)`` for the transposes.
    """
    problems, sets, _, n = kernels.shape
    columns = x.shape[-1]
    longest = max(1, int((segment_stops(starts, n) - starts).max()))
    length = fast_length(n + longest - 1)
    # Per column and kernel set: masked values, their transform, the accumulator and one product.
    column_bytes = (4 * length + 3 * n) * sets * kernels.element_size()
    at_once = max(1, max_bytes // column_bytes)
    column_step = min(columns, at_once)
    problem_step = max(1, min(problems, at_once // max(1, column_step)))
    multiply = _correlate if transpose else _convolve

    products, noises = [], []
    for p in range(0, problems, problem_step):
        block = slice(p, p + problem_step)
        kernel_part, x_part = kernels[block], x[block]
        start_part = starts if starts.shape[0] == 1 else starts[block]
        pieces, energies = [], []
        for c in range(0, columns, max(1, column_step)):
            piece, energy = multiply(kernel_part, start_part, x_part[..., c : c + column_step], length)
            pieces.append(piece)
            energies.append(energy)
        products.append(torch.cat(pieces, dim=-1))
        noises.append(torch.stack(energies).sum(0).div(length).sqrt())
    return torch.cat(products), torch.cat(noises) * unit_noise(kernels.dtype, length)


def _convolve(kernels: Tensor, starts: Tensor, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return A x and the squares whose mean over the transform measures its rounding."""
    n = x.shape[-2]
    rows = torch.arange(n, device=x.device)
    stops = segment_stops(starts, n)
    channels = x.transpose(-1, -2)  # (P, 1 or R, c, n)
    spectrum = torch.zeros((), dtype=x.dtype, device=x.device)
    for r in range(kernels.shape[-2]):
        inside = (rows >= starts[..., r, None]) & (rows < stops[..., r, None])
        values = torch.fft.rfft(channels * inside[..., None, :], n=length)
        kernel = torch.fft.rfft(kernels[..., r, :], n=length)[..., None, :]
        spectrum = spectrum.addcmul_(kernel, values) if r else kernel * values
    whole = torch.fft.irfft(spectrum, n=length)
    sizes = x.detach().double().square().sum(-1)
    total = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0))
    shape = (*torch.broadcast_shapes(total.shape[:2], starts.shape[:2]), starts.shape[-1])
    total = total.expand(*shape[:2], n + 1)
    starts, stops = starts.expand(shape), stops.expand(shape)
    per_segment = (total.gather(-1, stops) - total.gather(-1, starts)).clamp(min=0.0)
    inputs = (squared_norm(kernels, -1) * per_segment).sum(-1)
    return whole[..., :n].transpose(-1, -2), (squared_norm(whole, (-1, -2)) + 4.0 * inputs)[..., None]


def _correlate(kernels: Tensor, starts: Tensor, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return A^T x and the squares whose mean over the transform measures its rounding, by row."""
    n = x.shape[-2]
    rows = torch.arange(n, device=x.device)
    stops = segment_stops(starts, n)
    values = torch.fft.rfft(x.transpose(-1, -2), n=length)
    x_sizes = squared_norm(x, (-1, -2))
    product = torch.zeros((), dtype=x.dtype, device=x.device)
    energy = torch.zeros((), dtype=torch.float64, device=x.device)
    for r in range(kernels.shape[-2]):
        inside = (rows >= starts[..., r, None]) & (rows < stops[..., r, None])
        kernel = torch.fft.rfft(kernels[..., r, :], n=length)[..., None, :]
        whole = torch.fft.irfft(kernel.conj_physical() * values, n=length)
        product = product + whole[..., :n] * inside[..., None, :]
        sums = squared_norm(whole, (-1, -2)) + 4.0 * squared_norm(kernels[..., r, :], -1) * x_sizes
        energy = energy + sums[..., None] * inside
    return product.transpose(-1, -2), energy


def fft_kernel_gradient(starts: Tensor, x: Tensor, gradient: Tensor, k: int, max_bytes: int) -> Tensor:
    """Return the gradient of the kernels of ``y = A x``, given that of y: causal correlations.

    Args:
        starts: ``(P, R, k)`` or ``(1, 1, k)``.
        x: ``(P, R, n, c)`` or ``(P, 1, n, c)``.
        gradient: ``(P, R, n, c)``.
        k: number of segments.
        max_bytes: bound on the transforms' working memory, in bytes; never below one column.

    Returns:
        ``(P, R, k, n)``: for segment r and lag t, the sum over its columns j of
        ``gradient[j + t]·x[j]``.
    """
    problems, sets, n, columns = gradient.shape
    length = fast_length(2 * n)
    at_once = min(max_bytes, _AT_ONCE) // (4 * length * problems * sets * gradient.element_size())
    step = max(1, min(columns, at_once))
    rows = torch.arange(n, device=x.device)
    stops = segment_stops(starts, n)
    result = gradient.new_zeros((problems, sets, k, n))
    for c in range(0, columns, step):
        part = slice(c, c + step)
        outer = torch.fft.rfft(gradient[..., part].transpose(-1, -2), n=length)
        values = x[..., part].transpose(-1, -2)
        for r in range(k):
            inside = (rows >= starts[..., r, None]) & (rows < stops[..., r, None])
            inner = torch.fft.rfft(values * inside[..., None, :], n=length)
            spectrum = (inner.conj_physical() * outer).sum(-2)
            result[..., r, :] += torch.fft.irfft(spectrum, n=length)[..., :n]
    return result.masked_fill_(~lag_mask(starts, n), 0.0)
