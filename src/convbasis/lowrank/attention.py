"""lowrank_attention: masked softmax attention with exp replaced by its Taylor polynomial."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checks import (
    check_finite,
    check_nonnegative_int,
    check_positive_int,
    check_qkv,
    check_scale,
    compute_dtype,
    describe,
)
from ..errors import ConvBasisError, InputError
from ..transforms import may_make_anew, refuse_transforms
from .choice import Choice, bounds, least_features, output_error
from .coordinates import balanced_coordinates, largest_norms
from .features import evaluated, feature_count, monomials
from .mask import Mask
from .product import lowrank_product

TOLERANCE = 0.01
MAX_FEATURES = 4096
_TOGETHER = 256  # features at a time
_ENTRIES = 1 << 21  # numbers in the features of several heads at a time
_ALTERNATIVES = "make queries or keys smaller, or use hybrid_attention"


class LowRankStats(NamedTuple):
    """Low-rank attention with what is known about it."""

    output: Tensor
    """``(B, H, n, d_v)``, dtype of the query."""
    lse: Tensor
    """``(B, H, n)`` natural log of the normaliser; -inf where a row sees nothing."""
    degree: int
    """Of the polynomial."""
    rank: int
    """Coordinates of queries and keys that the features are made of."""
    features: int
    """Their number, r."""
    error_bound: float
    """Bound of the error of a row of the output in the Euclidean norm, relative to the largest norm
    of a value; inf where the polynomial may be 0 or negative."""


def lowrank_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    degree: int | None = None,
    tolerance: float | None = None,
    rank: int | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_bias: Tensor | None = None,
    max_features: int = MAX_FEATURES,
) -> Tensor:
    """Return attention under a mask, its weights exp(logit) replaced by a polynomial of low rank.

    For small logits: the number of features is C(d + G, G) for degree G, and G grows with the largest
    logit. The degree is chosen for a tolerance, and inputs that need too many features are refused.

    Args:
        q: ``(B, H, n, d)``; float64, float32, bfloat16 or float16.
        k: ``(B, H_kv, n, d)``, same dtype and device.
        v: ``(B, H_kv, n, d_v)``, same dtype and device.
        mask: of n tokens, from `convbasis.lowrank`.
        degree: of the Taylor polynomial; chosen if None. Even ones are positive everywhere.
        tolerance: the largest error of a row of the output in the Euclidean norm, relative to the
            largest norm of a value; 0.01 if neither it nor a degree is given. What is promised is a
            bound, from norms of queries and keys, of the polynomial and of rounding in the dtype that
            is computed in; errors are mostly much smaller.
        rank: coordinates of queries and keys that are kept, those in which all logits together are
            best approximated; all if None and a degree is given, else chosen with the degree.
        scale: factor of the logits; ``1/sqrt(d)`` by default.
        enable_gqa: allow H to be a multiple of H_kv.
        key_bias: ``(B, H, n)``, added to the logits of a key outside of the polynomial; -inf hides it.
            None for 0. A row whose keys all lie more than about 70 below the largest bias of the head
            (670 in float64) is refused: the dtype has too few digits for such weights.
        max_features: the most features that are taken.

    Returns:
        ``(B, H, n, d_v)``, dtype and device of the query; 0 for a row that sees nothing. Differentiable
        with respect to q, k and v; degree and coordinates are constants.

    Raises:
        InputError: (a ValueError) shapes, dtypes or options that do not fit; NaN or Inf; logits that
            are too large for the tolerance.
        ConvBasisError: a normaliser is not positive, which happens with odd degrees, or too small a
            number, which key_bias can make it.

    Causality:
        With a degree, and without rank, row i depends on what the mask lets it see alone. A chosen
        degree and coordinates depend on all tokens.

    Complexity:
        O(n r (d_v + G)) time for r features, at most `max_features`; O(n (256 + d_v)) memory, or 2^21
        numbers for several short heads at a time, beside states of chunks. The backward pass makes the
        features anew.

    Source:
        "Masked low rank" of docs/mathematics.md; Conv-Basis (arXiv 2405.05219), section 6.

    Example:
        >>> import torch, convbasis as cb
        >>> q, k, v = torch.randn(3, 1, 2, 300, 8).unbind()
        >>> cb.lowrank_attention(0.1 * q, k, v, cb.lowrank.CausalMask(300), tolerance=0.1).shape
        torch.Size([1, 2, 300, 8])
    """
    return lowrank_attention_stats(
        q,
        k,
        v,
        mask,
        degree=degree,
        tolerance=tolerance,
        rank=rank,
        scale=scale,
        enable_gqa=enable_gqa,
        key_bias=key_bias,
        max_features=max_features,
    ).output


def lowrank_attention_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    degree: int | None = None,
    tolerance: float | None = None,
    rank: int | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_bias: Tensor | None = None,
    max_features: int = MAX_FEATURES,
) -> LowRankStats:
    """Return `lowrank_attention` with its log-sum-exp, degree, rank and error bound.

    Args, errors and cost are those of `lowrank_attention`.

    Returns:
        `LowRankStats`.

    Example:
        >>> import torch
        >>> from convbasis.lowrank import CausalMask, lowrank_attention_stats
        >>> q, k, v = torch.full((3, 1, 1, 9, 4), 0.5).unbind()
        >>> lowrank_attention_stats(q, k, v, CausalMask(9), tolerance=1e-4).degree
        6
    """
    refuse_transforms("lowrank_attention", "masked_lowrank_matmul with polynomial_features")
    check_qkv(q, k, v, enable_gqa, names=("q", "k", "v"))
    batch, heads, n, d = q.shape
    if not isinstance(mask, Mask):
        raise InputError(f"mask is {describe(mask)}; one of convbasis.lowrank is wanted")
    if mask.n != n:
        raise InputError(f"mask is of {mask.n} tokens but q of {n}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_finite(name, tensor)
    _check_key_bias(key_bias, q)
    check_positive_int("max_features", max_features, "a number of features")
    work = compute_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        group = torch.arange(heads, device=q.device) // (heads // k.shape[1])
        query = q.to(work) * check_scale(scale, d)
        key, value = (tensor.to(work).index_select(1, group) for tensor in (k, v))
        query, key, choice = _chosen(query, key, degree, tolerance, rank, max_features)
        visible = (mask.visible_keys() > 0).to(q.device).expand(batch, heads, n)
        weights = value.new_ones((batch, heads, n, 1))
        most = value.new_zeros((batch, heads, 1))
        if key_bias is not None:
            bias = key_bias.to(work)
            most = bias.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
            weights = (bias - most).exp()[..., None]
            visible = _sees_any(bias > -torch.inf, mask)
        x = torch.cat([value * weights, weights], dim=-1)
        sums = _weighted_sums(query, key, x, mask, choice.degree)
        total = sums[..., -1]
        limits = torch.finfo(work)
        # Numbers below the least one that is refused have fewer digits, or are 0.
        wrong = visible & ~((total > limits.tiny / limits.eps) & total.isfinite())
        if bool(wrong.any()):
            raise _no_normaliser(total, wrong.nonzero()[0].tolist(), choice.degree, key_bias)
        safe = total.masked_fill(~visible, 1.0)
        output = (sums[..., :-1] / safe[..., None]).masked_fill(~visible[..., None], 0.0)
        lse = (safe.log() + most).masked_fill(~visible, -torch.inf)
    features = feature_count(choice.rank, choice.degree)
    return LowRankStats(output.to(q.dtype), lse, choice.degree, choice.rank, features, choice.error)


def _no_normaliser(
    total: Tensor, row: list[int], degree: int, key_bias: Tensor | None
) -> ConvBasisError:
    """Return the error of a row whose weights do not add up to a positive number."""
    found = float(total[tuple(row)])
    told = f"the normaliser of row {row} is {found:.3g}: "
    if key_bias is not None and found >= 0.0:
        largest = float(key_bias[tuple(row[:2])].detach().amax())
        return ConvBasisError(
            f"{told}key_bias of the keys that it sees is so far below its largest entry, "
            f"{largest:.3g}, that their weights are lost in {total.dtype}; raise it, or use float64"
        )
    return ConvBasisError(
        f"{told}a polynomial of degree {degree} is no approximation of these logits; use an even "
        "degree and smaller logits"
    )


def _check_key_bias(bias: object, query: Tensor) -> None:
    """Check what is added to the logits of keys."""
    if bias is None:
        return
    if not isinstance(bias, Tensor) or not bias.is_floating_point() or bias.shape != query.shape[:3]:
        raise InputError(
            f"key_bias is {describe(bias)}; a floating-point tensor {tuple(query.shape[:3])} is wanted"
        )
    if bias.device != query.device:
        raise InputError(f"key_bias is on {bias.device} but q is on {query.device}")
    if bool((bias.isnan() | (bias == torch.inf)).any()):
        raise InputError("key_bias holds NaN or +Inf; numbers, or -inf for hidden keys, are wanted")


def _sees_any(shown: Tensor, mask: Mask) -> Tensor:
    """Return which rows see a key that is shown, both ``(B, H, n)``."""
    numbers = shown.float().flatten(0, 1)[..., None]
    ones = torch.ones_like(numbers)
    return (mask.product(ones, ones, numbers, False) > 0.5).view(shown.shape)


def _chosen(
    query: Tensor,
    key: Tensor,
    degree: int | None,
    tolerance: float | None,
    rank: int | None,
    most: int,
) -> tuple[Tensor, Tensor, Choice]:
    """Return the coordinates of scaled queries and keys that features are made of, and the choice."""
    d = query.shape[-1]
    if rank is not None and check_positive_int("rank", rank, "a number of coordinates") > d:
        raise InputError(f"rank={rank} is more than the {d} dimensions of queries and keys")
    if tolerance is None and degree is None:
        tolerance = TOLERANCE
    eps = torch.finfo(query.dtype).eps
    least = 64 * eps
    if tolerance is not None and not (least <= tolerance < 1.0):
        raise InputError(
            f"tolerance={describe(tolerance)} is not a number of {least:.2g} (the rounding of "
            f"{query.dtype}) to 1"
        )
    if degree is not None:
        check_nonnegative_int("degree", degree)
    if rank is not None or degree is None:
        maps = balanced_coordinates(query, key)
        query, key = query @ maps.of_query, key @ maps.of_key
    found = bounds(largest_norms(query), largest_norms(key))
    if degree is None:
        assert tolerance is not None
        choice = least_features(found, tolerance, most, rank, query.dtype, _ALTERNATIVES)
    else:
        kept = d if rank is None else rank
        if (count := feature_count(kept, degree)) > most:
            raise InputError(
                f"degree={degree} in {kept} dimensions has {count:,} features; max_features={most:,}: "
                "use a smaller degree or rank"
            )
        choice = Choice(degree, kept, output_error(*found[kept - 1], degree, eps))
        if tolerance is not None and choice.error > tolerance:
            raise InputError(
                f"degree={degree} keeps the error below {choice.error:.3g}, not "
                f"tolerance={tolerance:g}, for logits as large as {found[kept - 1][0]:.3g}: leave "
                f"the degree to be chosen, or {_ALTERNATIVES}"
            )
    return query[..., : choice.rank], key[..., : choice.rank], choice


def _weighted_sums(query: Tensor, key: Tensor, x: Tensor, mask: Mask, degree: int) -> Tensor:
    """Return the sums of x over visible keys, weighted by the polynomial of ``q·k``.

    Args:
        query: ``(B, H, n, p)``.
        key: ``(B, H, n, p)``.
        x: ``(B, H, n, c)``.
        mask: what each row sees.
        degree: of the polynomial.
    """
    own = monomials(query.shape[-1], degree)
    parts = [slice(low, low + _TOGETHER) for low in range(0, len(own.factors), _TOGETHER)]

    def of_features(query: Tensor, key: Tensor, x: Tensor, some: slice) -> Tensor:
        return lowrank_product(evaluated(query, own, some), evaluated(key, own, some), x, mask)

    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, x))
    anew = differentiated and may_make_anew()
    found = []
    together = max(1, _ENTRIES // (query.shape[-2] * min(_TOGETHER, len(own.factors))))
    problems = (tensor.flatten(0, 1).split(together) for tensor in (query, key, x))
    for q, k, values in zip(*problems, strict=True):
        total = torch.zeros_like(values)
        for some in parts:
            if anew:
                # Features are made anew by the backward pass: kept, they would take n r numbers.
                total = total + checkpoint(
                    of_features, q, k, values, some, use_reentrant=False, preserve_rng_state=False
                )
            elif differentiated:
                total = total + of_features(q, k, values, some)
            else:
                total += of_features(q, k, values, some)
        found.append(total)
    return torch.cat(found).view(x.shape)
