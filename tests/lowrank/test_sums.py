"""Sums of conv basis, low rank and sparse weights under one normaliser."""

import math

import pytest
import reference
import torch
from comparison import assert_close

import convbasis as cb
from convbasis.hybrid.piece import merge
from convbasis.lowrank import (
    CausalMask,
    IntervalMask,
    lowrank_attention_stats,
    merge_parts,
    sparse_attention_stats,
    sums,
)


def draw(n, d, d_v=3, heads=2, kv_heads=None, dtype=torch.float64):
    q = 0.5 * torch.randn(1, heads, n, d, dtype=dtype)
    k = torch.randn(1, kv_heads or heads, n, d, dtype=dtype)
    return q, k, torch.randn(1, kv_heads or heads, n, d_v, dtype=dtype)


def lists(n, s, heads=2):
    """Return distinct earlier positions, some of them none."""
    keys = torch.stack([torch.randperm(n)[:s] for _ in range(heads * n)]).view(1, heads, n, s)
    return keys.masked_fill(keys > torch.arange(n)[:, None], -1)


def weights_of(keys, logits):
    n = logits.shape[-1]
    seen = torch.zeros(*logits.shape[:-1], n + 1, dtype=torch.bool).scatter(-1, keys % (n + 1), True)
    return logits.exp() * seen[..., :n]


@pytest.mark.parametrize("entries", [1 << 21, 100])
def test_sparse_attention(entries, monkeypatch):
    monkeypatch.setattr(sums, "_ENTRIES", entries)
    q, k, v = draw(61, 4, kv_heads=1)
    keys = lists(61, 9)
    found = sparse_attention_stats(q, k, v, keys, scale=0.7, enable_gqa=True)
    weights = weights_of(keys, q @ k.mT * 0.7)
    total = weights.sum(-1)
    expected = weights @ v / total.clamp(min=1e-300)[..., None]
    assert_close(expected, found.output, whole=1e-12, row=1e-11)
    assert torch.allclose(found.lse, total.log())
    assert bool((found.lse == -math.inf).any())  # some rows list nothing
    shared = sparse_attention_stats(q, k, v, keys[0, 0], scale=0.7, enable_gqa=True)
    assert torch.equal(shared.output[:, 0], found.output[:, 0])


def test_conv_basis_low_rank_and_sparse_under_one_normaliser():
    """The dense sum of three matrices of weights, normalised once."""
    n = 150
    q, k, v = draw(n, 4)
    starts = torch.tensor([0, 40, 90])
    keys = lists(n, 5)
    conv = cb.conv_basis_attention_stats(q, k, v, starts=starts)
    low = lowrank_attention_stats(q, k, v, CausalMask(n), degree=2)
    sparse = sparse_attention_stats(q, k, v, keys)
    found = merge_parts([(conv.output, conv.lse), (low.output, low.lse), sparse])
    exact = q @ k.mT * 0.5
    total = weights_of(keys, exact) + (1 + exact + exact**2 / 2).tril()
    for h in range(2):
        total[0, h] += reference.conv_basis_logits(q[0, h], k[0, h], starts).exp().tril()
    normaliser = total.sum(-1)
    assert_close(total @ v / normaliser[..., None], found.output, whole=1e-9, row=1e-8)
    assert torch.allclose(found.lse, normaliser.log(), rtol=1e-9)


def test_an_exact_window_and_a_low_rank_rest_are_exact_attention_within_the_bound():
    n, window = 400, 50
    q, k, v = draw(n, 4, dtype=torch.float32)
    q *= 0.1
    near = cb.hybrid_attention_stats(q, k, v, window=window, sinks=0, columns=0)
    far = IntervalMask(torch.zeros(n, dtype=torch.int64), torch.arange(n) - window)
    rest = lowrank_attention_stats(q, k, v, far, tolerance=1e-3)
    found = merge_parts([(near.output, near.lse), (rest.output, rest.lse)])
    exact = reference.exact_attention(q, k, v)
    assert (found.output - exact).norm(dim=-1).max() <= 1e-3 * v.norm(dim=-1).max()
    # The first rows have no far keys: the empty part changes nothing.
    assert torch.equal(found.output[:, :, :window], near.output[:, :, :window])


def test_the_order_of_parts_does_not_matter_and_nothing_stays_nothing():
    outputs, lses = torch.randn(3, 5, 2), torch.randn(3, 5)
    lses[:, 0] = -math.inf
    lses[1, 1] = -math.inf
    parts = list(zip(outputs, lses, strict=True))
    one, other = merge_parts(parts), merge_parts(parts[::-1])
    assert torch.allclose(one.output, other.output)
    assert torch.equal(one.output[0], torch.zeros(2))
    assert one.lse[0] == -math.inf
    without = merge_parts([parts[0], parts[2]])
    assert torch.allclose(one.output[1], without.output[1])


def test_gradients():
    q, k, v = (x.requires_grad_() for x in draw(8, 2, 2))
    keys = lists(8, 3)

    def call(q, k, v):
        sparse = sparse_attention_stats(q, k, v, keys)
        low = lowrank_attention_stats(q, k, v, CausalMask(8), degree=2)
        return merge_parts([sparse, (low.output, low.lse)])

    assert torch.autograd.gradcheck(call, (q, k, v))
    nothing = sparse_attention_stats(q, k, v, torch.full((8, 1), -1))
    grads = torch.autograd.grad(merge_parts([nothing]).output.sum(), (q, k, v))
    assert all(bool((grad == 0).all()) for grad in grads)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (torch.zeros(5, 2), "keys is a torch.float32 tensor"),
        (torch.zeros(4, 2, dtype=torch.int64), r"integers \(5, s\) or \(1, 2, 5, s\) are wanted"),
        (torch.full((5, 1), 5), r"keys range over 5\.\.5; positions 0\.\.4"),
        (torch.full((5, 1), -2), r"keys range over -2\.\.-2"),
        (torch.ones(5, 2, dtype=torch.int64), "lists a key twice"),
    ],
)
def test_bad_lists_are_refused(keys, words):
    with pytest.raises(cb.InputError, match=words):
        sparse_attention_stats(*draw(5, 2), keys)


def test_transforms_of_torch_func_are_refused():
    q, k, v = draw(6, 2)
    call = lambda q: sparse_attention_stats(q, k, v, lists(6, 2)).output.sum()  # noqa: E731
    with pytest.raises(cb.InputError, match="sparse_attention_stats does not run under transforms"):
        torch.func.grad(call)(q)


def test_both_merges_agree():
    one, other = ((torch.randn(2, 9, 3), 30 * torch.randn(2, 9)) for _ in range(2))
    other[1][0, :4] = -math.inf
    output, lse = merge(*one, *other)
    found = merge_parts([one, other])
    assert torch.allclose(found.output, output, atol=1e-6)
    assert torch.allclose(found.lse, lse)


def test_bad_parts_are_refused():
    part = (torch.ones(4, 2), torch.ones(4))
    with pytest.raises(cb.InputError, match="parts is empty"):
        merge_parts([])
    with pytest.raises(cb.InputError, match="all must be alike"):
        merge_parts([part, (torch.ones(4, 2), torch.ones(3))])
    with pytest.raises(cb.InputError, match="a log-sum-exp is on meta but the outputs are on cpu"):
        merge_parts([part, (torch.ones(4, 2), torch.ones(4, device="meta"))])
    with pytest.raises(cb.InputError, match=r"output has dtype torch\.float64"):
        merge_parts([part, (torch.ones(4, 2, dtype=torch.float64), torch.ones(4))])
