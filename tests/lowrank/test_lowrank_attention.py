"""lowrank_attention against exact attention under the same mask, and against its own polynomial."""

import math

import pytest
import torch
from comparison import assert_close
from lowrank_masks import KINDS

import convbasis as cb
from convbasis.lowrank import CausalMask, SlidingWindowMask, lowrank_attention_stats
from convbasis.lowrank import attention as module


def dense(q, k, v, mask, weigh=torch.exp, scale=None):
    """Return output and log-sum-exp in float64; rows that see nothing give 0 and -inf."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = weigh(q.double() @ k.mT * factor) * mask
    total = weights.sum(-1, keepdim=True)
    output = torch.where(total > 0, weights @ v / total.clamp(min=1e-300), 0.0)
    return output, total[..., 0].log()


def taylor(degree):
    return lambda x: sum(x**g / math.factorial(g) for g in range(degree + 1))


def draw(batch, heads, n, d, d_v, dtype=torch.float64, kv_heads=None, size=0.5):
    q = size * torch.randn(batch, heads, n, d, dtype=dtype)
    k = torch.randn(batch, kv_heads or heads, n, d, dtype=dtype)
    return q, k, torch.randn(batch, kv_heads or heads, n, d_v, dtype=dtype)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_polynomial_under_every_mask(name):
    mask, visible = KINDS[name](83)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        q, k, v = draw(2, 4, 83, 5, 3, dtype, kv_heads=2)
        found = lowrank_attention_stats(q, k, v, mask, degree=4, enable_gqa=True)
        output, lse = dense(q, k, v, visible, taylor(4))
        scale = torch.ones(found.output.shape[:-1])  # rows of averages of numbers near 1
        assert_close(output, found.output, whole=tolerance, row=tolerance, row_scale=scale)
        assert torch.equal(found.lse == -math.inf, lse == -math.inf)
        seen = lse > -math.inf
        assert torch.allclose(found.lse[seen].double(), lse[seen], atol=tolerance)
        assert (found.degree, found.rank, found.features) == (4, 5, 126)


@pytest.mark.parametrize("seed", range(200))
def test_the_tolerance_is_kept(seed):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return low * (high / low) ** float(torch.rand((), generator=generator))

    n, d = int(number(2, 120)), int(number(1, 12.99))
    tolerance = number(1e-4, 0.3)
    q, k, v = torch.randn(3, 1, 2, n, d, generator=generator).unbind()
    logits = (q @ k.mT * d**-0.5).abs().max()
    q = q / logits * number(0.02, 0.6)
    if seed % 4 == 0:  # values that do not average out
        v = v.sign() * q[..., :1].sign() + 3.0
    name = list(KINDS)[seed % len(KINDS)]
    mask, visible = KINDS[name](n)
    found = lowrank_attention_stats(q, k, v, mask, tolerance=tolerance, max_features=20_000)
    assert found.error_bound <= tolerance
    exact, _ = dense(q, k, v, visible)
    off = (found.output.double() - exact).norm(dim=-1).max()
    assert off <= tolerance * v.norm(dim=-1).max()


def test_the_tolerance_is_kept_or_refused_where_rounding_counts():
    """Few dimensions admit high degrees, whose terms cancel in float32."""
    refused = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)

        def number(low, high, generator=generator):
            return low * (high / low) ** float(torch.rand((), generator=generator))

        n, d, tolerance = int(number(2, 120)), 1 + seed % 3, number(1e-4, 0.3)
        q, k, v = torch.randn(3, 1, 1, n, d, generator=generator).unbind()
        if seed % 2:  # all as far as the bound, many at its negative end
            q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
        q = q / (q @ k.mT * d**-0.5).abs().max() * number(0.02, 9.0)
        name = list(KINDS)[seed % len(KINDS)]
        mask, visible = KINDS[name](n)
        try:
            found = lowrank_attention_stats(q, k, v, mask, tolerance=tolerance)
        except cb.InputError as error:
            if "logits may be as large as" not in str(error):
                raise
            refused += 1
            continue
        assert found.error_bound <= tolerance
        off = (found.output.double() - dense(q, k, v, visible)[0]).norm(dim=-1).max()
        assert off <= tolerance * v.norm(dim=-1).max(), (seed, found)
    assert 20 < refused < 120


def test_logits_that_float32_rounds_away_are_for_float64():
    q = torch.full((1, 1, 50, 1), 8.0)
    k = torch.linspace(-1, 1, 50)[None, None, :, None]
    with pytest.raises(cb.InputError, match=r"more digits than torch\.float32 has"):
        cb.lowrank_attention(q, k, k, CausalMask(50), scale=1.0)
    q, k = q.double(), k.double()
    found = cb.lowrank_attention(q, k, k, CausalMask(50), scale=1.0)
    exact, _ = dense(q, k, k, CausalMask(50).to_dense(), scale=1.0)
    assert (found - exact).norm(dim=-1).max() <= 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", [0, 1])
def test_zeros_in_one_head_are_a_mean(which, dtype):
    given = draw(1, 2, 30, 4, 3, dtype, size=0.1)
    given[which][0, 1] = 0.0
    found = lowrank_attention_stats(*given, CausalMask(30), tolerance=1e-3)
    exact, lse = dense(*given, CausalMask(30).to_dense())
    assert (found.output - exact).norm(dim=-1).max() <= 1e-3 * given[2].norm(dim=-1).max()
    assert torch.allclose(found.lse[0, 1].double(), lse[0, 1], atol=1e-5)


def test_a_call_in_inference_mode_does_not_spoil_training_after_it():
    q, k, v = draw(1, 1, 12, 3, 2, torch.float32, size=0.1)
    degree = 8  # of no other test: what is kept is made here
    with torch.inference_mode():
        mask = CausalMask(12)
        masks = [mask, *(make(12)[0] for make in KINDS.values())]
        cb.lowrank_attention(q, k, v, mask, degree=degree)
    q.requires_grad_()
    sum(cb.lowrank_attention(q, k, v, one, degree=degree).sum() for one in masks).backward()
    assert bool(q.grad.isfinite().all())


def test_large_logits_are_refused_with_the_reason():
    q, k, v = draw(1, 1, 50, 64, 4, size=3.0)
    with pytest.raises(cb.InputError, match=r"logits may be as large as .*degree \d+ and .* features"):
        cb.lowrank_attention(q, k, v, CausalMask(50))
    with pytest.raises(cb.InputError, match="no degree below 400 is enough"):
        cb.lowrank_attention(100 * q, k, v, CausalMask(50))
    with pytest.raises(cb.InputError, match=r"degree=2 keeps the error below inf, not tolerance=0\.1"):
        cb.lowrank_attention(q, k, v, CausalMask(50), degree=2, tolerance=0.1)
    with pytest.raises(cb.InputError, match="degree=4 in 64 dimensions has 814,385 features"):
        cb.lowrank_attention(q, k, v, CausalMask(50), degree=4)
    with pytest.raises(cb.InputError, match=r"for tolerance 0\.01 in 2 dimensions"):
        cb.lowrank_attention(0.01 * q, k, v, CausalMask(50), rank=2)


def test_a_smaller_tolerance_takes_more_features():
    q, k, v = draw(1, 1, 60, 6, 4, size=0.05)
    features = [
        lowrank_attention_stats(q, k, v, CausalMask(60), tolerance=t).features
        for t in (0.3, 1e-2, 1e-5)
    ]
    assert features == sorted(set(features))


def test_few_coordinates_are_enough_where_logits_have_low_rank():
    q, k, v = draw(1, 2, 100, 32, 4)
    q[..., 2:] *= 1e-4
    found = lowrank_attention_stats(0.3 * q, k, v, CausalMask(100), tolerance=1e-2)
    assert found.rank <= 3
    exact, _ = dense(0.3 * q, k, v, CausalMask(100).to_dense())
    assert float((found.output - exact).norm(dim=-1).max() / v.norm(dim=-1).max()) <= found.error_bound
    fixed = lowrank_attention_stats(0.3 * q, k, v, CausalMask(100), degree=2, rank=2)
    assert (fixed.rank, fixed.degree, fixed.features) == (2, 2, 6)


def test_scale_and_key_bias():
    q, k, v = draw(2, 2, 40, 3, 4)
    mask = SlidingWindowMask(40, 7)
    hidden = torch.rand(2, 2, 40) > 0.6
    hidden[0, 0, :12] = True  # the first rows see nothing
    bias = torch.randn(2, 2, 40, dtype=torch.float64).masked_fill(hidden, -math.inf) + 50
    found = lowrank_attention_stats(q, k, v, mask, degree=6, scale=-0.2, key_bias=bias)
    output, lse = dense(q, k, v, mask.to_dense() * bias.exp()[..., None, :], taylor(6), -0.2)
    assert_close(output, found.output, whole=1e-10, row=1e-8)
    assert torch.equal(found.lse == -math.inf, lse == -math.inf)
    assert torch.allclose(found.lse, lse)
    assert (found.output[0, 0, :12] == 0).all()


@pytest.mark.parametrize("together", [256, 7])
def test_gradients(together, monkeypatch):
    monkeypatch.setattr(module, "_TOGETHER", together)
    q, k, v = (x.requires_grad_() for x in draw(1, 2, 7, 2, 2, size=0.2))
    mask = KINDS["groups"](7)[0]
    assert torch.autograd.gradcheck(lambda *x: cb.lowrank_attention(*x, mask, degree=4), (q, k, v))
    # Chosen coordinates are constants: within the bound this is the gradient of exact attention.
    found = torch.autograd.grad(cb.lowrank_attention(q, k, v, mask, tolerance=1e-7).sum(), (q, k, v))
    exact = torch.autograd.grad(dense(q, k, v, mask.to_dense())[0].sum(), (q, k, v))
    for expected, actual in zip(exact, found, strict=True):
        assert torch.allclose(expected, actual, atol=1e-6)


def test_earlier_rows_do_not_see_later_tokens():
    q, k, v = draw(1, 1, 200, 4, 3, torch.float32)
    before = cb.lowrank_attention(q, k, v, CausalMask(200), degree=2)
    for tensor in (q, k, v):
        tensor[..., 150:, :] *= 20
    after = cb.lowrank_attention(q, k, v, CausalMask(200), degree=2)
    assert torch.equal(before[..., :150, :], after[..., :150, :])
    assert not torch.equal(before[..., 150:, :], after[..., 150:, :])


def test_half_types():
    q, k, v = draw(1, 1, 30, 4, 3, torch.float32)
    half = [x.bfloat16() for x in (q, k, v)]
    found = cb.lowrank_attention(*half, CausalMask(30), degree=2)
    assert found.dtype == torch.bfloat16
    full = cb.lowrank_attention(q, k, v, CausalMask(30), degree=2)
    assert torch.allclose(found.float(), full, atol=0.05)


def test_a_normaliser_that_is_not_positive_is_told():
    q = torch.tensor([[[[-3.0], [1.0]]]])
    k = v = torch.ones(1, 1, 2, 1)
    with pytest.raises(cb.ConvBasisError, match=r"the normaliser of row \[0, 0, 0\] is -2"):
        cb.lowrank_attention(q, k, v, CausalMask(2), degree=1, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_key_bias_that_leaves_rows_without_digits_is_refused(dtype):
    """The first rows see keys far below the largest bias: none of them is wrong in silence."""
    q, k, v = draw(1, 1, 12, 2, 3, dtype, size=0.1)
    mask = CausalMask(12)
    for far in (30.0, 60.0, 80.0, 95.0, 102.0, 200.0, 660.0, 720.0, 743.0, 800.0):
        bias = torch.zeros(1, 1, 12, dtype=dtype)
        bias[..., :4] = -far
        try:
            found = cb.lowrank_attention(q, k, v, mask, degree=4, key_bias=bias)
        except cb.ConvBasisError as error:
            assert far > (650 if dtype == torch.float64 else 65)
            if "key_bias of the keys that it sees is so far below its largest entry, 0" not in str(
                error
            ):
                raise
        else:
            assert far < (690 if dtype == torch.float64 else 85)
            small = bias.double() + far
            expected, _ = dense(q, k, v, mask.to_dense() * small.exp()[..., None, :], taylor(4))
            assert torch.allclose(found.double(), expected, atol=1e-5)


def test_infinite_normalisers_are_told():
    q = torch.full((1, 1, 3, 1), 1e15)
    with pytest.raises(cb.ConvBasisError, match=r"the normaliser of row \[0, 0, 0\] is inf"):
        cb.lowrank_attention(q, q, q, CausalMask(3), degree=2)


def test_more_features_admit_a_smaller_tolerance():
    q, k, v = draw(1, 1, 60, 4, 3, size=0.2)
    with pytest.raises(cb.InputError, match=r"max_features=20;"):
        cb.lowrank_attention(q, k, v, CausalMask(60), tolerance=1e-6, max_features=20)
    found = lowrank_attention_stats(q, k, v, CausalMask(60), tolerance=1e-6, max_features=50_000)
    assert 20 < found.features <= 50_000
    with pytest.raises(cb.InputError, match=r"has 15 features; max_features=14"):
        cb.lowrank_attention(q, k, v, CausalMask(60), degree=2, max_features=14)


def test_heads_together_give_what_each_gives_alone(monkeypatch):
    q, k, v = draw(2, 3, 50, 4, 3)
    together = cb.lowrank_attention(q, k, v, CausalMask(50), degree=4)
    for entries in (1, 2 * 50 * 70):
        monkeypatch.setattr(module, "_ENTRIES", entries)
        assert torch.allclose(cb.lowrank_attention(q, k, v, CausalMask(50), degree=4), together)


def test_transforms_of_torch_func_are_refused():
    q, k, v = draw(1, 1, 9, 2, 2)
    call = lambda q: cb.lowrank_attention(q, k, v, CausalMask(9), degree=2).sum()  # noqa: E731
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(cb.InputError, match=r"lowrank_attention does not run under .*torch\.func"):
            transform(call)(q)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": torch.ones(5, 5)}, "one of convbasis.lowrank is wanted"),
        ({"mask": CausalMask(6)}, "mask is of 6 tokens but q of 5"),
        ({"tolerance": 0.0}, "tolerance=0.0 is not a number of"),
        ({"tolerance": 1e-9}, "the rounding of torch.float32"),
        ({"tolerance": 1.0}, "tolerance=1.0 is not"),
        ({"rank": 4}, "rank=4 is more than the 3 dimensions"),
        ({"rank": 0}, "rank=0 is not a positive integer"),
        ({"degree": -2}, "degree=-2 is not an integer >= 0"),
        ({"max_features": 0}, "max_features=0 is not a positive integer"),
        ({"key_bias": torch.ones(5)}, "key_bias is a torch.float32 tensor"),
        ({"key_bias": torch.full((1, 1, 5), torch.inf)}, "key_bias holds NaN or"),
        ({"v": torch.full((1, 1, 5, 2), torch.inf)}, "v holds 10 NaN or Inf"),
        ({"k": torch.ones(1, 1, 4, 3)}, r"k has shape \(1, 1, 4, 3\); with q \(1, 1, 5, 3\)"),
        ({"v": torch.ones(1, 1, 5, 2).double()}, "v has dtype torch.float64 but q has"),
        ({"key_bias": torch.ones(1, 1, 5, device="meta")}, "key_bias is on meta but q is on cpu"),
    ],
)
def test_bad_input_is_refused(change, words):
    given = {"q": torch.ones(1, 1, 5, 3), "k": torch.ones(1, 1, 5, 3), "v": torch.ones(1, 1, 5, 2)}
    with pytest.raises(cb.InputError, match=words):
        cb.lowrank_attention(**({**given, "mask": CausalMask(5)} | change))
