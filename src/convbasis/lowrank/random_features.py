"""Random features: exp(q·k) as the mean of products of random cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import (
    check_alike,
    check_finite,
    check_float_tensor,
    check_nonnegative_int,
    check_positive_int,
    check_scale,
    compute_dtype,
)
from ..errors import InputError, MissingExtraError


def random_features(
    query: Tensor, key: Tensor, count: int, *, scale: float | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return random features whose products are near exp(logit), up to one factor for each query.

    ``exp(q·k) = exp(|q|^2/2) exp(-|q - k|^2/2) exp(|k|^2/2)``: the kernel between is that of random
    Fourier features, drawn by scikit-learn's ``RBFSampler``; the factor of a query cancels in averages
    and is left out, as the largest one of a key. At the same number of features the error is 10 to 100
    times that of `polynomial_features`, but any number can be had in any dimension. It is least where
    queries and keys have norms alike: give ``t q`` and ``k / t``. Products may be negative, and then a
    normaliser too, which `relative_attention` refuses.

    Args:
        query: ``(..., n, d)``; float64, float32, bfloat16 or float16.
        key: ``(..., n, d)``, same dtype and device.
        count: number of features, r. The error falls with its root.
        scale: factor of the logits; ``1/sqrt(d)`` by default.
        seed: of the draw; the same one gives the same features.

    Returns:
        ``u1 (..., n, r)`` of the queries and ``u2 (..., n, r)`` of the keys, dtype of the query, for
        `masked_lowrank_matmul` or `relative_attention`. Differentiable with respect to both; what was
        drawn is a constant, and so is the factor that is left out, which averages do not depend on.

    Raises:
        InputError: shapes, dtypes or options that do not fit; NaN or Inf.
        MissingExtraError: scikit-learn is not installed.

    Complexity: O(n d r) time.

    Source:
        Rahimi and Recht, Random features for large-scale kernel machines (2007).

    Example:
        >>> import torch
        >>> from convbasis.lowrank import random_features
        >>> q = k = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)
        >>> u1, u2 = random_features(q, k, 4000)
        >>> weights = (u1 @ u2.mT)[0]
        >>> weights = weights / weights.sum()  # of exp(0.25) and exp(-0.25): 0.622 and 0.378
        >>> bool((weights - torch.tensor([0.622, 0.378])).abs().max() < 0.02)
        True
    """
    for name, tensor in (("query", query), ("key", key)):
        check_float_tensor(name, tensor)
    check_alike(query=query, key=key)
    if min(query.ndim, key.ndim) < 2 or query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise InputError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; (..., n, d) of one d "
            "are wanted"
        )
    check_positive_int("count", count, "a number of features")
    check_nonnegative_int("seed", seed)
    for name, tensor in (("query", query), ("key", key)):
        check_finite(name, tensor)
    d = query.shape[-1]
    factor = check_scale(scale, d)
    try:
        from sklearn.kernel_approximation import RBFSampler
    except ImportError as error:
        raise MissingExtraError("random_features", "random", error) from error
    sampler = RBFSampler(gamma=0.5, n_components=count, random_state=seed).fit([[0.0] * d])
    work = compute_dtype(query.dtype)
    weights, offset = (
        torch.as_tensor(drawn, dtype=work, device=query.device)
        for drawn in (sampler.random_weights_, sampler.random_offset_)
    )
    with torch.autocast(query.device.type, enabled=False):
        root = math.sqrt(abs(factor))
        left = query.to(work) * math.copysign(root, factor)
        right = key.to(work) * root
        u1, u2 = (math.sqrt(2.0 / count) * (x @ weights + offset).cos() for x in (left, right))
        half = 0.5 * right.square().sum(-1, keepdim=True)
        most = half.detach().amax(-2, keepdim=True) if half.shape[-2] else 0.0
        u2 = u2 * (half - most).exp()
    return u1.to(query.dtype), u2.to(query.dtype)
