"""Masked products against the dense ones, forwards and backwards."""

import pytest
import torch
from comparison import assert_close
from lowrank_masks import KINDS, SEES, random_changes
from torch.utils._python_dispatch import TorchDispatchMode

import convbasis as cb
from convbasis.errors import ConvBasisError
from convbasis.lowrank import CausalMask, IntervalMask, RowChangeMask, SlidingWindowMask, prefix, ranges


def oracle(u1, u2, x, dense):
    return (u1.double() @ u2.double().mT * dense) @ x.double()


def close(u1, u2, x, dense, actual):
    """Compare; a row's error is compared with what it would be if nothing cancelled."""
    expected = oracle(u1, u2, x, dense)
    exact = x.dtype == torch.float64
    tolerance = 1e-10 if exact else 1e-5
    scale = oracle(u1.abs(), u2.abs(), x.abs(), dense).norm(dim=-1)
    assert_close(expected, actual, whole=tolerance, row=tolerance, row_scale=scale)
    assert (actual[..., ~dense.any(1), :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 129, 257, 1009])
def test_products(n, name, dtype):
    mask, dense = KINDS[name](n)
    for _ in range(2):  # the first call and a later one
        u1, u2, x = (
            torch.randn(n, 5, dtype=dtype),
            torch.randn(n, 5, dtype=dtype),
            torch.randn(n, 8, dtype=dtype),
        )
        close(u1, u2, x, dense, cb.masked_lowrank_matmul(u1, u2, x, mask))
        close(u1, u2, x, dense.mT, mask.product(u1[None], u2[None], x[None], True)[0])


@pytest.mark.parametrize("name", ["causal", "window", "far", "intervals", "documents"])
def test_long_products(name):
    n = 2503
    generator = torch.Generator().manual_seed(3)
    masks = {
        "causal": CausalMask(n),
        "window": SlidingWindowMask(n, 777),
        "far": IntervalMask(torch.zeros(n).long(), torch.arange(n) - 300),
        "intervals": IntervalMask(*torch.randint(0, n, (2, n), generator=generator)),
        "documents": cb.lowrank.DocumentMask([1, 1200, 1000, 302]),
    }
    u1, u2, x = torch.randn(n, 8), torch.randn(n, 8), torch.randn(n, 9)
    dense = masks[name].to_dense()
    close(u1, u2, x, dense, cb.masked_lowrank_matmul(u1, u2, x, masks[name]))
    close(u1, u2, x, dense.mT, masks[name].product(u1[None], u2[None], x[None], True)[0])


@pytest.mark.parametrize("name", SEES)
def test_rows_of_long_products(name):
    """A prime number of tokens, too large for a dense oracle: sampled rows, and the transpose."""
    n = 20_011
    mask, sees = SEES[name](n)
    rows = [0, 1, n - 2, n - 1, *torch.randint(0, n, (40,)).tolist()]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        u1, u2, x = (torch.randn(n, c, dtype=dtype) for c in (5, 5, 3))
        found = cb.masked_lowrank_matmul(u1, u2, x, mask)
        for row in rows:
            keys = list(sees(row))
            weights, values = u2[keys].double() @ u1[row].double(), x[keys].double()
            scale = (u2[keys].double().abs() @ u1[row].double().abs()) @ values.abs()
            assert (found[row] - weights @ values).norm() <= tolerance * scale.norm()
        # <up, W x> is <W^T up, x> for every up: what rows say of the transpose.
        up = torch.randn(n, 3, dtype=dtype)
        back = mask.product(u2[None], u1[None], up[None], True)[0]
        one, other = ((a.double() * b.double()).sum() for a, b in ((up, found), (back, x)))
        size = (up.double().norm() * found.double().norm()).clamp(min=1.0)
        assert abs(one - other) <= tolerance * size


@pytest.mark.parametrize("name", ["far", "intervals", "changes"])
def test_features_by_parts_give_the_same(name, monkeypatch):
    monkeypatch.setattr(ranges, "_STATES", 400)
    monkeypatch.setattr(ranges, "_ENTRIES", 4000)
    mask, dense = KINDS[name](800)
    u1, u2, x = torch.randn(2, 800, 7), torch.randn(2, 800, 7), torch.randn(2, 800, 6)
    close(u1, u2, x, dense, cb.masked_lowrank_matmul(u1, u2, x, mask))
    close(u1, u2, x, dense.mT, mask.product(u1, u2, x, True))


def test_nothing_cancels_in_a_window_far_from_the_beginning():
    """Positive entries whose prefix sums are 1,000 times a window's: differences would lose 1e-4."""
    n = 60_000
    mask = SlidingWindowMask(n, 50)
    u1, u2, x = torch.rand(n, 4) + 1, torch.rand(n, 4) + 1, torch.rand(n, 3)
    found = cb.masked_lowrank_matmul(u1, u2, x, mask)
    rows = torch.arange(n - 500, n)
    keys = rows[:, None] + torch.arange(-49, 1)
    expected = torch.einsum("ir,ijr,ijc->ic", u1[rows].double(), u2[keys].double(), x[keys].double())
    assert_close(expected, found[rows], whole=1e-6, row=1e-6)


@pytest.mark.parametrize(("chunk", "shapes"), [(None, [(2, 9, 3), (2, 9, 2)]), (2, [(9, 2), (9, 1)])])
@pytest.mark.parametrize("name", KINDS)
def test_gradients(name, chunk, shapes, monkeypatch):
    if chunk is not None:  # chunks, and groups of them, within few tokens
        monkeypatch.setattr(ranges, "CHUNK", chunk)
        monkeypatch.setattr(prefix, "CHUNK", chunk)
    mask = KINDS[name](9)[0]
    features, columns = shapes
    factors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in (features, features, columns)
    ]
    call = lambda *own: cb.masked_lowrank_matmul(*own, mask)  # noqa: E731
    assert torch.autograd.gradcheck(call, factors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, factors)


@pytest.mark.parametrize("name", KINDS)
def test_long_gradients(name):
    mask, dense = KINDS[name](301)
    factors = [torch.randn(301, c, dtype=torch.float64, requires_grad=True) for c in (6, 6, 5)]
    up = torch.randn(301, 5, dtype=torch.float64)
    found = torch.autograd.grad(cb.masked_lowrank_matmul(*factors, mask), factors, up)
    wanted = torch.autograd.grad(oracle(*factors, dense), factors, up)
    for expected, actual in zip(wanted, found, strict=True):
        assert_close(expected, actual, whole=1e-10, row=1e-9)


def test_batches_broadcast_and_strides_do_not_matter():
    mask, dense = KINDS["window"](70)
    u1, u2 = torch.randn(3, 1, 4, 70).mT, torch.randn(70, 4)
    x = torch.randn(2, 70, 10)[..., ::2]
    found = cb.masked_lowrank_matmul(u1, u2, x, mask)
    assert found.shape == (3, 2, 70, 5)
    close(u1, u2, x, dense, found)
    assert torch.allclose(found[1, 0], cb.masked_lowrank_matmul(u1[1, 0], u2, x[0], mask), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    mask = CausalMask(200)
    u1, u2, x = (torch.randn(200, 4).to(dtype) for _ in range(3))
    found = cb.masked_lowrank_matmul(u1, u2, x, mask)
    assert found.dtype == dtype
    expected = cb.masked_lowrank_matmul(u1.float(), u2.float(), x.float(), mask)
    assert torch.equal(found, expected.to(dtype))


def test_vmap_and_grad_of_torch_func():
    mask, dense = KINDS["changes"](20)
    u1, u2, x = (torch.randn(4, 20, 3, dtype=torch.float64) for _ in range(3))
    mapped = torch.func.vmap(lambda a, b, c: cb.masked_lowrank_matmul(a, b, c, mask))
    close(u1, u2, x, dense, mapped(u1, u2, x))
    shared = torch.func.vmap(lambda c: cb.masked_lowrank_matmul(u1[0], u2[0], c, mask))
    close(u1[0], u2[0], x, dense, shared(x))
    loss = lambda a: cb.masked_lowrank_matmul(a, u2[0], x[0], mask).sum()  # noqa: E731
    expected = torch.func.grad(lambda a: oracle(a, u2[0], x[0], dense).sum())(u1[0])
    assert torch.allclose(torch.func.grad(loss)(u1[0]), expected)
    with pytest.raises(ConvBasisError, match="forward mode over forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(loss))(u1[0])


def test_later_tokens_do_not_reach_earlier_rows():
    n = 300
    u1, u2, x = torch.randn(n, 4), torch.randn(n, 4), torch.randn(n, 3)
    for name in ("causal", "window", "far", "documents", "groups"):
        mask, _ = KINDS[name](n)
        before = cb.masked_lowrank_matmul(u1, u2, x, mask)
        changed = [tensor.clone() for tensor in (u1, u2, x)]
        for tensor in changed:
            tensor[200:] = 1e4
        after = cb.masked_lowrank_matmul(*changed, mask)
        assert torch.equal(before[:200], after[:200]), name
        assert not torch.equal(before[200:], after[200:]), name


def test_empty_things_are_zeros():
    mask = RowChangeMask([[], []], [[], []])
    ones = torch.ones(2, 3)
    assert torch.equal(cb.masked_lowrank_matmul(ones, ones, ones, mask), torch.zeros(2, 3))
    assert cb.masked_lowrank_matmul(ones, ones, torch.ones(2, 0), mask).shape == (2, 0)
    none = cb.masked_lowrank_matmul(torch.ones(2, 0), torch.ones(2, 0), ones, CausalMask(2))
    assert torch.equal(none, torch.zeros(2, 3))
    additions, removals, _ = random_changes(2)
    assert cb.masked_lowrank_matmul(
        torch.ones(0, 2, 3), ones, ones, RowChangeMask(additions, removals)
    ).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u1": [1.0]}, "u1 is a list; a torch.Tensor is wanted"),
        ({"u1": torch.ones(3)}, r"u1 has shape \(3,\); \(\.\.\., n, columns\) is wanted"),
        ({"u2": torch.ones(3, 4)}, r"u1 and u2 must be \(\.\.\., n, r\)"),
        ({"x": torch.ones(4, 2)}, "all of the mask's n"),
        ({"mask": CausalMask(4)}, "mask 4 tokens"),
        ({"mask": torch.ones(3, 3)}, "mask is a torch.float32 tensor"),
        ({"x": torch.ones(3, 2, dtype=torch.float64)}, "x has dtype torch.float64 but u1"),
        ({"x": torch.full((3, 2), torch.nan)}, "x holds 6 NaN or Inf"),
        ({"u1": torch.ones(2, 3, 2), "x": torch.ones(5, 3, 2)}, "do not broadcast"),
    ],
)
def test_bad_input_is_refused(change, words):
    given = {
        "u1": torch.ones(3, 2),
        "u2": torch.ones(3, 2),
        "x": torch.ones(3, 2),
        "mask": CausalMask(3),
    }
    with pytest.raises(cb.InputError, match=words):
        cb.masked_lowrank_matmul(**(given | change))


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("name", ["causal", "intervals", "changes", "rows"])
def test_memory_is_that_of_the_factors(name):
    """Neither n·n nor n·r·c numbers, forwards and backwards, where states would take the most."""
    n, r, c = 3200, 64, 64
    mask = KINDS[name](n)[0]
    factors = [torch.randn(n, columns, requires_grad=True) for columns in (r, r, c)]
    mask.product(*(x.detach()[None] for x in factors), False)  # what is made once is no matter
    with Largest() as largest:
        cb.masked_lowrank_matmul(*factors, mask).sum().backward()
    changes = len(mask.keys) if name == "changes" else n
    assert n * c <= largest.numbers <= max(4 * max(n, changes) * c, 2**21 + 2**18)
    assert largest.numbers < min(n * r * c, n * n) / 4
