"""Gradients: of the computed forward and of attention, against the dense oracle's autograd."""

import itertools
import math

import pytest
import reference
import torch
from comparison import assert_close
from factories import random_starts

import convbasis as cb
from convbasis.attention import by_transforms

WAYS = ["direct", "partitioned", "fft", "auto"]
NAMES = ("query", "key", "value", "key_bias", "lag_bias")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(n, *, batch=1, heads=2, kv_heads=1, d=4, d_v=3, seed=0, dtype=torch.float64, size=1.0):
    """Query, key, value and the biases by key and by lag."""
    shapes = ((batch, heads, n, d), (batch, kv_heads, n, d), (batch, kv_heads, n, d_v))
    shapes += ((batch, heads, n), (heads, n))
    generator = gen(seed)
    made = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    made[0] *= size
    return [tensor.to(dtype) for tensor in made]


def attend(tensors, **options):
    query, key, value, *biases = tensors
    named = dict(zip(("key_bias", "lag_bias"), biases, strict=False))
    return cb.conv_basis_attention(query, key, value, enable_gqa=True, **named, **options)


def gradients(tensors, weight, **options):
    own = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad((attend(own, **options) * weight).sum(), own)


def oracle(tensors, weight, starts, real=None):
    own = [tensor.double().clone().requires_grad_() for tensor in tensors]
    biases = [None, None]
    for place, bias in enumerate(own[3:]):
        biases[place] = bias.expand(own[0].shape[:3])
    output, _ = reference.conv_basis_attention(*own[:3], starts, None, real, *biases)
    return torch.autograd.grad((output * weight.double()).sum(), own)


def incoming(tensors, seed=9):
    query, value = tensors[0], tensors[2]
    shape = (*query.shape[:3], value.shape[-1])
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64).to(query.dtype)


def assert_gradients(expected, found, limit):
    for name, one, other in zip(NAMES, expected, found, strict=False):
        error = (one - other.double()).norm() / one.norm()
        assert error <= limit, f"{name}: {error:.1e}"
        assert one.norm() > 0


class TestOfTheForwardPass:
    @pytest.mark.parametrize("backend", [*WAYS, "reference"])
    @pytest.mark.parametrize("n", [1, 2, 7, 13])
    def test_gradcheck(self, n, backend):
        tensors = [x.requires_grad_() for x in inputs(n, heads=2, d=3, d_v=2)]
        starts = sorted({0, min(1, n - 1), n // 2})
        assert torch.autograd.gradcheck(
            lambda *given: attend(given, starts=starts, backend=backend), tensors
        )

    @pytest.mark.parametrize("backend", WAYS)
    def test_gradcheck_with_batch_and_padding(self, backend):
        tensors = [x.requires_grad_() for x in inputs(6, batch=2, heads=1, d=2, d_v=1)]
        tokens = torch.arange(6)
        real = torch.stack([tokens >= 3, (tokens < 5) & (tokens != 2)])
        assert torch.autograd.gradcheck(
            lambda *given: attend(given, starts=[0, 1, 4], key_padding_mask=real, backend=backend),
            tensors,
        )

    @pytest.mark.parametrize(("n", "k"), [(17, 17), (101, 3), (256, 16), (389, 1), (389, 40)])
    def test_equals_the_dense_oracle(self, n, k):
        starts = random_starts(n, k, gen(n + k))
        tensors = inputs(n, batch=2, heads=4, kv_heads=2)
        weight = incoming(tensors)
        expected = oracle(tensors, weight, starts)
        for backend in WAYS * 2:  # the second call finds the memory of the first
            found = gradients(tensors, weight, starts=starts, backend=backend)
            assert_gradients(expected, found, 1e-9)
        expected = oracle(tensors[:3], weight, starts)
        for backend in WAYS:
            plain = gradients(tensors[:3], weight, starts=starts, backend=backend)
            assert_gradients(expected, plain, 1e-9)

    @pytest.mark.parametrize("backend", WAYS)
    def test_in_float32_and_half_types(self, backend):
        starts = torch.tensor([0, 64, 128, 200, 333])
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            tensors = inputs(400, dtype=dtype, d=16, d_v=8)
            weight = incoming(tensors)
            found = gradients(tensors, weight, starts=starts, backend=backend)
            assert all(grad.dtype == dtype for grad in found)
            assert_gradients(oracle(tensors, weight, starts), found, limit)

    @pytest.mark.parametrize("kind", ["left", "right", "holes"])
    def test_with_padding_where_transforms_matter(self, kind):
        """Also where a row that is evaluated by itself is padding between real tokens."""
        n = 400
        tokens = torch.arange(n)
        real = {"left": tokens >= 70, "right": tokens < 333, "holes": tokens % 7 != 3}[kind][None]
        starts = torch.tensor([0, 90, 200, 310])
        for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            tensors = inputs(n, dtype=dtype, size=3.0)
            tensors[0] = tensors[0].masked_fill(~real[:, None, :, None], 0.0)
            tensors[0][:, :, 30:33] -= 8.0 * tensors[1][:, :, :1]
            tensors[0] = tensors[0].masked_fill(~real[:, None, :, None], 0.0)
            weight = incoming(tensors)
            past = tokens >= (333 if kind == "right" else n)
            weight[:, :, past | (tokens < 70 if kind == "left" else past)] = 0.0
            expected = oracle(tensors, weight, starts, real)
            for backend in WAYS:
                found = gradients(
                    tensors, weight, starts=starts, backend=backend, key_padding_mask=real
                )
                masked = []
                for name, grad in zip(NAMES, expected, strict=True):
                    if name == "lag_bias":
                        masked.append(grad)
                        continue
                    mask = real[:, None, :] if name == "key_bias" else real[:, None, :, None]
                    masked.append(grad.masked_fill(~mask, 0.0))
                assert_gradients(masked, found, limit)

    def test_rows_of_very_different_size(self):
        """Rows that see one small weight stand beside others with huge ones."""
        tensors = inputs(500, dtype=torch.float32, size=6.0, d=8)
        weight = incoming(tensors)
        starts = torch.arange(0, 500, 50)
        expected = oracle(tensors, weight, starts)
        for backend in ("direct", "partitioned"):
            found = gradients(tensors, weight, starts=starts, backend=backend)
            assert_gradients(expected, found, 1e-5)
        far = [x.clone() for x in tensors]
        far[0] *= 6.0  # a range of e^100 and more: logits are laid out before they are exponentiated
        found = gradients(far, weight, starts=starts, backend="direct")
        assert_gradients(oracle(far, weight, starts), found, 1e-4)

    @pytest.mark.parametrize("gradient", ["forward", "attention"])
    @pytest.mark.parametrize("biases", [False, True])
    def test_a_head_worked_in_float64_keeps_its_inputs_in_float32(self, biases, gradient, monkeypatch):
        n = 700
        tensors = inputs(n, dtype=torch.float32)[: None if biases else 3]
        options = {"segment_length": 100, "backend": "partitioned", "gradient": gradient}
        options["key_padding_mask"] = torch.arange(n)[None] < n - 40
        weight = incoming(tensors)
        exact = gradients([x.double() for x in tensors], weight.double(), **options)
        worked = []

        def noted(windows, partition, x, weights, outer, *rest, **named):
            worked.append((named["dtype"], outer.rows.dtype))
            return products(windows, partition, x, weights, outer, *rest, **named)

        products = by_transforms.partitioned_gradients
        if gradient == "forward":
            monkeypatch.setattr(by_transforms, "partitioned_gradients", noted)
        monkeypatch.setattr(by_transforms, "_TOLERANCE", 0.0)
        found = gradients(tensors, weight, **options)
        assert_gradients(exact, found, 1e-6)
        if gradient == "forward":
            expected = [(torch.float32, torch.float32), (torch.float64, torch.float32)]
            assert worked == expected * 2  # two heads

    def test_of_the_log_sum_exp_too(self):
        tensors = [x.requires_grad_() for x in inputs(12)]
        starts = torch.tensor([0, 3, 8])

        def both(query, key, value):
            stats = cb.conv_basis_attention_stats(query, key, value, starts=starts, enable_gqa=True)
            return stats.output, stats.lse

        assert torch.autograd.gradcheck(both, tensors[:3])

    def test_little_memory_gives_the_same(self):
        tensors = inputs(700, d=6, d_v=5)
        weight = incoming(tensors)
        for starts in (torch.arange(0, 700, 20), torch.tensor([0, 300])):
            expected = gradients(tensors, weight, starts=starts, backend="partitioned")
            for budget in (1, 1 << 16, 1 << 19):
                found = gradients(
                    tensors, weight, starts=starts, backend="partitioned", max_bytes=budget
                )
                assert_gradients(expected, found, 1e-12)

    def test_what_is_saved_is_linear_in_n(self):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        query, key, value = (x.requires_grad_() for x in inputs(2000, heads=1, d=8, d_v=8)[:3])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            cb.conv_basis_attention(query, key, value, segment_length=100)
        assert sum(sizes) <= 2000 * (8 + 8 + 8 + 8 + 1) + 20

    def test_differentiating_twice_is_refused(self):
        tensors = [x.requires_grad_() for x in inputs(30)[:3]]
        output = attend(tensors, segment_length=7)
        (once,) = torch.autograd.grad(output.square().sum(), tensors[:1], create_graph=True)
        with pytest.raises(cb.ConvBasisError, match="differentiated once more"):
            torch.autograd.grad(once.sum(), tensors)
        # A graph that nobody differentiates again does no harm.
        plain = gradients([x.detach() for x in tensors], 2 * output.detach(), segment_length=7)
        assert torch.allclose(once.detach(), plain[0])

    def test_nan_in_the_incoming_gradient_reaches_the_result(self):
        for backend in ("direct", "partitioned"):
            tensors = inputs(300)[:3]
            weight = incoming(tensors)
            weight[0, 0, 150, 0] = math.nan
            found = gradients(tensors, weight, segment_length=60, backend=backend)
            assert not any(grad.isfinite().all() for grad in found)

    def test_inputs_that_are_not_contiguous(self):
        tensors = inputs(60)
        weight = incoming(tensors)
        expected = gradients(tensors, weight, segment_length=20)
        strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors[:3]]
        spread = weight.transpose(1, 2).contiguous().transpose(1, 2)
        found = gradients([*strided, *tensors[3:]], spread, segment_length=20)
        assert_gradients(expected, found, 1e-15)


class TestOfAttention:
    @pytest.mark.parametrize("backend", WAYS)
    @pytest.mark.parametrize("n", [5, 101, 300])
    def test_with_every_token_a_segment_it_is_exact_attentions(self, n, backend):
        query, key, value = (x.requires_grad_() for x in inputs(n, kv_heads=2)[:3])
        weight = incoming([query, key, value])
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        expected = torch.autograd.grad((exact * weight).sum(), (query, key, value))
        found = gradients(
            [query, key, value], weight, segment_length=1, gradient="attention", backend=backend
        )
        assert_gradients(expected, found, 1e-9)

    @pytest.mark.parametrize("backend", WAYS)
    @pytest.mark.parametrize("k", [1, 3, 30])
    def test_equals_the_closed_form_with_the_basis_weights(self, k, backend):
        n, scale = 301, 0.4
        starts = random_starts(n, k, gen(k))
        tensors = inputs(n)
        query, key, value, key_bias, lag_bias = tensors
        weight = incoming(tensors)
        expected = [torch.zeros_like(x) for x in tensors]
        for h in range(2):
            logits = reference.conv_basis_logits(query[0, h], key[0, 0], starts, scale, lag_bias[h])
            logits = logits + key_bias[0, h]
            of_query, of_key, of_value, of_logits = reference.attention_gradients(
                logits, query[0, h], key[0, 0], value[0, 0], weight[0, h], scale
            )
            expected[0][0, h] = of_query
            expected[1][0, 0] += of_key
            expected[2][0, 0] += of_value
            expected[3][0, h] = of_logits.sum(0)
            expected[4][h] = torch.stack([of_logits.diagonal(-t).sum() for t in range(n)])
        for budget in (None, 1, 1 << 18):
            found = gradients(
                tensors,
                weight,
                starts=starts,
                scale=scale,
                gradient="attention",
                backend=backend,
                max_bytes=budget,
            )
            assert_gradients(expected, found, 1e-9)

    def test_in_float32(self):
        tensors = inputs(600, dtype=torch.float32, d=8, d_v=8)
        weight = incoming(tensors)
        options = {"segment_length": 40, "gradient": "attention"}
        expected = gradients([x.double() for x in tensors], weight.double(), **options)
        for backend in ("direct", "partitioned"):
            assert_gradients(expected, gradients(tensors, weight, backend=backend, **options), 1e-5)

    def test_the_two_gradients_differ_but_for_values(self):
        tensors = inputs(50)
        weight = incoming(tensors)
        forward = gradients(tensors, weight, segment_length=10)
        attention = gradients(tensors, weight, segment_length=10, gradient="attention")
        assert torch.equal(forward[2], attention[2])
        assert (forward[0] - attention[0]).norm() > 0.1 * forward[0].norm()
        assert (attention[1].norm(dim=-1) > 0).all()  # every key has one
        assert int((forward[1].norm(dim=-1) > 0).sum()) == 5  # the first ones of segments alone

    def test_an_unknown_gradient_is_refused(self):
        with pytest.raises(cb.InputError, match="gradient='exact' is not known"):
            attend(inputs(5), segment_length=2, gradient="exact")


class TestCausality:
    @pytest.mark.parametrize("gradient", ["forward", "attention"])
    @pytest.mark.parametrize("backend", ["direct", "partitioned"])
    def test_no_gradient_from_a_row_to_later_tokens(self, backend, gradient):
        n = 211
        tensors = inputs(n)
        starts = random_starts(n, 9, gen(3))
        borders = [int(s) for s in starts[1:4]]
        anywhere = torch.randint(n, (4,), generator=gen(8)).tolist()
        for i in (0, n - 2, *anywhere, *borders, *(b - 1 for b in borders)):
            weight = torch.zeros_like(incoming(tensors))
            weight[:, :, i] = 1.0
            found = gradients(tensors, weight, starts=starts, backend=backend, gradient=gradient)
            by_token = [grad if grad.shape[-1] == n else grad.norm(dim=-1) for grad in found]
            largest = max(float(tokens.abs().max()) for tokens in by_token)
            for name, tokens in zip(NAMES, by_token, strict=True):
                assert (tokens[..., i + 1 :].abs() <= 1e-12 * largest).all(), name


class TestBiases:
    @pytest.mark.parametrize("backend", [*WAYS, "reference"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_forward_equals_the_oracle(self, dtype, backend):
        tensors = inputs(230, batch=2, heads=4, kv_heads=2, dtype=dtype)
        query, key, value, key_bias, lag_bias = tensors
        starts = torch.tensor([0, 40, 41, 100, 200])
        tokens = torch.arange(230)
        whole = [key_bias, lag_bias.expand(2, 4, 230)]
        holes = torch.rand(2, 230, generator=gen(3)) < 0.7
        holes[:, 228:] = True
        for real in (None, torch.stack([tokens >= 60, tokens < 180]), holes):
            if real is not None:
                query = query.masked_fill(~real[:, None, :, None], 0.0)
            expected, lse = reference.conv_basis_attention(
                query, key, value, starts, None, real, *whole
            )
            spoiled = key_bias
            if real is not None:
                spoiled = key_bias.masked_fill(~real[:, None], math.nan)
            stats = cb.conv_basis_attention_stats(
                query,
                key,
                value,
                starts=starts,
                enable_gqa=True,
                key_padding_mask=real,
                key_bias=spoiled,
                lag_bias=lag_bias,
                backend=backend,
            )
            seen = torch.ones(2, 4, 230, dtype=torch.bool)
            if real is not None:
                between = real.cummax(-1).values & real.flip(-1).cummax(-1).values.flip(-1)
                seen = between[:, None].expand(2, 4, 230)
            assert torch.equal(stats.lse.isfinite(), seen)
            limit = 1e-10 if dtype == torch.float64 else 1e-5
            rows = seen  # those before the first and after the last real token are 0
            assert_close(
                expected[rows][None], stats.output[rows][None].double(), whole=limit, row=10 * limit
            )
            assert (stats.lse.double() - lse)[rows].abs().max() < 100 * limit

    def test_a_wide_range_of_biases(self):
        tensors = inputs(300, dtype=torch.float32)
        tensors[3] *= 30.0  # e^100 between the columns
        for backend in WAYS:
            found = attend(tensors, segment_length=50, backend=backend)
            exact = attend([x.double() for x in tensors], segment_length=50, backend="reference")
            assert_close(exact, found.double(), whole=1e-5, row=1e-4)

    def test_each_bias_changes_the_result(self):
        query, key, value, key_bias, lag_bias = inputs(30)
        options = {"segment_length": 10, "enable_gqa": True}
        plain = cb.conv_basis_attention(query, key, value, **options)
        for more in ({"key_bias": key_bias}, {"lag_bias": lag_bias}):
            assert (cb.conv_basis_attention(query, key, value, **more, **options) - plain).norm() > 0.1
        # A constant changes nothing but the log-sum-exp.
        stats = cb.conv_basis_attention_stats(
            query, key, value, key_bias=torch.full((1, 1, 30), 2.5).double(), **options
        )
        before = cb.conv_basis_attention_stats(query, key, value, **options)
        assert (stats.output - before.output).abs().max() < 1e-14
        assert (stats.lse - before.lse - 2.5).abs().max() < 1e-14

    def test_bad_ones_are_refused(self):
        query, key, value, key_bias, lag_bias = inputs(30)
        for name, bias, message in (
            ("key_bias", key_bias[..., :20], "key_bias has shape .* or what broadcasts"),
            ("lag_bias", torch.zeros(3, 30), "lag_bias has shape"),
            ("lag_bias", torch.zeros(1), "lag_bias has shape"),
            ("lag_bias", [0.0] * 30, "lag_bias is a list"),
            ("key_bias", key_bias.long(), "key_bias has dtype"),
            ("lag_bias", lag_bias / 0.0, "lag_bias holds"),
        ):
            with pytest.raises(cb.InputError, match=message):
                cb.conv_basis_attention(
                    query, key, value, segment_length=5, enable_gqa=True, **{name: bias}
                )


class TestDocuments:
    @pytest.mark.parametrize("lengths", [[40, 40, 40], [7, 60, 1, 40, 7, 5], [120]], ids=str)
    @pytest.mark.parametrize(
        "options", [{"segment_length": 16}, {"num_bases": 3}, {"starts": "given"}], ids=str
    )
    def test_each_is_attended_to_by_itself(self, lengths, options):
        tensors = inputs(120, batch=2)
        weight = incoming(tensors)
        borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        starts = sorted({*borders[:-1], 3, 20, 70})
        given = {"starts": starts} if "starts" in options else options
        found = gradients(tensors, weight, document_lengths=lengths, **given)
        output = attend(tensors, document_lengths=lengths, **given)
        expected = [torch.zeros_like(x) for x in tensors]
        for low, high in itertools.pairwise(borders):
            parts = [x[:, :, low:high] for x in tensors[:4]] + [tensors[4][:, : high - low]]
            own = given
            if "starts" in given:
                own = {"starts": [s - low for s in starts if low <= s < high]}
            alone = attend(parts, **own)
            assert (alone - output[:, :, low:high]).abs().max() < 1e-13
            grads = gradients(parts, weight[:, :, low:high], **own)
            for place in range(4):
                expected[place][:, :, low:high] = grads[place]
            expected[4][:, : high - low] += grads[4]
        assert_gradients(expected, found, 1e-12)

    def test_nothing_crosses_a_border(self):
        tensors = inputs(90)
        weight = torch.zeros_like(incoming(tensors))
        weight[:, :, 50:70] = 1.0
        found = gradients(tensors, weight, document_lengths=[50, 20, 20], segment_length=8)
        for grad in found[:3]:
            assert (grad[:, :, :50] == 0).all()
            assert (grad[:, :, 70:] == 0).all()
            assert grad[:, :, 50:70].norm() > 0

    def test_with_padding_and_what_was_run(self):
        tensors = inputs(90, batch=2)
        real = torch.rand(2, 90, generator=gen()) < 0.8
        attend(tensors, document_lengths=[30, 60], segment_length=8, key_padding_mask=real)
        assert "longest of 2 documents" in cb.last_dispatch().reason

    def test_bad_lengths_are_refused(self):
        tensors = inputs(30)
        for lengths, message in (
            ([10, 10], "add up to 20 tokens, but the sequence has 30"),
            ([30, 0], "at least 1 token"),
            ([15, 15.0], "at least 1 token"),
            (30, "give a list"),
        ):
            with pytest.raises(cb.InputError, match=message):
                attend(tensors, segment_length=5, document_lengths=lengths)
        with pytest.raises(cb.InputError, match="begins at token 10, but starts do not hold 10"):
            attend(tensors, starts=[0, 12], document_lengths=[10, 20])
        with pytest.raises(cb.InputError, match="must be \\(k,\\)"):
            attend(tensors, starts=torch.zeros(1, 2, 1).long(), document_lengths=[10, 20])
        with pytest.raises(cb.InputError, match="not one conv basis"):
            cb.conv_basis_attention_stats(
                *tensors[:3], segment_length=5, enable_gqa=True, document_lengths=[10, 20]
            )


class TestObjective:
    def matrices(self, n, d, d_v, dtype=torch.float64):
        shapes = ((n, d), (n, d), (n, d), (d, d), (d, d_v), (n, d_v))
        generator = gen(n)
        return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]

    @pytest.mark.parametrize("n", [1, 13, 128, 400])
    @pytest.mark.parametrize("length", [1, 9, 1000])
    def test_equals_autograd_on_the_dense_objective(self, n, length):
        """With every token a segment; with longer ones the weights are the basis', taken as exact."""
        A1, A2, A3, X, Y, E = self.matrices(n, 3, 4)
        starts = torch.arange(0, n, length)
        own = X.clone().requires_grad_()
        loss = reference.objective(A1, A2, A3, own, Y, E, starts)
        found = cb.attention_loss_and_gradient(A1, A2, A3, X, Y, E, segment_length=length)
        assert abs(float(found.loss - loss.detach())) <= 1e-9 * float(loss.detach())
        if length == 1:
            (expected,) = torch.autograd.grad(loss, own)
        else:
            logits = reference.conv_basis_logits(A1 @ X, A2, starts, 1.0)
            error = reference.softmax_attention(logits, A3 @ Y)[0] - E
            of_query = reference.attention_gradients(logits, A1 @ X, A2, A3 @ Y, error, 1.0)[0]
            expected = A1.T @ of_query
        assert (found.grad - expected).norm() <= 1e-9 * max(1e-3, float(expected.norm()))

    def test_by_transforms(self, monkeypatch):
        monkeypatch.setattr("convbasis.attention.cost._OF_KEYS", 1e9)
        A1, A2, A3, X, Y, E = self.matrices(500, 3, 4)
        X = 0.2 * X  # more would be too wide a range
        by_transforms = cb.attention_loss_and_gradient(A1, A2, A3, X, Y, E, segment_length=50)
        monkeypatch.undo()
        laid_out = cb.attention_loss_and_gradient(A1, A2, A3, X, Y, E, segment_length=50)
        assert (by_transforms.grad - laid_out.grad).norm() <= 1e-9 * laid_out.grad.norm()
        assert not torch.equal(by_transforms.grad, laid_out.grad)

    def test_starts_and_recovery(self):
        matrices = self.matrices(60, 3, 4)
        uniform = cb.attention_loss_and_gradient(*matrices, segment_length=20)
        given = cb.attention_loss_and_gradient(*matrices, starts=[0, 20, 40])
        assert torch.equal(uniform.grad, given.grad)
        recovered = cb.attention_loss_and_gradient(*matrices, num_bases=60)
        exact = cb.attention_loss_and_gradient(*matrices, segment_length=1)
        assert (recovered.grad - exact.grad).norm() <= 1e-9 * exact.grad.norm()

    def test_descent_along_the_gradient_lowers_the_loss(self):
        A1, A2, A3, X, Y, E = self.matrices(200, 3, 4)
        before = cb.attention_loss_and_gradient(A1, A2, A3, X, Y, E, segment_length=1)
        moved = X - 1e-3 * before.grad / before.grad.norm()
        after = cb.attention_loss_and_gradient(A1, A2, A3, moved, Y, E, segment_length=1)
        expected = 1e-3 * float(before.grad.norm())
        assert float(before.loss - after.loss) == pytest.approx(expected, rel=0.01)

    def test_bad_input_is_refused(self):
        A1, A2, A3, X, Y, E = self.matrices(20, 3, 4)
        for changed, message in (
            ({"A2": A2[:10]}, r"A2 has shape \(10, 3\); .* must be \(20, 3\)"),
            ({"E": E[:, :2]}, r"E has shape"),
            ({"X": X[None]}, "a matrix is wanted"),
            ({"Y": Y.float()}, "Y has dtype"),
            ({"A3": A3 / 0.0}, "A3 holds"),
            ({"A1": [1.0]}, "A1 is a list"),
            ({"A1": A1[:0]}, "there is nothing to attend to"),
        ):
            given = {"A1": A1, "A2": A2, "A3": A3, "X": X, "Y": Y, "E": E, **changed}
            with pytest.raises(cb.InputError, match=message):
                cb.attention_loss_and_gradient(**given, segment_length=4)
