"""Polynomial features: exp(q·k) as an inner product of monomials of q and of k, with its error."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_float_tensor, check_nonnegative, check_nonnegative_int, check_positive_int
from ..errors import InputError


def feature_count(dimensions: int, degree: int) -> int:
    """Return the number of monomials of degree <= G in d variables, C(d + G, G).

    Example:
        >>> from convbasis.lowrank import feature_count
        >>> feature_count(64, 2), feature_count(64, 4)
        (2145, 814385)
    """
    return math.comb(dimensions + degree, degree)


def truncation_error(bound: float, degree: int) -> float:
    """Return the largest relative error of the Taylor polynomial of exp on [-bound, bound].

    Args:
        bound: the largest absolute logit, >= 0.
        degree: of the polynomial, >= 0.

    Returns:
        the maximum of ``|P(x) / exp(x) - 1|``, which is at -bound; inf beyond the range of floats.

    Source:
        Lagrange's remainder as an integral: ``P(-M) exp(M) - 1`` is, up to its sign, the integral of
        ``t^G exp(t) / G!`` over 0..M, a sum of positive terms.

    Example:
        >>> from convbasis.lowrank import truncation_error
        >>> round(truncation_error(1.0, 2), 3), round(truncation_error(1.0, 6), 6)
        (0.359, 0.000479)
    """
    check_nonnegative("bound", bound)
    check_nonnegative_int("degree", degree)
    if bound == 0.0:
        return 0.0
    if bound > 700.0:
        return math.inf
    total, term, power = 0.0, 1.0, 0
    for factor in range(1, degree + 1):
        term *= bound / factor
    term *= bound  # M^(G+1) / G!
    while True:
        added = term / (degree + 1 + power)
        total += added
        power += 1
        term *= bound / power
        if power > bound and added <= 1e-17 * total:  # both are 0 where all terms underflow
            return total


class Monomials(NamedTuple):
    """Products of variables, one for each feature."""

    variables: Tensor
    """``(r, G)`` which variables are multiplied; d stands for 1."""
    factors: Tensor
    """``(r,)`` float64, 1 / sqrt of the product of the factorials of their powers."""


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # later calls may record gradients
def monomials(dimensions: int, degree: int) -> Monomials:
    """Return all monomials of degree <= G in d variables, each once."""
    rows = [torch.full((1, degree), dimensions)]
    last = rows[0]
    for power in range(degree):
        # Each monomial times each variable from its last one on: every sorted product, once.
        begin = last[:, power - 1] if power else torch.zeros(1, dtype=torch.int64)
        counts = dimensions - begin
        parents = torch.arange(len(last)).repeat_interleave(counts)
        offset = torch.arange(len(parents)) - (counts.cumsum(0) - counts)[parents]
        last = last[parents].clone()
        last[:, power] = begin[parents] + offset
        rows.append(last)
    variables = torch.cat(rows)
    # Along a sorted product, a variable that comes for the m-th time divides by m.
    logs, run = torch.zeros(len(variables), dtype=torch.float64), torch.zeros(len(variables))
    for at in range(degree):
        same = variables[:, at] == variables[:, at - 1] if at else torch.zeros(len(variables)).bool()
        run = torch.where(same, run + 1, 1.0)
        logs += torch.where(variables[:, at] < dimensions, run.double().log(), 0.0)
    return Monomials(variables, (-0.5 * logs).exp())


def evaluated(x: Tensor, own: Monomials, some: slice) -> Tensor:
    """Return some of the features of x ``(..., n, d)``, ``(..., n, r)``."""
    variables = own.variables[some].to(x.device)
    padded = torch.nn.functional.pad(x, (0, 1), value=1.0)
    found = own.factors[some].to(x.dtype).to(x.device)
    for at in range(variables.shape[1]):
        found = found * padded.index_select(-1, variables[:, at])
    return found.expand(*x.shape[:-1], len(variables))


def polynomial_features(x: Tensor, degree: int) -> Tensor:
    """Return features whose inner product is the Taylor polynomial of exp at the inner product.

    ``polynomial_features(q, G) @ polynomial_features(k, G).mT`` is ``sum of (q·k)^g / g!`` for g <= G:
    symmetric products once each, with the root of their multiplicity.

    Args:
        x: ``(..., n, d)``; put a scale of the logits into q.
        degree: G. Use an even one: odd Taylor polynomials of exp are negative somewhere.

    Returns:
        ``(..., n, C(d + G, G))``, dtype of x.

    Raises:
        InputError: no floating-point tensor, or a degree that is no integer >= 0.

    Complexity:
        O(n C(d + G, G) G) time.

    Source:
        "Masked low rank" of docs/mathematics.md: the polynomial method (Alman & Song; Conv-Basis,
        section 6).

    Example:
        >>> import torch
        >>> from convbasis.lowrank import polynomial_features
        >>> q, k = torch.tensor([[0.5, 0.1]]), torch.tensor([[0.2, -0.3]])
        >>> x = float(q @ k.mT)
        >>> found = polynomial_features(q, 2) @ polynomial_features(k, 2).mT
        >>> abs(float(found) - (1 + x + x**2 / 2)) < 1e-6
        True
    """
    check_float_tensor("x", x)
    check_nonnegative_int("degree", degree)
    if x.ndim < 2:
        raise InputError(f"x has shape {tuple(x.shape)}; (..., n, d) is wanted")
    check_positive_int("the number of variables", x.shape[-1], "one at least")
    return evaluated(x, monomials(x.shape[-1], degree), slice(None))
