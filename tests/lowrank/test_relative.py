"""Low rank times conv: products, attention with relative bias, rotary positions."""

import pytest
import torch
from comparison import assert_close

import convbasis as cb
from convbasis.lowrank import (
    CausalMask,
    lowrank_toeplitz_matmul,
    polynomial_features,
    relative,
    relative_attention,
    rotary_features,
)


def toeplitz(kernel):
    n = kernel.shape[-1]
    lag = torch.arange(n)[:, None] - torch.arange(n)
    return torch.where(lag >= 0, kernel.double()[..., lag.clamp(min=0)], 0.0)


def dense(u1, u2, kernel, x):
    return (u1.double() @ u2.double().mT * toeplitz(kernel)) @ x.double()


def positive_features(n, d, dtype=torch.float64):
    return tuple(polynomial_features(0.4 * torch.randn(n, d, dtype=dtype), 2) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 101, 1024, 2003])
def test_products(n, dtype):
    for _ in range(2):
        u1, u2, x = (torch.randn(n, c, dtype=dtype) for c in (3, 3, 4))
        kernel = torch.randn(n, dtype=dtype)
        found = lowrank_toeplitz_matmul(u1, u2, kernel, x)
        scale = dense(u1.abs(), u2.abs(), kernel.abs(), x.abs()).norm(dim=-1)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        expected = dense(u1, u2, kernel, x)
        assert_close(expected, found, whole=tolerance, row=tolerance, row_scale=scale)


def test_features_by_parts_and_batches_give_the_same(monkeypatch):
    u1, u2, x = torch.randn(2, 1, 90, 5), torch.randn(90, 5), torch.randn(3, 90, 4)
    kernel = torch.randn(2, 1, 90)
    whole = lowrank_toeplitz_matmul(u1, u2, kernel, x)
    assert whole.shape == (2, 3, 90, 4)
    assert_close(dense(u1, u2, kernel, x), whole, whole=1e-6, row=1e-4)
    monkeypatch.setattr(relative, "_ENTRIES", 5000)
    parts = lowrank_toeplitz_matmul(u1, u2, kernel, x)
    assert_close(whole, parts, whole=1e-6, row=1e-4)


def test_gradients():
    factors = [torch.randn(2, 7, 3, dtype=torch.float64) for _ in range(2)]
    factors += [torch.randn(7, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)]
    for factor in factors:
        factor.requires_grad_()
    assert torch.autograd.gradcheck(lowrank_toeplitz_matmul, factors)
    u1, u2 = (x.requires_grad_() for x in positive_features(7, 2))
    attention = [u1, u2, factors[3], factors[2]]
    assert torch.autograd.gradcheck(relative_attention, attention)


def test_long_gradients():
    factors = [torch.randn(700, c, dtype=torch.float64, requires_grad=True) for c in (3, 3, 4)]
    kernel = torch.randn(700, dtype=torch.float64, requires_grad=True)
    factors.insert(2, kernel)
    up = torch.randn(700, 4, dtype=torch.float64)
    found = torch.autograd.grad(lowrank_toeplitz_matmul(*factors), factors, up)
    wanted = torch.autograd.grad(dense(*factors), factors, up)
    for expected, actual in zip(wanted, found, strict=True):
        assert torch.allclose(expected, actual, rtol=1e-9, atol=1e-9)


def test_a_second_derivative_is_refused():
    factors = [torch.randn(5, 2, requires_grad=True) for _ in range(2)]
    kernel, x = torch.randn(5), torch.randn(5, 1)
    output = lowrank_toeplitz_matmul(*factors, kernel, x).square().sum()
    (first,) = torch.autograd.grad(output, factors[:1], create_graph=True)
    with pytest.raises(cb.ConvBasisError, match="differentiated once more"):
        first.sum().backward()
    with pytest.raises(cb.InputError, match=r"does not run under transforms of torch\.func"):
        torch.func.grad(lambda u: lowrank_toeplitz_matmul(u, u, kernel, x).sum())(factors[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 97, 2048])
def test_attention_with_a_relative_bias(n, dtype):
    u1, u2 = positive_features(n, 3, dtype)
    value, bias = torch.randn(n, 4, dtype=dtype), -torch.rand(n, dtype=dtype) * 3 + 200
    found = relative_attention(u1, u2, value, bias)
    weights = u1.double() @ u2.double().mT * toeplitz((bias.double() - 200).exp())
    expected = weights @ value.double() / weights.sum(-1, keepdim=True)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_close(expected, found, whole=tolerance, row=tolerance, row_scale=torch.ones(n))
    half = relative_attention(*(x.bfloat16() for x in (u1, u2, value, bias - 200)))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_long_attention_with_a_relative_bias(dtype):
    n = 65_536
    u1, u2 = positive_features(n, 1, dtype)
    value, bias = torch.randn(n, 2, dtype=dtype), -torch.rand(n, dtype=dtype) * 3
    found = relative_attention(u1, u2, value, bias)
    for row in [0, 1, n - 1, *torch.randint(0, n, (30,)).tolist()]:
        weights = u2[: row + 1].double() @ u1[row].double()
        weights *= bias[: row + 1].double().exp().flip(0)
        expected = weights @ value[: row + 1].double() / weights.sum()
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        assert (found[row] - expected).norm() <= tolerance


def test_rotary_positions_are_low_rank_times_cosines_and_sines():
    n, r = 120, 6
    u1, u2, x = (torch.randn(n, c, dtype=torch.float64) for c in (r, r, 3))
    found = cb.masked_lowrank_matmul(
        rotary_features(u1, base=50.0), rotary_features(u2, base=50.0), x, CausalMask(n)
    )
    lags = torch.arange(n, dtype=torch.float64)
    expected = torch.zeros(n, 3, dtype=torch.float64)
    for p in range(r // 2):
        pair = [p, p + r // 2]
        angle = lags * 50.0 ** (-2 * p / r)
        crossed = torch.stack([-u2[:, pair[1]], u2[:, pair[0]]], dim=1)
        expected += lowrank_toeplitz_matmul(u1[:, pair], u2[:, pair], angle.cos(), x)
        expected += lowrank_toeplitz_matmul(u1[:, pair], crossed, angle.sin(), x) * -1
    assert_close(expected, found, whole=1e-10, row=1e-9)


def test_earlier_rows_do_not_see_later_tokens():
    u1, u2 = positive_features(300, 2)
    value, bias = torch.randn(300, 3, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    before = relative_attention(u1, u2, value, bias)
    value[200:] = 5.0
    u1[200:], u2[200:] = 2.0 * u1[200:], 3.0 * u2[200:]
    after = relative_attention(u1, u2, value, bias)
    assert torch.allclose(before[:200], after[:200], rtol=1e-10)
    assert not torch.allclose(before[200:], after[200:])


def test_empty_things():
    ones = torch.ones(4, 2)
    assert lowrank_toeplitz_matmul(ones, ones, ones[:, 0], torch.ones(4, 0)).shape == (4, 0)
    nothing = torch.ones(0, 2)
    assert relative_attention(nothing, nothing, nothing, torch.ones(0)).shape == (0, 2)
    none = lowrank_toeplitz_matmul(torch.ones(4, 0), torch.ones(4, 0), ones[:, 0], ones)
    assert torch.equal(none, torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u1": torch.ones(3)}, r"u1 \(3,\)"),
        ({"kernel": torch.ones(2)}, r"kernel \(2,\)"),
        ({"x": torch.ones(2, 3, 2), "u1": torch.ones(5, 3, 2)}, "batch dimensions do not broadcast"),
        ({"kernel": torch.full((3,), torch.nan)}, "kernel holds 3 NaN or Inf"),
        ({"x": "x"}, "x is 'x'"),
    ],
)
def test_bad_input_is_refused(change, words):
    given = {name: torch.ones(3, 2) for name in ("u1", "u2", "x")} | {"kernel": torch.ones(3)}
    with pytest.raises(cb.InputError, match=words):
        lowrank_toeplitz_matmul(**(given | change))


def test_bad_attention_is_refused():
    ones = torch.ones(3, 2)
    with pytest.raises(cb.ConvBasisError, match=r"the normaliser of row \[0\] is -2"):
        relative_attention(ones, -ones, ones, torch.zeros(3))
    with pytest.raises(
        cb.InputError, match=r"lag_bias \(3,\), value \(3,\); .* value \(\.\.\., n, c\)"
    ):
        relative_attention(ones, ones, torch.ones(3), torch.zeros(3))
    with pytest.raises(cb.InputError, match=r"lag_bias \(2,\), value \(3, 2\)"):
        relative_attention(ones, ones, ones, torch.zeros(2))
    with pytest.raises(cb.InputError, match="lag_bias holds 3 NaN or Inf"):
        relative_attention(ones, ones, ones, torch.full((3,), torch.nan))
    with pytest.raises(cb.InputError, match=r"relative_attention does not run under .*torch\.func"):
        torch.func.grad(lambda u: relative_attention(u, u, ones, torch.zeros(3)).sum())(ones)
    with pytest.raises(cb.InputError, match=r"u has shape \(3, 1\)"):
        rotary_features(torch.ones(3, 1))
    for base, words in ((-2.0, "base=-2.0 is not"), (0.0, "base=0 is not positive"), ("x", "base='x'")):
        with pytest.raises(cb.InputError, match=words):
            rotary_features(ones, base=base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    """Sums over 3,000 keys are beyond the range of float16; averages are not."""
    u1, u2, value = (torch.rand(3000, c) * 4 + 4 for c in (2, 2, 3))
    given = [x.to(dtype) for x in (u1, u2, value, torch.linspace(0, -2, 3000))]
    found = relative_attention(*given)
    assert found.dtype == dtype
    expected = relative_attention(*(x.float() for x in given))
    assert torch.equal(found, expected.to(dtype))
    turned = rotary_features(given[0])
    assert torch.equal(turned, rotary_features(given[0].float()).to(dtype))


@pytest.mark.parametrize("first", [-60.0, -103.0])
def test_rows_whose_lags_weigh_next_to_nothing_are_right_or_refused(first):
    value, bias = torch.randn(50, 2), torch.zeros(50)
    bias[:20] = first
    ones = torch.ones(50, 1)
    if first < -100:
        with pytest.raises(cb.ConvBasisError, match="lag_bias must not leave a row without weight"):
            relative_attention(ones, ones, value, bias)
    else:
        found = relative_attention(ones, ones, value, bias)
        assert torch.allclose(found[:2], torch.stack([value[0], value[:2].mean(0)]), atol=1e-5)


def test_a_normaliser_beyond_all_numbers_is_refused():
    large = torch.full((3, 1), 3e19)
    with pytest.raises(cb.ConvBasisError, match=r"the normaliser of row \[0\] is inf"):
        relative_attention(large, large, torch.ones(3, 1), torch.zeros(3))
