"""Gradients of hybrid_attention, what it chooses and fits taken as constant."""

import oracle
import pytest
import torch
from oracle import gen, qkv

import convbasis as cb
from convbasis.hybrid import group, look, scaled_conv, segments
from convbasis.hybrid.piece import merge, piece_attention

SMALL = {"window": 20, "columns": 7, "samples": 12}
FAR = [
    {"window": 20, "columns": 0},
    {**SMALL},
    {**SMALL, "blocks": 2},
    {**SMALL, "far_field": "segments", "num_segments": 3},
    {**SMALL, "far_field": "segments", "num_segments": 3, "key_weights": True, "blocks": 1},
    {**SMALL, "far_field": "segments", "key_weights": True},
    {**SMALL, "far_field": "conv"},
    {**SMALL, "blocks": 1, "correction": True},
]


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def gradients(call, inputs, seed=1):
    """Gradients for the same random incoming gradients of output and, if any, log-sum-exp."""
    own = leaves(inputs)
    found = call(*own)
    total = 0.0
    for tensor in found:
        incoming = torch.randn(tensor.shape, generator=gen(seed), dtype=torch.float64)
        total = total + (incoming.to(tensor.dtype) * tensor).sum()
    return torch.autograd.grad(total, own)


@pytest.mark.parametrize("options", FAR, ids=str)
@pytest.mark.parametrize("n", [15, 127, 300])
@pytest.mark.parametrize("shape", [{}, {"heads": 4, "kv_heads": 2, "d_v": 5, "batch": 2}], ids=str)
def test_equal_those_of_the_oracle(n, shape, options):
    inputs = qkv(n, d=8, **shape)

    def ours(*tensors):
        return cb.hybrid_attention_stats(*tensors, enable_gqa=True, **options)[:2]

    expected = gradients(lambda *tensors: oracle.hybrid_attention(*tensors, **options), inputs)
    for want, got in zip(expected, gradients(ours, inputs), strict=True):
        assert (want - got).abs().max() <= 1e-10 * want.abs().max()


def held(monkeypatch, module, name):
    """Let a function return what it returned the first time, in the order of its calls."""
    function, kept, place = getattr(module, name), [], [0]

    def again(*args, **options):
        if place[0] == len(kept):
            kept.append(function(*args, **options))
        place[0] += 1
        return kept[place[0] - 1]

    monkeypatch.setattr(module, name, again)
    return place


@pytest.mark.parametrize("d_v", [4, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"columns": 0},
        {"columns": 3},
        {"columns": 0, "blocks": 9},
        {"columns": 3, "blocks": 1},
        {"columns": 0, "sinks": 0, "far_field": "segments"},
        {"columns": 0, "far_field": "segments", "num_segments": 1, "blocks": 9},
        {"columns": 3, "far_field": "segments", "key_weights": True},
        {"columns": 3, "far_field": "conv"},
    ],
    ids=str,
)
def test_gradcheck(options, d_v, monkeypatch):
    """What is chosen and fitted moves with the inputs: it is held at that of the first call."""
    places = [
        held(monkeypatch, module, name)
        for module, name in (
            (look.Look, "found"),
            (group, "heaviest"),
            (group, "heavy_blocks"),
            (segments, "_corrections"),
            (scaled_conv, "row_factors"),
        )
    ]

    def call(query, key, value):
        for place in places:
            place[0] = 0
        return cb.hybrid_attention_stats(query, key, value, window=5, enable_gqa=True, **options)[:2]

    inputs = leaves(qkv(200, heads=4, kv_heads=2, d=4, d_v=d_v))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("options", FAR, ids=str)
def test_recording_a_graph_changes_no_bit(options):
    inputs = qkv(300, heads=2, kv_heads=1, dtype=torch.float32)
    plain = cb.hybrid_attention_stats(*inputs, enable_gqa=True, **options)
    graph = cb.hybrid_attention_stats(*leaves(inputs), enable_gqa=True, **options)
    assert all(torch.equal(plain[i], graph[i]) for i in (0, 1, 2, 4))
    assert graph.output.requires_grad
    assert not graph.error_estimate.requires_grad


@pytest.mark.parametrize("options", FAR, ids=str)
def test_padding_takes_and_gives_no_gradient(options):
    inputs = qkv(300, batch=2, dtype=torch.float32)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[0, :70] = mask[1, 250:] = False

    def padded(*tensors):
        return (cb.hybrid_attention(*tensors, key_padding_mask=mask, **options),)

    found = gradients(padded, inputs)
    for tensor in found:
        assert bool(tensor.isfinite().all())
        assert not tensor.masked_select(~mask[:, None, :, None]).any()
        assert tensor.masked_select(mask[:, None, :, None]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", FAR, ids=str)
def test_lower_precision(options, dtype):
    inputs = qkv(300, heads=2, dtype=dtype)

    def ours(*tensors):
        return (cb.hybrid_attention(*tensors, **options),)

    def dense(*tensors):
        return (oracle.hybrid_attention(*tensors, **options)[0],)

    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for want, got in zip(gradients(dense, inputs), gradients(ours, inputs), strict=True):
        assert got.dtype == dtype
        assert (want - got).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_of_some_inputs_alone(wanted):
    inputs = qkv(200)
    options = {**SMALL, "far_field": "segments", "blocks": 1}
    every = gradients(lambda *x: (cb.hybrid_attention(*x, **options),), inputs)
    own = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    incoming = torch.randn(inputs[2].shape, generator=gen(1), dtype=torch.float64)
    (cb.hybrid_attention(*own, **options) * incoming).sum().backward()
    for i, tensor in enumerate(own):
        if i in wanted:
            assert torch.equal(tensor.grad, every[i])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_call_before_the_backward_pass_changes_no_gradient(wanted):
    """Copies of a model's heads, which lie between each other's, are used again from call to call."""
    first, second = (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(300, heads=4, kv_heads=2, seed=s)]
        for s in (0, 1)
    )
    first[wanted].requires_grad_()
    options = {"window": 20, "columns": 7, "enable_gqa": True}
    (expected,) = torch.autograd.grad(cb.hybrid_attention(*first, **options).sum(), first[wanted])
    output = cb.hybrid_attention(*first, **options)
    with torch.no_grad():
        cb.hybrid_attention(*second, **options)
    (found,) = torch.autograd.grad(output.sum(), first[wanted])
    assert torch.equal(found, expected)


class TestPieces:
    @pytest.mark.parametrize("d_v", [8, 5])
    def test_rows_that_see_no_key(self, d_v):
        query, key, value = leaves(qkv(30, heads=2, d_v=d_v, d=8))
        bias = torch.zeros(1, 1, 30, 30, dtype=torch.float64).masked_fill_(
            torch.arange(30)[:, None] < 10, -torch.inf
        )
        output, lse = piece_attention(query, key, value, 0.3, bias)
        assert not output[:, :, :10].any()
        assert (lse[:, :, :10] == -torch.inf).all()
        (output.sum() + lse[:, :, 10:].sum()).backward()
        assert not query.grad[:, :, :10].any()
        assert all(bool(x.grad.isfinite().all()) for x in (query, key, value))

    @pytest.mark.parametrize("d_v", [8, 5])
    def test_the_union_of_sets_in_any_parts(self, d_v):
        query, key, value = qkv(40, heads=4, kv_heads=2, d=8, d_v=d_v)
        whole = piece_attention(query, key, value, 0.3)
        for cut in (1, 17, 39):
            one, two = (
                piece_attention(query, key[:, :, part], value[:, :, part], 0.3)
                for part in (slice(cut), slice(cut, None))
            )
            for parts in ((*one, *two), (*two, *one)):
                output, lse = merge(*parts)
                assert torch.allclose(output, whole[0], atol=1e-13)
                assert torch.allclose(lse, whole[1], atol=1e-13)

    def test_an_empty_set_changes_no_bit(self):
        query, key, value = qkv(40)
        output, lse = piece_attention(query, key, value, 0.3)
        nothing = torch.zeros_like(output), torch.full_like(lse, -torch.inf)
        merged = merge(output, lse, *nothing)
        assert torch.equal(merged[0], output)
        assert torch.equal(merged[1], lse)

    @pytest.mark.parametrize("d_v", [8, 5])
    def test_many_rows_in_small_steps(self, d_v, monkeypatch):
        inputs = qkv(90, batch=3, heads=4, kv_heads=2, d=8, d_v=d_v)
        bias = torch.randn(3, 1, 90, 90, generator=gen(), dtype=torch.float64)

        def call(*tensors):
            return piece_attention(*tensors, 0.3, bias)

        once = gradients(call, inputs)
        monkeypatch.setattr("convbasis.hybrid.piece._LOGITS", 1000)
        for one, other in zip(once, gradients(call, inputs), strict=True):
            assert torch.allclose(one, other, atol=1e-12)
