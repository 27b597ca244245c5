"""Random features against the exponential that they stand for."""

import pytest
import torch

import convbasis as cb
from convbasis.lowrank import CausalMask, random_features


def draw(*shape, dtype=torch.float64):
    return torch.randn(2, *shape, dtype=dtype).unbind()


def averages(u1, u2, v, mask):
    sums = cb.masked_lowrank_matmul(u1, u2, torch.nn.functional.pad(v, (0, 1), value=1.0), mask)
    return sums[..., :-1] / sums[..., -1:]


@pytest.mark.parametrize("scale", [None, 0.7, -0.4])
def test_products_are_exponentials_up_to_a_factor_for_each_query(scale):
    q, k = (0.4 * x for x in draw(2, 30, 3))
    found = [random_features(q, k, 20_000, scale=scale, seed=seed) for seed in range(3)]
    products = sum(u1 @ u2.mT for u1, u2 in found) / 3
    wanted = (q @ k.mT * (3**-0.5 if scale is None else scale)).exp()
    shares, expected = (x / x.sum(-1, keepdim=True) for x in (products, wanted))
    assert (shares / expected - 1).abs().max() < 0.1
    assert (shares / expected - 1).square().mean().sqrt() < 0.02


def test_more_features_are_better_and_a_seed_gives_the_same():
    q, k = draw(1, 200, 4)
    v = torch.randn(1, 200, 3, dtype=torch.float64)
    mask = CausalMask(200)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    errors = [
        sum(
            float((averages(*random_features(q, k, count, seed=seed), v, mask) - exact).norm())
            for seed in range(5)
        )
        for count in (500, 8000)
    ]
    assert errors[1] < 0.5 * errors[0]
    one, other = (random_features(q, k, 10, seed=seed)[0] for seed in (0, 1))
    assert torch.equal(one, random_features(q, k, 10)[0])
    assert not torch.equal(one, other)


def test_gradients_and_dtypes():
    q, k = (x.requires_grad_() for x in draw(5, 2))
    v = torch.randn(5, 2, dtype=torch.float64)
    call = lambda q, k: averages(*random_features(q, k, 500), v, CausalMask(5))  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        u1, u2 = random_features(q.detach().to(dtype), k.detach().to(dtype), 6)
        assert u1.dtype == u2.dtype == dtype
    large = torch.full((3, 2), 40.0)  # exp of its norm is beyond every number
    u1, u2 = random_features(large, large, 6, scale=1.0)
    assert all(bool(u.isfinite().all()) for u in (u1, u2))
    assert random_features(torch.ones(0, 2), torch.ones(0, 2), 6)[1].shape == (0, 6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.ones(2)}, r"query has shape \(2,\)"),
        ({"key": torch.ones(3, 4)}, r"key \(3, 4\); \(\.\.\., n, d\) of one d are wanted"),
        ({"key": torch.ones(3, 2).double()}, "key has dtype torch.float64 but query has"),
        ({"key": torch.full((3, 2), torch.nan)}, "key holds 6 NaN or Inf"),
        ({"count": 0}, "count=0 is not a positive integer"),
        ({"seed": -1}, "seed=-1 is not an integer >= 0"),
        ({"scale": "x"}, "scale='x' is not a finite number"),
    ],
)
def test_bad_input_is_refused(change, words):
    given = {"query": torch.ones(3, 2), "key": torch.ones(3, 2), "count": 4} | change
    query, key, count = (given.pop(name) for name in ("query", "key", "count"))
    with pytest.raises(cb.InputError, match=words):
        random_features(query, key, count, **given)
