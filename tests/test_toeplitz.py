"""causal_toeplitz_matmul against the dense matrix and an independent library."""

import pytest
import torch
from comparison import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz

import convbasis as cb

LIMITS = {torch.float64: (1e-12, 1e-9), torch.float32: (1e-6, 1e-4)}


def dense(kernel):
    first_row = torch.zeros(len(kernel))
    return torch.from_numpy(toeplitz(kernel.double().numpy(), first_row.numpy())).tril()


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 17, 97, 128, 500, 1000, 3001])
def test_equals_the_dense_product(n, dtype):
    whole, row = LIMITS[dtype]
    kernel, x = draw(n, dtype=dtype), draw(n, 4, dtype=dtype, seed=1)
    exact = dense(kernel) @ x.double()
    for _ in range(2):
        result = cb.causal_toeplitz_matmul(kernel, x)
        assert result.dtype == dtype
        scale = dense(kernel).abs() @ torch.linalg.vector_norm(x.double(), dim=-1)
        assert_close(exact, result, whole=whole, row=row, row_scale=scale)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 5), st.integers(0, 2**31))
def test_property_any_length(n, columns, seed):
    kernel, x = draw(n, seed=seed), draw(n, columns, seed=seed + 1)
    exact = dense(kernel) @ x
    error = (cb.causal_toeplitz_matmul(kernel, x) - exact).norm()
    assert error <= 1e-12 * (dense(kernel).abs() @ x.abs()).norm()


def test_it_is_linear_causal_and_not_symmetric():
    kernel, x, y = draw(300), draw(300, 2, seed=1), draw(300, 2, seed=2)
    apply = lambda z: cb.causal_toeplitz_matmul(kernel, z)  # noqa: E731
    combined = apply(2.0 * x - 3.0 * y)
    assert (combined - (2.0 * apply(x) - 3.0 * apply(y))).norm() <= 1e-12 * combined.norm()
    changed = x.clone()
    changed[200:] = 1e3
    assert (apply(changed)[:200] - apply(x)[:200]).abs().max() <= 1e-9
    upper = dense(kernel).T @ x
    assert (apply(x) - upper).norm() > 0.1 * upper.norm()


def test_shapes():
    kernel, x = draw(50), draw(50, seed=1)
    assert (cb.causal_toeplitz_matmul(kernel, x) - dense(kernel) @ x).abs().max() < 1e-12
    batch = draw(3, 1, 50, 4, seed=2)
    result = cb.causal_toeplitz_matmul(kernel, batch)
    assert result.shape == (3, 1, 50, 4)
    assert (result - dense(kernel) @ batch).abs().max() < 1e-12
    kernels = draw(2, 50, seed=3)
    result = cb.causal_toeplitz_matmul(kernels, batch)
    assert result.shape == (3, 2, 50, 4)
    for i in range(2):
        assert (result[:, i] - dense(kernels[i]) @ batch[:, 0]).abs().max() < 1e-12
    assert cb.causal_toeplitz_matmul(kernel, draw(0, 50, 4)).shape == (0, 50, 4)
    assert cb.causal_toeplitz_matmul(draw(0), draw(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    kernel, x = draw(200, dtype=dtype), draw(200, 3, dtype=dtype, seed=1)
    result = cb.causal_toeplitz_matmul(kernel, x)
    assert result.dtype == dtype
    exact = dense(kernel) @ x.double()
    assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("shapes", [((12,), (12,)), ((12,), (2, 12, 3)), ((2, 12), (12, 2))], ids=str)
def test_gradients(shapes):
    kernel, x = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    assert torch.autograd.gradcheck(cb.causal_toeplitz_matmul, (kernel, x))


def test_gradients_of_a_long_product_are_those_of_the_dense_matrix():
    kernel, x = draw(3000).requires_grad_(), draw(3000, 2, seed=1).requires_grad_()
    lag = torch.arange(3000)[:, None] - torch.arange(3000)
    matrix = kernel[lag.clamp(min=0)] * (lag >= 0)
    weight = draw(3000, 2, seed=2)
    expected = torch.autograd.grad((matrix @ x * weight).sum(), (kernel, x))
    product = cb.causal_toeplitz_matmul(kernel, x)
    assert cb.last_dispatch().backend != "direct"
    found = torch.autograd.grad((product * weight).sum(), (kernel, x))
    for one, other in zip(expected, found, strict=True):
        assert (one - other).norm() <= 1e-12 * one.norm()


@pytest.mark.parametrize(
    ("kernel", "x", "message"),
    [
        ([1.0], torch.zeros(1), "kernel is a list"),
        (torch.zeros(3), torch.zeros(4), "same n"),
        (torch.zeros(3), torch.zeros(4, 1), "same n"),
        (torch.zeros(2, 3), torch.zeros(3), "same n"),
        (torch.zeros(()), torch.zeros(3, 1), "same n"),
        (torch.zeros(2, 3), torch.zeros(5, 3, 1), "do not broadcast"),
        (torch.zeros(3), torch.zeros(3, 1, dtype=torch.float64), "float64 but kernel"),
        (torch.full((3,), torch.nan), torch.zeros(3, 1), "kernel holds 3 NaN"),
        (torch.zeros(3), torch.full((3, 1), torch.inf), "x holds 3 NaN or Inf"),
    ],
)
def test_bad_input(kernel, x, message):
    with pytest.raises(cb.InputError, match=message):
        cb.causal_toeplitz_matmul(kernel, x)
