"""The comparison itself must be able to fail."""

import pytest
import torch
from comparison import assert_close, errors


def test_equal_tensors_pass():
    x = torch.randn(5, 3)
    assert_close(x, x.clone(), whole=0.0, row=0.0)


def test_one_wrong_row_among_many_fails():
    x = torch.randn(100_000, 4)
    y = x.clone()
    y[77] = 0.0
    assert errors(x, y)["rms"] < 5e-3
    with pytest.raises(AssertionError, match="worst row"):
        assert_close(x, y, whole=1.0, row=1e-2)


def test_small_wrong_row_beside_large_ones_fails():
    x = torch.ones(10, 2)
    x[3] = 1e-6
    y = x.clone()
    y[3] = 2e-6
    with pytest.raises(AssertionError):
        assert_close(x, y, whole=1e-4, row=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_fail(bad):
    x = torch.randn(4, 2)
    y = x.clone()
    y[1, 1] = bad
    with pytest.raises(AssertionError):
        assert_close(x, y, whole=1e9, row=1e9)


def test_all_zero_result_fails():
    x = torch.randn(4, 2)
    with pytest.raises(AssertionError):
        assert_close(x, torch.zeros_like(x), whole=0.5, row=0.5)


def test_something_where_zero_is_wanted_fails():
    x = torch.zeros(4, 2)
    with pytest.raises(AssertionError):
        assert_close(x, x + 1e-9, whole=1e-3, row=1e-3)


def test_shapes_and_emptiness_fail():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(2, 2), torch.ones(2, 1), whole=9.0, row=9.0)
    with pytest.raises(AssertionError, match="nothing"):
        assert_close(torch.ones(0, 2), torch.ones(0, 2), whole=9.0, row=9.0)
