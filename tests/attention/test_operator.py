"""The opaque operators: compile, opcheck, fake and meta tensors, gradients through them."""

import pytest
import reference
import torch
from comparison import assert_close

import convbasis as cb
from convbasis.attention.ops import attention_backward_op, attention_op


def qkv(n=300, heads=2, kv_heads=1, d=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, n, d), (1, kv_heads, n, d), (1, kv_heads, n, 5))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


SEGMENTS = [{"segment_length": 50}, {"num_bases": 4}, {"starts": [0, 70, 200]}]


@pytest.mark.parametrize("options", SEGMENTS, ids=str)
def test_compiles_without_a_graph_break(options):
    def function(q, k, v):
        return 2.0 * cb.conv_basis_attention(q, k, v, enable_gqa=True, **options)

    inputs = qkv()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = function(*inputs)
    for _ in range(2):
        assert torch.equal(compiled(*inputs), expected)
    for tensor in inputs:
        tensor.requires_grad_()
    weight = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    plain = torch.autograd.grad((function(*inputs) * weight).sum(), inputs)
    through = torch.autograd.grad((compiled(*inputs) * weight).sum(), inputs)
    for one, other in zip(plain, through, strict=True):
        assert torch.equal(one, other)


def arguments(mask=None, biases=(None, None), **options):
    segments = {"starts": None, "num_bases": None, "segment_length": None, **options}
    starts = segments["starts"]
    return (
        None if starts is None else torch.tensor(starts),
        mask,
        biases[0],
        biases[1],
        segments["num_bases"],
        segments["segment_length"],
        1,
        None,
        0.0,
        "linear",
        0.3,
        "auto",
        None,
    )


@pytest.mark.parametrize("options", SEGMENTS, ids=str)
def test_opcheck_of_the_forward_operator(options):
    mask = (torch.arange(300) >= 5)[None]
    for given in (None, mask):
        torch.library.opcheck(attention_op, (*qkv(), *arguments(given, **options)))


def biases(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    shapes = ((1, 2, 300), (1, 2, 300))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def test_opcheck_with_biases():
    given = arguments(None, biases(), segment_length=50)
    torch.library.opcheck(attention_op, (*qkv(), *given))
    query, key, value = qkv()
    output, lse, starts = attention_op(query, key, value, *given)
    for gradient in ("forward", "attention"):
        torch.library.opcheck(
            attention_backward_op,
            (
                *(output, lse, query, key, value, output, lse, starts, None, *biases()),
                *(0.3, gradient, "auto", None),
            ),
        )


@pytest.mark.parametrize("segments", [{"segment_length": 50}, {"starts": [0, 70, 120, 200]}], ids=str)
@pytest.mark.parametrize("gradient", ["forward", "attention"])
def test_training_compiles_with_biases_and_documents(gradient, segments):
    def function(q, k, v, by_key, by_lag):
        return cb.conv_basis_attention(
            q,
            k,
            v,
            enable_gqa=True,
            **segments,
            key_bias=by_key,
            lag_bias=by_lag,
            document_lengths=[120, 180],
            gradient=gradient,
        ).square()

    inputs = [x.requires_grad_() for x in (*qkv(), *biases())]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(function(*inputs).sum(), inputs)
    through = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    for one, other in zip(plain, through, strict=True):
        assert torch.equal(one, other)


def test_opcheck_of_the_backward_operator():
    query, key, value = qkv()
    output, lse, starts = attention_op(query, key, value, *arguments(segment_length=50))
    mask = (torch.arange(300) >= 5)[None]
    for given in (None, mask):
        torch.library.opcheck(
            attention_backward_op,
            (
                *(output, lse, query, key, value, output, lse, starts, given),
                *(None, None, 0.3, "forward", "auto", None),
            ),
        )


def test_meta_tensors_have_the_shapes_of_real_ones():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        query, key, value = (x.to("meta") for x in qkv(dtype=dtype))
        result = cb.conv_basis_attention(query, key, value, segment_length=50, enable_gqa=True)
        assert result.is_meta
        assert result.shape == (1, 2, 300, 5)
        assert result.dtype == dtype


def dense_attention(query, key, value, starts, real=None):
    """The same attention through autograd, entry by entry."""
    n = query.shape[-2]
    row, column = torch.arange(n)[:, None], torch.arange(n)[None]
    start = torch.tensor(starts)[
        torch.searchsorted(torch.tensor(starts), torch.arange(n), right=True) - 1
    ]
    position = (start + row - column).clamp(0, n - 1)
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    logits = (query[:, :, position] * key[:, :, start][:, :, None]).sum(-1) * query.shape[-1] ** -0.5
    hidden = column > row if real is None else (column > row) | ~real[:, None, None]
    logits = logits.masked_fill(hidden, -torch.inf)
    return torch.softmax(logits, -1) @ value, torch.logsumexp(logits, -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_dense_matrix(dtype):
    # Longer than what is evaluated entry by entry.
    inputs = [x.requires_grad_() for x in qkv(400, dtype=dtype)]
    starts = [0, 33, 150, 399]
    g = torch.Generator().manual_seed(3)
    weights = torch.randn(1, 2, 400, 5, generator=g), torch.randn(1, 2, 400, generator=g)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grads = []
    for tensors, attend in (
        (exact, lambda *t: dense_attention(*t, starts)),
        (inputs, lambda *t: cb.conv_basis_attention_stats(*t, starts=starts, enable_gqa=True)[:2]),
    ):
        output, lse = attend(*tensors)
        loss = (output * weights[0]).sum() + (lse * weights[1]).sum()
        grads.append(torch.autograd.grad(loss, tensors))
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    for one, other in zip(*grads, strict=True):
        assert other.dtype == dtype
        assert (one - other).norm() <= limit * one.norm()


def test_gradients_where_rows_differ_by_many_nats():
    query, key, value = qkv(400, heads=1, d=1)
    query = torch.full_like(query, -1.0)
    query[..., 200:, :] = 40.0
    query[..., 300:, :] = -40.0
    key = torch.ones_like(key)
    starts = [0, 100, 350]
    inputs = [x.requires_grad_() for x in (query, key, value)]
    expected = torch.autograd.grad(dense_attention(*inputs, starts)[0].square().sum(), inputs)
    result = cb.conv_basis_attention(*inputs, starts=starts)
    found = torch.autograd.grad(result.square().sum(), inputs)
    for one, other in zip(expected, found, strict=True):
        assert (one - other).norm() <= 1e-6 * one.norm()


def test_gradients_do_not_reach_padding():
    query, key, value = qkv(400)
    real = (torch.arange(400) >= 40)[None] & (torch.arange(400) < 390)[None]
    inputs = [x.requires_grad_() for x in (query, key, value)]
    result = cb.conv_basis_attention(
        *inputs, segment_length=100, key_padding_mask=real, enable_gqa=True
    )
    for gradient in torch.autograd.grad(result.square().sum(), inputs):
        assert (gradient[:, :, ~real[0]] == 0).all()
        assert (gradient != 0).any()


def test_autograd_and_plain_calls_agree_bit_by_bit():
    inputs = qkv()
    plain = cb.conv_basis_attention(*inputs, segment_length=20, enable_gqa=True)
    recorded = cb.conv_basis_attention(
        *(x.requires_grad_() for x in inputs), segment_length=20, enable_gqa=True
    )
    assert recorded.requires_grad
    assert torch.equal(plain, recorded.detach())


@pytest.mark.parametrize("heads", [1, 3, 40])
@pytest.mark.parametrize("starts", [[0], [0, 10, 20, 30], [0, 7, 8, 35]], ids=str)
def test_direct_backend_in_blocks(monkeypatch, starts, heads):
    inputs = qkv(40, heads=heads, kv_heads=1)
    expected, _ = reference.conv_basis_attention(
        *(x.expand(1, heads, -1, -1) for x in inputs), torch.tensor(starts)
    )
    grads = []
    for entries, columns in ((1, 3), (100, 40), (100, 7), (5000, 40), (5000, 10), (1 << 20, 40)):
        monkeypatch.setattr("convbasis.convolve.direct._TILE_ENTRIES", entries)
        monkeypatch.setattr("convbasis.convolve.direct._TILE_COLUMNS", columns)
        monkeypatch.setattr("convbasis.convolve.direct._WHOLE_ROWS", 30)
        result = cb.conv_basis_attention(*inputs, starts=starts, backend="direct", enable_gqa=True)
        assert_close(expected, result, whole=1e-12, row=1e-12)
        own = [x.clone().requires_grad_() for x in inputs]
        again = cb.conv_basis_attention(*own, starts=starts, backend="direct", enable_gqa=True)
        grads.append(torch.autograd.grad(again.square().sum(), own))
    for found in grads[1:]:
        for one, other in zip(grads[0], found, strict=True):
            assert (one - other).norm() <= 1e-12 * one.norm()
