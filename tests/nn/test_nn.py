"""ConvBasisAttention: what it computes, its cache, its segments, and the errors it raises."""

import copy
import itertools
import math

import pytest
import reference
import torch
from comparison import assert_close

import convbasis as cb
from convbasis.nn.lag_bias import LagBias
from convbasis.nn.rotary import rotate


def layer(embed_dim=32, num_heads=4, *, seed=0, **options):
    """A layer whose every parameter matters."""
    torch.manual_seed(seed)
    made = cb.nn.ConvBasisAttention(
        embed_dim, num_heads, **{"num_kv_heads": 2, "segment_length": 16, **options}
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.25)
    return made.eval()


def tokens(n, batch=2, width=32, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, width, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def in_chunks(attention, x, sizes):
    cache = cb.nn.ConvBasisCache()
    parts = x.split(sizes, dim=1)
    return torch.cat([attention(part, cache=cache) for part in parts], dim=1), cache


class TestForward:
    @torch.no_grad()
    def test_equals_the_oracle(self):
        attention = layer(output_gate=True).double()
        x = tokens(90, dtype=torch.float64)
        query, key, value = (
            projection(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = rotate(query, 0, 10_000.0), rotate(key, 0, 10_000.0)
        mixed, _ = reference.conv_basis_attention(
            query,
            key,
            value,
            torch.arange(0, 90, 16),
            key_bias=attention.key_gate(x).transpose(1, 2),
            lag_bias=attention.lag_bias(90).expand(2, 4, 90),
        )
        mixed = mixed.transpose(1, 2).flatten(2) * torch.sigmoid(attention.output_gate(x))
        assert_close(attention.o_proj(mixed), attention(x), whole=1e-12, row=1e-11)

    @pytest.mark.parametrize(
        "options",
        [
            {"key_gate": False},
            {"lag_bias": False},
            {"output_gate": True},
            {"rotary_base": None},
            {"rotary_base": 100.0},
            {"segment_length": 8},
            {"segment_growth": 4.0},
            {"head_dim": 16},
            {"num_kv_heads": 4},
            {"bias": True},
        ],
        ids=str,
    )
    def test_each_option_changes_the_result(self, options):
        x = tokens(100)
        plain, other = layer(), layer(**options)
        with torch.no_grad():  # the same numbers where both have them
            known = dict(plain.named_parameters())
            for name, parameter in other.named_parameters():
                if name in known and known[name].shape == parameter.shape:
                    parameter.copy_(known[name])
        assert (plain(x) - other(x)).norm() > 1e-3 * plain(x).norm()

    def test_gradient_and_backend_are_passed_on(self):
        x = tokens(300)
        grads = {}
        for gradient in ("forward", "attention"):
            attention = layer(gradient=gradient, backend="partitioned")
            attention(x).square().sum().backward()
            assert cb.last_dispatch().backend == "partitioned"
            grads[gradient] = attention.k_proj.weight.grad
        assert (grads["forward"] - grads["attention"]).norm() > 0.1 * grads["forward"].norm()

    def test_dropout_in_training_alone(self):
        attention = layer(dropout=0.5)
        x = tokens(20)
        assert torch.equal(attention(x), attention(x))
        attention.train()
        zeros = (attention(x) == 0).float().mean()
        assert 0.3 < zeros < 0.7

    def test_no_gate_at_first(self):
        torch.manual_seed(0)
        attention = cb.nn.ConvBasisAttention(32, 4, segment_length=8)
        assert (attention.key_gate(tokens(5)) == 0).all()
        assert (attention.lag_bias(1000) == 0).all()

    @pytest.mark.parametrize("options", [{}, {"segment_growth": 3.0}], ids=str)
    def test_is_strictly_causal_and_so_are_its_gradients(self, options):
        attention = layer(**options).double()
        x = tokens(150, dtype=torch.float64).requires_grad_()
        for i in (0, 15, 16, 80, 148):
            (grad,) = torch.autograd.grad(attention(x)[:, i].sum(), x)
            assert (grad[:, i + 1 :].abs() <= 1e-12 * grad.abs().max()).all()
            assert (grad[:, i].abs().amax() > 0).all()

    def test_gradcheck_through_the_layer(self):
        attention = layer(8, 2, num_kv_heads=1, segment_length=3, output_gate=True).double()
        x = tokens(7, width=8, dtype=torch.float64).requires_grad_()
        names = [name for name, _ in attention.named_parameters()]
        parameters = [p.detach().clone().requires_grad_() for p in attention.parameters()]

        def function(x, *given):
            return torch.func.functional_call(attention, dict(zip(names, given, strict=True)), (x,))

        assert torch.autograd.gradcheck(function, (x, *parameters))

    def test_padding_and_documents(self):
        attention = layer(segment_growth=2.0)
        x = tokens(60)
        real = torch.arange(60)[None].expand(2, -1) < 40
        padded = attention(x, key_padding_mask=real)[:, :40]
        assert torch.allclose(padded, attention(x[:, :40]), atol=1e-5)
        packed = attention(x, document_lengths=[25, 35])
        apart = torch.cat([attention(x[:, :25]), attention(x[:, 25:])], dim=1)
        assert torch.allclose(packed, apart, atol=2e-5)


class TestCache:
    @pytest.mark.parametrize("options", [{}, {"segment_growth": 2.0}, {"num_kv_heads": 1}], ids=str)
    @pytest.mark.parametrize("sizes", [1, 7, 64, [3, 197], [130, 1, 1, 1, 67]], ids=str)
    def test_decoding_equals_the_full_forward(self, sizes, options):
        attention = layer(**options)
        x = tokens(200)
        with torch.no_grad():
            whole = attention(x)
        parts, cache = in_chunks(attention, x, sizes)
        assert (parts - whole).abs().max() <= 1e-5 * whole.abs().max()
        assert cache.length == 200

    def test_without_biases_and_positions(self):
        attention = layer(key_gate=False, lag_bias=False, rotary_base=None, output_gate=True)
        x = tokens(100)
        with torch.no_grad():
            assert torch.allclose(in_chunks(attention, x, 9)[0], attention(x), atol=1e-5)

    def test_in_parts_of_the_rows(self, monkeypatch):
        monkeypatch.setattr("convbasis.nn.decode._ENTRIES", 2 * 4 * 90 * 3)
        attention, x = layer(), tokens(90)
        with torch.no_grad():
            assert torch.allclose(in_chunks(attention, x, [40, 50])[0], attention(x), atol=1e-5)

    def test_half_types_and_double(self):
        for dtype, limit in ((torch.bfloat16, 0.05), (torch.float64, 1e-12)):
            attention = layer().to(dtype)
            x = tokens(80, dtype=dtype)
            with torch.no_grad():
                whole = attention(x)
                parts = in_chunks(attention, x, 11)[0]
            assert parts.dtype == dtype
            assert (parts - whole).abs().max() <= limit * whole.abs().max()

    def test_holds_one_key_for_each_segment(self):
        attention = layer(num_kv_heads=4)
        _, cache = in_chunks(attention, tokens(160), 1)
        assert cache.first_keys.shape == (2, 4, 10, 8)
        assert cache.queries.shape == (2, 4, 16, 8)
        assert cache.values.shape == (2, 4, 160, 8)
        exact = 2 * 4 * 160 * (8 + 8)
        assert cache.numbers() < 0.75 * exact

    def test_empty_chunks_change_nothing(self):
        attention, x = layer(), tokens(30)
        cache = cb.nn.ConvBasisCache()
        with torch.no_grad():
            assert attention(x[:, :0], cache=cache).shape == (2, 0, 32)
            first = attention(x[:, :20], cache=cache)
            assert attention(x[:, :0], cache=cache).shape == (2, 0, 32)
            rest = attention(x[:, 20:], cache=cache)
            assert torch.allclose(torch.cat([first, rest], 1), attention(x), atol=1e-5)

    @pytest.mark.parametrize("kv_heads", [2, 4])
    def test_gradients_stay_within_the_chunk(self, kv_heads):
        """They are those of the whole, if the tokens before are taken as constants."""
        attention = layer(num_kv_heads=kv_heads).double()
        x = tokens(40, dtype=torch.float64)
        cache = cb.nn.ConvBasisCache()
        total = 0.0
        inputs = [part.clone().requires_grad_() for part in x.split([20, 9, 11], dim=1)]
        for part in inputs:
            total = total + attention(part, cache=cache).square().sum()
        total.backward()
        assert not cache.values.requires_grad
        names = dict(attention.named_parameters())
        found = {name: p.grad.clone() for name, p in names.items()}
        attention.zero_grad()
        whole = x.clone().requires_grad_()
        attention(whole)[:, :20].square().sum().backward()
        assert torch.allclose(inputs[0].grad, whole.grad[:, :20], rtol=1e-6, atol=1e-9)
        for name, grad in found.items():  # every chunk has its part
            assert (grad - names[name].grad).norm() > 1e-3 * grad.norm(), name
        assert all((part.grad.abs().amax(-1) > 0).all() for part in inputs)

    def test_nan_in_a_later_chunk_is_refused_and_leaves_the_cache(self):
        attention, x = layer(), tokens(30)
        cache = cb.nn.ConvBasisCache()
        with torch.no_grad():
            first = attention(x[:, :20], cache=cache)
            with pytest.raises(cb.InputError, match="NaN or Inf"):
                attention(torch.full((2, 5, 32), math.nan), cache=cache)
            rest = attention(x[:, 20:], cache=cache)
            assert torch.allclose(torch.cat([first, rest], 1), attention(x), atol=1e-5)

    def test_under_autocast(self):
        attention, x = layer(), tokens(60)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            whole = attention(x)
            parts = in_chunks(attention, x, 13)[0]
            empty = attention(x[:, :0])
        assert parts.dtype == whole.dtype == empty.dtype == torch.bfloat16
        assert (parts - whole).abs().max() <= 0.03 * whole.abs().max()

    def test_a_call_that_fails_does_not_take_the_cache(self):
        cache = cb.nn.ConvBasisCache()
        with pytest.raises(cb.InputError):
            layer()(torch.full((2, 5, 32), math.nan), cache=cache)
        layer(seed=1)(tokens(5), cache=cache)
        assert cache.length == 5

    def test_the_wrong_cache_is_refused(self):
        attention, x = layer(), tokens(20)
        cache = cb.nn.ConvBasisCache()
        attention(x, cache=cache)
        with pytest.raises(cb.InputError, match="belongs to another layer"):
            layer()(x, cache=cache)
        with pytest.raises(cb.InputError, match="holds a batch of 2 sequences, but 1"):
            attention(x[:1], cache=cache)
        with pytest.raises(cb.InputError, match="together with key_padding_mask"):
            attention(x, cache=cache, key_padding_mask=torch.ones(2, 20).bool())
        attention.double()
        with pytest.raises(cb.InputError, match=r"holds torch\.float32 on cpu, but torch\.float64"):
            attention(x.double(), cache=cache)
        assert cache.length == 20


class TestSegments:
    def test_growing_segments_keep_their_starts(self):
        long = cb.nn.segment_starts(5000, 16, 2.0)
        for n in (1, 15, 16, 17, 300, 4999):
            own = cb.nn.segment_starts(n, 16, 2.0)
            assert own == long[: len(own)]
            assert own[-1] < n
        widths = [b - a for a, b in itertools.pairwise(long)]
        assert widths == sorted(widths)
        assert widths[-1] == math.floor(2.0 * math.sqrt(long[-2]))
        assert len(long) < 2 * math.sqrt(5000)

    def test_bad_ones_are_refused(self):
        for arguments in ((0, 4), (5, 0), (5, 2, -1.0), (5, 2, math.inf)):
            with pytest.raises(cb.InputError):
                cb.nn.segment_starts(*arguments)


class TestLagBias:
    @torch.no_grad()
    def test_is_linear_between_knots(self):
        bias = LagBias(2).double()
        bias.table.copy_(torch.arange(bias.table.shape[1]) * torch.tensor([[1.0], [-2.0]]))
        found = bias(2000)
        assert torch.equal(found[0, :32], torch.arange(32).double())
        # Every doubling from 32 on takes four knots.
        for octave in range(6):
            assert float(found[0, 32 * 2**octave]) == pytest.approx(32 + 4 * octave)
        assert torch.allclose(found[1], -2 * found[0])
        assert (found[0].diff() > 0).all()

    def test_any_length_extends_a_shorter_one(self):
        bias = LagBias(3)
        torch.nn.init.normal_(bias.table)
        long = bias(5_000_000)
        assert torch.equal(bias(77), long[:, :77])
        assert long.isfinite().all()


def test_rotation_sees_lags_alone():
    x = tokens(30, width=8, dtype=torch.float64)[:, None]
    y = tokens(30, width=8, seed=3, dtype=torch.float64)[:, None]
    products = [rotate(x, first, 100.0) @ rotate(y, first, 100.0).mT for first in (0, 1000)]
    assert torch.allclose(*products, atol=1e-10)
    # One position after the other, as in a cache.
    apart = torch.cat([rotate(x[:, :, i : i + 1], i, 100.0) for i in range(30)], dim=2)
    assert torch.equal(apart, rotate(x, 0, 100.0))


def test_state_dict_and_repr_are_stable():
    attention = cb.nn.ConvBasisAttention(16, 2, output_gate=True, segment_growth=0.5)
    assert {name: tuple(t.shape) for name, t in attention.state_dict().items()} == {
        "q_proj.weight": (16, 16),
        "k_proj.weight": (16, 16),
        "v_proj.weight": (16, 16),
        "o_proj.weight": (16, 16),
        "key_gate.weight": (2, 16),
        "key_gate.bias": (2,),
        "lag_bias.table": (2, 101),
        "output_gate.weight": (16, 16),
    }
    other = cb.nn.ConvBasisAttention(16, 2, output_gate=True, segment_growth=0.5)
    other.load_state_dict(attention.state_dict())
    x = tokens(50, width=16)
    assert torch.equal(attention(x), other(x))
    assert torch.equal(copy.deepcopy(attention)(x), other(x))
    for part in ("embed_dim=16", "num_heads=2", "segment_length=64", "segment_growth=0.5"):
        assert part in repr(attention)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((30, 4), {}, "embed_dim=30 is no multiple"),
        ((32, 4), {"num_kv_heads": 3}, "no multiple of num_kv_heads=3"),
        ((30, 2), {}, "head_dim=15 is odd"),
        ((32, 4), {"segment_length": 0}, "segment_length=0"),
        ((32, 4), {"segment_growth": -1.0}, "segment_growth=-1.0"),
        ((32, 4), {"dropout": 1.0}, "dropout=1.0 is not a probability"),
        ((32, 4), {"dropout": "x"}, "dropout='x' is not a probability"),
        ((32, 4), {"rotary_base": 0.0}, "rotary_base=0.0 is not above 1"),
        ((32, 4), {"max_bytes": 0}, "max_bytes=0"),
        ((32, 4), {"gradient": "other"}, "gradient='other' is not known"),
        ((32, 4), {"backend": "magic"}, "backend='magic' is not known"),
    ],
)
def test_bad_options_are_refused(arguments, options, message):
    with pytest.raises(cb.InputError, match=message):
        cb.nn.ConvBasisAttention(*arguments, **options)


def test_bad_input_is_refused():
    attention = layer()
    for x, message in (
        ([[0.0] * 32], "hidden_states is a list"),
        (torch.zeros(5, 32), r"hidden_states has shape \(5, 32\)"),
        (torch.zeros(1, 5, 16), r"\(batch, tokens, 32\) is wanted"),
        (torch.full((1, 5, 32), math.nan), "NaN"),
        (
            torch.zeros(1, 5, 32).double(),
            "are torch.float64 but the layer",
        ),
        (torch.zeros(1, 5, 32, device="meta"), "are on meta but the layer is on cpu"),
    ):
        with pytest.raises(cb.InputError, match=message):
            attention(x)
    assert attention(torch.zeros(2, 0, 32)).shape == (2, 0, 32)
    growing = layer(segment_growth=1.0)
    with pytest.raises(cb.InputError, match="document_lengths is 9; give a list"):
        growing(torch.zeros(1, 9, 32), document_lengths=9)
    both = torch.tensor([4, 5])
    assert torch.equal(
        growing(tokens(9), document_lengths=both), growing(tokens(9), document_lengths=[4, 5])
    )
