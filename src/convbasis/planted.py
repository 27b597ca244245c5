"""Queries and keys whose logits have a known conv basis."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .basis import ConvBasis
from .checks import check_nonnegative, check_positive_int
from .errors import InputError


class PlantedQK(NamedTuple):
    """Queries and keys with planted logits."""

    query: Tensor
    """``(n, d)``."""
    key: Tensor
    """``(n, d)``."""
    basis: ConvBasis
    """The conv basis of the noiseless logits ``q_i·k_j / sqrt(d)``."""
    delta: float
    """Any two segment kernels, and each against 0, differ by at least delta at lag 0; and so, in the
    1-norm, on the first T lags, for every T."""


def planted_qk(
    n: int,
    d: int,
    num_bases: int,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> PlantedQK:
    """Return queries and keys whose logits have exactly a known k-conv basis.

    ``q_i = R^i x`` and ``k_j = R^j y_r`` with a rotation R and one vector y_r for each segment: their
    product depends on the lag and the segment alone, as with rotary positions. Random draws do not
    depend on the noise: the same generator state gives the same planted basis with any noise.

    Args:
        n: sequence length, in tokens.
        d: head dimension.
        num_bases: number of segments, at most n. If they leave room for it, no segment starts in the
            last quarter of the columns, nor in the last 16 of 32 or more, so that every segment can be
            recovered with a window of as many lags.
        noise: largest error of a logit, in nats; it is reached. It uses one dimension of its own.
        generator: a CPU generator, for repeatable draws.
        dtype: dtype of the result; float32 rounds the logits to about 1e-6.

    Returns:
        `PlantedQK`: query, key ``(n, d)``, basis, delta.

    Raises:
        InputError: a size is not positive; num_bases > n; noise is negative, or d = 1 with noise.

    Complexity:
        O(k n d).

    Source:
        F5; the definition of non-degenerate logits in Conv-Basis (arXiv 2405.05219).

    Example:
        >>> import torch, convbasis as cb
        >>> planted = cb.planted_qk(64, 8, 3, generator=torch.Generator().manual_seed(0))
        >>> found = cb.recover(planted.query, planted.key, num_bases=3, delta=planted.delta)
        >>> bool((found.starts == planted.basis.starts).all())
        True
    """
    check_positive_int("n", n, "a sequence length")
    check_positive_int("d", d, "a head dimension")
    check_positive_int("num_bases", num_bases, "the number of segments")
    if num_bases > n:
        raise InputError(f"num_bases={num_bases} segments do not fit into n={n} columns")
    noise = check_nonnegative("noise", noise)
    if noise and d == 1:
        raise InputError("noise needs a dimension of its own: give d >= 2, or noise=0")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    last = max(num_bases, n - max(n // 4, min(16, n // 2)))
    inner = torch.randperm(last - 1, generator=generator)[: num_bases - 1] + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), inner.sort().values])
    owner = torch.searchsorted(starts, torch.arange(n), right=True) - 1

    # The kernels at lag 0: multiples ±delta, ±2 delta, ..., in random order.
    half = -(-num_bases // 2)
    delta = min(1.0, 3.0 / half)
    levels = torch.arange(1, half + 1, dtype=torch.float64) * delta
    levels = torch.stack([levels, -levels], dim=-1).flatten()
    levels = levels[torch.randperm(len(levels), generator=generator)[:num_bases]]

    # Rotated planes, with angles that are multiples of 2π/period so that no position loses digits.
    planes = (d - 2) // 2 if d > 1 else 0
    period = 4 * n + 1
    turns = torch.randint(1, 2 * n + 1, (planes,), generator=generator)
    angles = (torch.arange(n)[:, None] * turns % period).double() * (2.0 * math.pi / period)
    amplitude = (2.0 / max(1, planes)) ** 0.5 * d**0.25
    x = torch.complex(normal(planes), normal(planes)) * amplitude
    y = torch.complex(normal(num_bases, planes), normal(num_bases, planes)) * amplitude
    rotation = torch.polar(torch.ones_like(angles), angles)
    query, key = rotation * x, rotation * y[owner]

    # One dimension that is not rotated moves each kernel to its level at lag 0.
    scale = 1.0 / math.sqrt(d)
    shift = levels / scale - (x * y.conj()).real.sum(-1)
    kernels = scale * ((query[None] * y.conj()[:, None]).real.sum(-1) + shift[:, None])
    basis = ConvBasis(kernels.to(dtype), starts)

    def real(planar: Tensor, *others: Tensor) -> Tensor:
        flat = torch.view_as_real(planar).flatten(1)
        joined = torch.cat([flat, *(o[:, None] for o in others)], dim=-1)
        return torch.nn.functional.pad(joined, (0, d - joined.shape[1])).to(dtype)

    strength = torch.rand(n, generator=generator, dtype=torch.float64) * 2.0 - 1.0
    sign = torch.randint(0, 2, (n,), generator=generator).double() * 2.0 - 1.0
    strength[-1] = 1.0  # the bound is reached
    ones = torch.ones(n, dtype=torch.float64)
    if d == 1:
        return PlantedQK(real(query, ones), real(key, shift[owner]), basis, delta)
    return PlantedQK(
        real(query, ones, strength * (noise / scale)),
        real(key, shift[owner], sign),
        basis,
        delta,
    )
