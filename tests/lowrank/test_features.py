"""Polynomial features, their error, and the choice of degree and coordinates."""

import itertools
import math

import pytest
import torch

import convbasis as cb
from convbasis.lowrank import feature_count, polynomial_features, truncation_error
from convbasis.lowrank.choice import output_error
from convbasis.lowrank.coordinates import balanced_coordinates, largest_norms
from convbasis.lowrank.features import monomials


def taylor(x, degree):
    return sum(x**g / math.factorial(g) for g in range(degree + 1))


@pytest.mark.parametrize(("d", "degree"), [(1, 5), (3, 0), (3, 1), (4, 2), (5, 4), (2, 7)])
def test_inner_products_are_the_polynomial(d, degree):
    q, k = torch.randn(2, 11, d, dtype=torch.float64), torch.randn(2, 7, d, dtype=torch.float64)
    left, right = polynomial_features(q, degree), polynomial_features(k, degree)
    assert left.shape == (2, 11, feature_count(d, degree))
    assert torch.allclose(left @ right.mT, taylor(q @ k.mT, degree), rtol=1e-11, atol=1e-11)


def test_monomials_come_once_each():
    variables = monomials(4, 3).variables.tolist()
    sorts = {tuple(sorted(row)) for row in variables}
    assert len(sorts) == len(variables) == math.comb(7, 3)
    # Every multiset of three of the four variables and of 1, which stands for fewer.
    assert sorts == set(itertools.combinations_with_replacement(range(5), 3))


def test_gradients_of_features():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: polynomial_features(x, 3), x)


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 6, 11])
@pytest.mark.parametrize("bound", [0.0, 1e-3, 0.5, 2.0, 9.0])
def test_truncation_error_is_the_largest_one(bound, degree):
    x = torch.linspace(-bound, bound, 1001, dtype=torch.float64)
    found = float((taylor(x, degree) / x.exp() - 1).abs().max())
    assert truncation_error(bound, degree) == pytest.approx(found, rel=1e-9, abs=1e-13)


def test_truncation_error_of_anything():
    assert truncation_error(1e4, 2) == math.inf
    assert truncation_error(0.1, 400) == 0.0  # below the smallest number
    assert output_error(3.0, 0.0, 2, 0.0) == math.inf  # the polynomial may be 0
    assert output_error(0.1, 0.0, 2, 0.0) == pytest.approx(truncation_error(0.1, 2), rel=1e-3)
    assert output_error(0.1, 0.2, 2, 0.0) > output_error(0.1, 0.1, 2, 0.0)
    assert output_error(8.0, 0.0, 40, 1e-9) > 1e-9 * math.exp(16.0)  # what cancels is rounded
    assert output_error(400.0, 0.0, 40, 1e-9) == math.inf
    for bad in (-1.0, math.nan, math.inf, "x"):
        with pytest.raises(cb.InputError, match="not a finite number >= 0"):
            truncation_error(bad, 2)


def test_coordinates_keep_logits_and_put_the_largest_first():
    q, k = torch.randn(2, 50, 6, dtype=torch.float64), torch.randn(2, 50, 6, dtype=torch.float64)
    q[..., 2:] *= 1e-3
    k[0, :, 3] = 0.0
    maps = balanced_coordinates(q, k)
    new_q, new_k = q @ maps.of_query, k @ maps.of_key
    assert torch.allclose(new_q @ new_k.mT, q @ k.mT, atol=1e-9)
    singular = torch.linalg.svdvals(q @ k.mT)[..., :6]
    for p in (1, 2, 5):
        rest = new_q[..., p:] @ new_k[..., p:].mT
        best = singular[..., p:].square().sum(-1).sqrt()
        assert torch.allclose(torch.linalg.matrix_norm(rest), best, rtol=1e-3, atol=1e-6)
        (first, left), (first_k, left_k) = largest_norms(new_q), largest_norms(new_k)
        assert bool((rest.abs().amax((-2, -1)) <= left[:, p - 1] * left_k[:, p - 1] + 1e-12).all())
        kept = new_q[..., :p] @ new_k[..., :p].mT
        bound = first[:, p - 1] * first_k[:, p - 1]
        assert bool((kept.abs().amax((-2, -1)) <= bound + 1e-12).all())


@pytest.mark.parametrize(
    ("x", "degree", "words"),
    [
        (torch.ones(2, 3), -1, "degree=-1 is not an integer >= 0"),
        (torch.ones(2, 3), 1.5, "degree=1.5 is not an integer >= 0"),
        (torch.ones(3), 2, r"x has shape \(3,\)"),
        (torch.ones(2, 0), 2, "one at least"),
        (torch.ones(2, 3, dtype=torch.int64), 2, "x has dtype torch.int64"),
    ],
)
def test_bad_features_are_refused(x, degree, words):
    with pytest.raises(cb.InputError, match=words):
        polynomial_features(x, degree)
