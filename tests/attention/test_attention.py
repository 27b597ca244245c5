"""conv_basis_attention against the dense oracle, and the laws that it keeps."""

import logging
import threading

import hypothesis.strategies as st
import pytest
import reference
import torch
from comparison import assert_close
from factories import random_starts
from hypothesis import given, settings

import convbasis as cb

# float32 logits are rounded before exp, which no evaluation can undo: 1e-5 of the whole.
LIMITS = {torch.float64: (1e-12, 1e-9), torch.float32: (1e-5, 1e-4)}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def qkv(n, *, batch=1, heads=1, kv_heads=None, d=16, d_v=None, dtype=torch.float64, seed=0, size=1.0):
    g = gen(seed)

    def draw(h, width):
        return torch.randn(batch, h, n, width, generator=g, dtype=torch.float64)

    kv_heads = kv_heads or heads
    query, key, value = draw(heads, d), draw(kv_heads, d), draw(kv_heads, d_v or d)
    return (size * query).to(dtype), (size * key).to(dtype), value.to(dtype)


def check(query, key, value, starts, *, whole=None, row=None, real=None, scale=None, **options):
    """Compare with the oracle, twice."""
    limits = LIMITS.get(query.dtype, (None, None))
    expected, lse = reference.conv_basis_attention(query, key, value, starts, scale, real)
    for _ in range(2):
        stats = cb.conv_basis_attention_stats(
            query, key, value, starts=starts, scale=scale, key_padding_mask=real, **options
        )
        assert stats.output.dtype == query.dtype
        assert_close(expected, stats.output, whole=whole or limits[0], row=row or limits[1])
        finite = lse.isfinite()
        assert torch.equal(stats.lse.isfinite(), finite)
        assert (stats.lse.double() - lse)[finite].abs().max() < (1e-4 if row is None else 1.0)
    return stats


class TestOracle:
    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    @pytest.mark.parametrize("backend", ["fft", "partitioned", "direct", "reference", "auto"])
    @pytest.mark.parametrize("n", [1, 2, 3, 17, 97, 128, 256, 257])
    def test_equals_the_dense_result(self, n, backend, dtype):
        for k in sorted({1, min(n, 3), min(n, 20)}):
            starts = random_starts(n, k, gen(k))
            check(*qkv(n, dtype=dtype), starts, backend=backend)

    @pytest.mark.parametrize("backend", ["fft", "partitioned", "direct", "reference"])
    def test_longer(self, backend):
        check(*qkv(1009, dtype=torch.float32), random_starts(1009, 9, gen()), backend=backend)

    @pytest.mark.parametrize("backend", ["fft", "partitioned", "direct", "reference"])
    def test_batch_heads_gqa_and_other_value_width(self, backend):
        inputs = qkv(150, batch=2, heads=6, kv_heads=2, d=8, d_v=5)
        starts = random_starts(150, 7, gen())
        check(*inputs, starts, backend=backend, enable_gqa=True)
        per_head = torch.stack([random_starts(150, 7, gen(s)) for s in range(12)]).view(2, 6, 7)
        per_head[0, 0, 4:] = 150  # a shorter one, filled up
        check(*inputs, per_head, backend=backend, enable_gqa=True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_types(self, dtype):
        inputs = qkv(300, dtype=dtype)
        starts = torch.tensor([0, 100, 200])
        expected, _ = reference.conv_basis_attention(*inputs, starts)
        result = cb.conv_basis_attention(*inputs, starts=starts)
        assert result.dtype == dtype
        rounding = torch.finfo(dtype).eps
        assert (result.double() - expected).abs().max() < rounding * expected.abs().max()

    def test_scale_changes_the_result_as_it_should(self):
        inputs = qkv(140)
        check(*inputs, torch.tensor([0, 50]), scale=0.7)
        one = cb.conv_basis_attention(*inputs, segment_length=50)
        other = cb.conv_basis_attention(*inputs, segment_length=50, scale=0.7)
        assert (one - other).abs().max() > 1e-2

    def test_strided_inputs(self):
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(200, heads=3))
        assert not query.is_contiguous()
        check(query, key, value, torch.tensor([0, 30]), backend="fft")

    def test_exact_attention_when_every_key_is_a_segment(self):
        query, key, value = qkv(90, heads=2)
        exact = reference.exact_attention(query, key, value)
        for options in ({"segment_length": 1}, {"num_bases": 90, "delta": 0.0}, {"num_bases": 90}):
            for backend in ("fft", "reference"):
                result = cb.conv_basis_attention(query, key, value, backend=backend, **options)
                assert_close(exact, result, whole=1e-10, row=1e-10)

    def test_sdpa_agrees_where_every_key_is_a_segment(self):
        inputs = qkv(64, heads=2, dtype=torch.float32)
        expected = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        assert_close(expected, cb.conv_basis_attention(*inputs, segment_length=1), whole=1e-5, row=1e-5)

    def test_planted_logits_are_reproduced(self):
        planted = cb.planted_qk(400, 16, 5, generator=gen())
        query, key = planted.query[None, None], planted.key[None, None]
        value = torch.randn(1, 1, 400, 8, dtype=torch.float64)
        result = cb.conv_basis_attention(query, key, value, num_bases=5)
        assert_close(reference.exact_attention(query, key, value), result, whole=1e-10, row=1e-9)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 200), st.integers(1, 8), st.integers(0, 2**31))
    def test_property_any_shape(self, n, k, seed):
        starts = random_starts(n, min(k, n), gen(seed))
        check(*qkv(n, seed=seed, heads=2), starts, backend="fft", row=1e-7)


class TestSegments:
    def test_uniform_segments_are_starts(self):
        inputs = qkv(230)
        one = cb.conv_basis_attention(*inputs, segment_length=64)
        other = cb.conv_basis_attention(*inputs, starts=[0, 64, 128, 192])
        assert torch.equal(one, other)
        assert torch.equal(cb.conv_basis_attention(*inputs, starts=[0, 64, 128, 192], num_bases=4), one)

    def test_recovered_segments_are_those_of_recover(self):
        query, key, value = qkv(180, batch=2, heads=4, kv_heads=2)
        stats = cb.conv_basis_attention_stats(query, key, value, num_bases=6, window=2, enable_gqa=True)
        shared = key.repeat_interleave(2, dim=1)
        basis = cb.recover(query, shared, num_bases=6, window=2)
        assert torch.equal(stats.basis.starts, basis.starts)
        assert torch.allclose(stats.basis.segment_kernels, basis.segment_kernels, atol=1e-13)
        for b in range(2):
            for h in range(4):
                expected = reference.conv_basis_logits(query[b, h], shared[b, h], basis.starts[b, h])
                assert (stats.basis.to_dense()[b, h] - expected).abs().max() < 1e-12

    def test_each_recovery_option_changes_something(self):
        inputs = qkv(200)

        def starts(**options):
            return cb.conv_basis_attention_stats(*inputs, **options).basis.starts.flatten().tolist()

        plain = starts(num_bases=5, delta=3.0)
        assert starts(num_bases=6, delta=3.0) != plain
        assert starts(num_bases=5, delta=6.0) != plain
        assert starts(num_bases=5, delta=3.0, window=3) != plain
        assert starts(num_bases=5, delta=3.0, epsilon=0.05) != plain
        assert starts(num_bases=5, delta=3.0, search="binary") != plain

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "no segments"),
            ({"starts": [0, 5], "segment_length": 4}, "contradict"),
            ({"num_bases": 5, "segment_length": 4}, "contradict"),
            ({"starts": [0, 5], "num_bases": 3}, "contradicts the 2 starts"),
            ({"starts": [0, 5], "num_bases": 0}, "positive integer"),
            ({"starts": [0, 5], "delta": 1.0}, "recovered segments only"),
            ({"segment_length": 5, "window": 2}, "recovered segments only"),
            ({"segment_length": 5, "epsilon": 0.1}, "recovered segments only"),
            ({"starts": [0], "search": "binary"}, "recovered segments only"),
            ({"starts": [1, 5]}, "begin at 0"),
            ({"starts": [0, 5, 5]}, "increase strictly"),
            ({"starts": [0, 9, 5]}, "increase strictly"),
            ({"starts": [0, 41]}, "0..39"),
            ({"starts": [0, 40]}, "past the last token"),
            ({"starts": [0, -1]}, "0..39"),
            ({"starts": []}, "empty"),
            ({"starts": [[0, 1], [0]]}, "integers"),
            ({"starts": torch.zeros(3, 1, 1, dtype=torch.int64)}, r"\(B, H, k\)"),
            ({"num_bases": 0}, "num_bases=0"),
            ({"num_bases": -2}, "num_bases=-2"),
            ({"num_bases": 2.5}, "num_bases=2.5"),
            ({"num_bases": True}, "num_bases=True"),
            ({"segment_length": 0}, "segment_length=0"),
            ({"num_bases": 2, "window": 0}, "window=0"),
            ({"num_bases": 2, "window": 41}, "window=41"),
            ({"num_bases": 2, "delta": -1.0}, "delta=-1.0"),
            ({"num_bases": 2, "delta": float("nan")}, "delta=nan"),
            ({"num_bases": 2, "epsilon": -1.0}, "epsilon=-1.0"),
            ({"num_bases": 2, "epsilon": None}, "epsilon=None"),
            ({"num_bases": 2, "search": "fast"}, "search='fast'"),
            ({"num_bases": 2, "search": "binary"}, "needs delta"),
        ],
    )
    def test_bad_segment_arguments(self, options, message):
        with pytest.raises(cb.InputError, match=message):
            cb.conv_basis_attention(*qkv(40), **options)


class TestNumerics:
    @pytest.mark.parametrize("backend", ["fft", "partitioned", "direct", "auto"])
    @pytest.mark.parametrize("spread", [10.0, 40.0, 60.0, 120.0])
    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    def test_wide_logits(self, dtype, spread, backend):
        query, key, value = qkv(800, dtype=torch.float64, d=4)
        starts = torch.arange(0, 800, 100)
        logits = torch.stack([query[0, 0] @ key[0, 0, s] / 2.0 for s in starts.tolist()])
        query = query * spread / (logits.max() - logits.min())
        inputs = query.to(dtype), key.to(dtype), value.to(dtype)
        whole = 1e-15 * spread**2 if dtype == torch.float64 else 5e-7 * spread
        stats = check(*inputs, starts, whole=max(whole, 1e-12), row=1e-4, backend=backend)
        kernels = stats.basis.segment_kernels
        assert kernels.max() - kernels.min() > 0.6 * spread
        if spread >= 60 and backend == "fft":
            mended = stats.dispatch
            assert mended.rows_recomputed + mended.heads_float64 + mended.heads_direct > 0

    def planted_ramp(self, n, drop, rows):
        """Logits that fall by `drop` nats for the first rows' worth of queries and keys."""
        query = torch.zeros(1, 1, n, 2)
        key = torch.zeros(1, 1, n, 2)
        query[..., 0] = 1.0
        key[..., 0] = 1.0
        query[0, 0, :rows, 0] = -drop
        return query, key, torch.randn(1, 1, n, 4)

    def test_few_lost_rows_are_recomputed_one_by_one(self, caplog):
        query, key, value = self.planted_ramp(6000, 25.0, 30)
        # Row i sees the kernel at lags up to i: the first 30 rows are e^26 smaller than the rest.
        with caplog.at_level(logging.WARNING, "convbasis"):
            stats = check(query, key, value, torch.tensor([0]), scale=1.0, backend="fft")
        assert 30 <= stats.dispatch.rows_recomputed <= 120
        assert stats.dispatch.heads_float64 == stats.dispatch.heads_direct == 0
        assert not caplog.records
        assert cb.last_dispatch() == stats.dispatch

    def ramp_beside_calm(self, drop):
        query, key, value = self.planted_ramp(2000, drop, 500)
        calm = torch.zeros_like(query)
        query, key = torch.cat([query, calm], 1), torch.cat([key, calm], 1)
        return query, key, value.expand(1, 2, -1, -1)

    def test_a_head_with_many_lost_rows_is_transformed_in_float64(self, caplog):
        inputs = self.ramp_beside_calm(15.0)
        with caplog.at_level(logging.WARNING, "convbasis"):
            stats = check(*inputs, torch.tensor([0]), scale=1.0, backend="fft")
        assert (stats.dispatch.heads_float64, stats.dispatch.heads_direct) == (1, 0)
        assert not caplog.records

    def test_a_head_that_float64_cannot_save_is_evaluated_directly_and_logged(self, caplog):
        inputs = self.ramp_beside_calm(50.0)
        with caplog.at_level(logging.WARNING, "convbasis"):
            stats = check(*inputs, torch.tensor([0]), scale=1.0, backend="fft")
        assert (stats.dispatch.heads_float64, stats.dispatch.heads_direct) == (1, 1)
        assert "1 of 2 heads" in caplog.records[0].message
        assert caplog.records[0].levelname == "WARNING"

    def test_underflow_of_every_entry_of_a_row(self):
        query, key, value = self.planted_ramp(6000, 300.0, 20)
        stats = check(query, key, value, torch.tensor([0]), scale=1.0, backend="fft")
        assert stats.dispatch.rows_recomputed >= 20

    def test_ordinary_input_is_not_recomputed(self):
        stats = check(*qkv(3000, dtype=torch.float32, d=8), torch.tensor([0, 1000]), backend="fft")
        assert stats.dispatch.heads_direct == 0
        assert stats.dispatch.heads_float64 == 0
        assert stats.dispatch.rows_recomputed < 60

    @pytest.mark.parametrize("width", [1, 2, 4])
    def test_rows_that_cancel_are_right_and_causal_too(self, width):
        query, key, value = qkv(4000, d_v=width, dtype=torch.float32)
        starts = torch.arange(0, 4000, 500)
        exact = cb.conv_basis_attention(query, key, value, starts=starts, backend="reference")
        output = cb.conv_basis_attention(query, key, value, starts=starts, backend="fft")
        assert_close(exact, output, whole=1e-5, row=5e-5)
        value = value.clone()
        value[:, :, 3000:] *= 100
        later = cb.conv_basis_attention(query, key, value, starts=starts, backend="fft")
        assert_close(output[:, :, :3000], later[:, :, :3000], whole=1e-5, row=5e-5)

    def test_value_that_is_zero_gives_zero(self):
        query, key, value = qkv(400, dtype=torch.float32)
        stats = cb.conv_basis_attention_stats(query, key, value * 0, segment_length=64, backend="fft")
        assert (stats.output == 0).all()
        assert stats.dispatch.rows_recomputed == stats.dispatch.heads_direct == 0

    @pytest.mark.parametrize("backend", ["fft", "partitioned"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("length", [50, 8])
    def test_small_memory_budget_changes_nothing(self, backend, dtype, length):
        inputs = qkv(500, heads=4, batch=2, dtype=dtype)
        attend = lambda **options: cb.conv_basis_attention(  # noqa: E731
            *inputs, segment_length=length, backend=backend, **options
        )
        one = attend()
        # Other groups of blocks round differently, within what the oracle allows; half types are
        # rounded in the end.
        single = 1e-6 if backend == "fft" else LIMITS[torch.float32][0]
        limit = single if dtype == torch.float32 else 4e-3
        for budget in (1, 50_000):
            assert_close(one, attend(max_bytes=budget), whole=limit, row=max(limit, 1e-4))

    def test_overflowing_logits_are_refused(self):
        query, key, value = qkv(200, dtype=torch.float32)
        with pytest.raises(cb.InputError, match="overflow"):
            cb.conv_basis_attention(query * 1e20, key * 1e20, value, segment_length=10)
        one = torch.full((1, 1, 4, 1), 1e25)
        for sign in (1, -1):
            with pytest.raises(cb.InputError, match="overflow"):
                cb.conv_basis_attention(one, sign * one, one, starts=[0])

    @pytest.mark.parametrize("backend", ["partitioned", "direct", "fft", "reference"])
    def test_autocast_sets_the_dtype_of_the_result_and_rounds_nothing_else(self, backend):
        inputs = qkv(200, dtype=torch.float32)
        plain = cb.conv_basis_attention(*inputs, segment_length=32, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = cb.conv_basis_attention(*inputs, segment_length=32, backend=backend)
            mixed = cb.conv_basis_attention(
                inputs[0].bfloat16(), *inputs[1:], segment_length=32, backend=backend
            )
            wide = cb.conv_basis_attention(
                *(x.double() for x in inputs), segment_length=32, backend=backend
            )
        assert torch.equal(result, plain.bfloat16())
        assert mixed.dtype == torch.bfloat16
        assert wide.dtype == torch.float64


class TestCausality:
    @pytest.mark.parametrize("options", [{"starts": [0, 40, 90]}, {"segment_length": 64}], ids=str)
    @pytest.mark.parametrize(
        ("backend", "dtype", "limit"),
        [
            ("fft", torch.float64, 1e-12),
            ("fft", torch.float32, 1e-5),
            ("reference", torch.float32, 0.0),
            ("reference", torch.float64, 0.0),
        ],
        ids=str,
    )
    def test_later_tokens_do_not_reach_earlier_rows(self, options, backend, dtype, limit):
        inputs = qkv(300, heads=2, dtype=dtype)
        before = cb.conv_basis_attention_stats(*inputs, backend=backend, **options)
        for i in (1, 41, 200, 299):
            changed = [x.clone() for x in inputs]
            for x in changed:
                x[:, :, i:] = 2 * torch.randn_like(x[:, :, i:])
            after = cb.conv_basis_attention_stats(*changed, backend=backend, **options)
            old, new = before.output[:, :, :i], after.output[:, :, :i]
            assert_close(old, new, whole=limit, row=limit)
            assert (before.lse - after.lse)[:, :, :i].abs().max() <= limit
            assert (before.output - after.output)[:, :, i:].abs().max() > 1e-3

    def test_a_huge_future_value_stays_out(self):
        query, key, value = qkv(4096, dtype=torch.float32)
        before = cb.conv_basis_attention(query, key, value, segment_length=512, backend="fft")
        value = value.clone()
        value[:, :, -1] = 1e4
        after = cb.conv_basis_attention(query, key, value, segment_length=512, backend="fft")
        assert_close(before[:, :, :-1], after[:, :, :-1], whole=1e-5, row=1e-4)

    def test_linear_scan_with_window_one_and_delta_is_causal(self):
        inputs = qkv(260)
        options = {"num_bases": 5, "delta": 4.0, "backend": "reference"}
        before = cb.conv_basis_attention_stats(*inputs, **options)
        assert before.basis.k == 5
        for i in (50, 200):
            changed = [x.clone() for x in inputs]
            for x in changed:
                x[:, :, i:] = torch.randn_like(x[:, :, i:])
            after = cb.conv_basis_attention_stats(*changed, **options)
            assert torch.equal(before.output[:, :, :i], after.output[:, :, :i])

    @pytest.mark.parametrize(
        "options", [{"delta": 16.0, "window": 4}, {"delta": 3.0, "search": "binary"}, {}], ids=str
    )
    def test_other_recoveries_look_ahead_as_documented(self, options):
        query, key, value = qkv(120)
        before = cb.conv_basis_attention(query, key, value, num_bases=8, backend="reference", **options)
        moved = 0.0
        for seed in range(30):
            i = 20 + 3 * seed
            changed = query.clone()
            changed[:, :, i:] = 5 * torch.randn(120 - i, 16, generator=gen(seed), dtype=torch.float64)
            after = cb.conv_basis_attention(
                changed, key, value, num_bases=8, backend="reference", **options
            )
            moved = max(moved, float((before - after)[:, :, :i].abs().max()))
        assert moved > 1e-6

    def test_nan_in_the_future_is_refused_rather_than_spread(self):
        query, key, value = qkv(200)
        value[0, 0, -1, 0] = float("nan")
        with pytest.raises(cb.InputError, match=r"value holds 1 NaN or Inf.*\[0, 0, 199, 0\]"):
            cb.conv_basis_attention(query, key, value, segment_length=10)


class TestPadding:
    def masks(self, n):
        tokens = torch.arange(n)
        return {
            "left": torch.stack([tokens >= 60, tokens >= 0]),
            "right": torch.stack([tokens < n - 75, tokens < n]),
            "both": torch.stack([(tokens >= 11) & (tokens < 140), tokens == 7]),
            "holes": torch.rand(2, n, generator=gen(3)) < 0.7,
            "empty": torch.stack([tokens < 0, tokens >= 0]),
        }

    @pytest.mark.parametrize("side", ["left", "right", "both", "holes", "empty"])
    @pytest.mark.parametrize("backend", ["fft", "partitioned", "direct", "reference"])
    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    def test_equals_the_masked_oracle(self, dtype, backend, side):
        n = 230
        real = self.masks(n)[side]
        query, key, value = qkv(n, batch=2, heads=4, kv_heads=2, dtype=dtype)
        clean = query.masked_fill(~real[:, None, :, None], 0.0)
        expected, lse = reference.conv_basis_attention(
            clean, key, value, torch.tensor([0, 40, 41, 100, 200]), real=real
        )
        # Rows after the last real token are padding themselves.
        past = (torch.arange(n) > torch.where(real, torch.arange(n), -1).amax(-1)[:, None])[:, None]
        expected, lse = expected.masked_fill(past[..., None], 0.0), lse.masked_fill(past, -torch.inf)
        options = {"starts": [0, 40, 41, 100, 200], "enable_gqa": True, "backend": backend}
        spoiled = [x.clone() for x in (query, key, value)]
        for x in spoiled:  # what stands at padding is never used
            x.masked_fill_(~real[:, None, :, None], float("nan"))
        for inputs in ((query, key, value), spoiled):
            stats = cb.conv_basis_attention_stats(*inputs, key_padding_mask=real, **options)
            assert_close(expected, stats.output, whole=LIMITS[dtype][0], row=LIMITS[dtype][1])
            seen = lse.isfinite()
            assert torch.equal(stats.lse.isfinite(), seen)
            assert (stats.lse.double() - lse)[seen].abs().max() < 1e-4
            assert (stats.output[~seen] == 0).all()

    @pytest.mark.parametrize("backend", ["fft", "partitioned", "direct", "reference"])
    def test_left_padding_equals_the_unpadded_run_with_shifted_starts(self, backend):
        n, pad = 200, 33
        query, key, value = qkv(n)
        padded = [torch.nn.functional.pad(x, (0, 0, pad, 0), value=9.0) for x in (query, key, value)]
        real = (torch.arange(n + pad) >= pad)[None]
        for starts in ([0, 50, 120], [0, 1]):
            plain = cb.conv_basis_attention_stats(query, key, value, starts=starts, backend=backend)
            moved = cb.conv_basis_attention_stats(
                *padded,
                starts=[0, *(s + pad for s in starts[1:])],
                key_padding_mask=real,
                backend=backend,
            )
            assert_close(plain.output, moved.output[:, :, pad:], whole=1e-12, row=1e-11)
            assert (plain.lse - moved.lse[:, :, pad:]).abs().max() < 1e-12
            assert (moved.output[:, :, :pad] == 0).all()
            assert (moved.lse[:, :, :pad] == -torch.inf).all()
            assert torch.equal(moved.basis.starts, plain.basis.starts + pad)

    @pytest.mark.parametrize("backend", ["fft", "partitioned", "direct", "reference"])
    def test_right_padding_equals_the_unpadded_run(self, backend):
        n, pad = 200, 57
        query, key, value = qkv(n)
        padded = [torch.nn.functional.pad(x, (0, 0, 0, pad), value=9.0) for x in (query, key, value)]
        real = (torch.arange(n + pad) < n)[None]
        plain = cb.conv_basis_attention_stats(query, key, value, starts=[0, 90], backend=backend)
        longer = cb.conv_basis_attention_stats(
            *padded, starts=[0, 90, 230], key_padding_mask=real, backend=backend
        )
        assert_close(plain.output, longer.output[:, :, :n], whole=1e-12, row=1e-11)
        assert (plain.lse - longer.lse[:, :, :n]).abs().max() < 1e-12

    @pytest.mark.parametrize(
        "options", [{}, {"delta": 3.0}, {"delta": 3.0, "search": "binary"}], ids=str
    )
    @pytest.mark.parametrize("window", [1, 4])
    def test_recovered_segments_ignore_padding(self, options, window):
        n, pad = 160, 40
        query, key, value = qkv(n, heads=3)
        plain = cb.conv_basis_attention_stats(query, key, value, num_bases=6, window=window, **options)
        for before, after in ((pad, 0), (0, pad), (pad, 13)):
            padded = [
                torch.nn.functional.pad(x, (0, 0, before, after), value=50.0)
                for x in (query, key, value)
            ]
            tokens = torch.arange(before + n + after)
            real = ((tokens >= before) & (tokens < before + n))[None]
            stats = cb.conv_basis_attention_stats(
                *padded, num_bases=6, window=window, key_padding_mask=real, **options
            )
            expected = torch.where(plain.basis.starts < n, plain.basis.starts + before, len(tokens))
            assert torch.equal(stats.basis.starts, expected)
            assert_close(plain.output, stats.output[:, :, before : before + n], whole=1e-12, row=1e-10)

    @pytest.mark.parametrize("search", ["linear", "binary"])
    def test_recovery_beside_an_empty_member(self, search):
        query, key, value = qkv(150, batch=2)
        real = torch.stack([torch.zeros(150, dtype=torch.bool), torch.ones(150, dtype=torch.bool)])
        options = {"num_bases": 5, "delta": 3.0, "search": search}
        stats = cb.conv_basis_attention_stats(query, key, value, key_padding_mask=real, **options)
        assert (stats.output[0] == 0).all()
        assert (stats.lse[0] == -torch.inf).all()
        assert stats.basis.ranks.tolist()[0] == [0]
        alone = cb.conv_basis_attention(query[1:], key[1:], value[1:], **options)
        assert_close(alone, stats.output[1:], whole=1e-12, row=1e-10)

    def test_a_mask_without_padding_changes_nothing(self):
        inputs = qkv(150)
        real = torch.ones(1, 150, dtype=torch.bool)
        one = cb.conv_basis_attention(*inputs, segment_length=40)
        assert torch.equal(
            one, cb.conv_basis_attention(*inputs, segment_length=40, key_padding_mask=real)
        )


class TestLaws:
    def test_batch_invariance(self):
        inputs = qkv(220, batch=3, heads=2)
        together = cb.conv_basis_attention(*inputs, num_bases=5, backend="fft")
        for b in range(3):
            alone = cb.conv_basis_attention(*(x[b : b + 1] for x in inputs), num_bases=5, backend="fft")
            assert_close(together[b : b + 1], alone, whole=1e-13, row=1e-12)

    def test_linear_in_value(self):
        query, key, value = qkv(210)
        other = torch.randn_like(value)
        f = lambda v: cb.conv_basis_attention(query, key, v, segment_length=30, backend="fft")  # noqa: E731
        assert_close(2 * f(value) - f(other), f(2 * value - other), whole=1e-12, row=1e-11)

    def test_constant_value_is_kept(self):
        query, key, value = qkv(210)
        result = cb.conv_basis_attention(query, key, torch.ones_like(value), segment_length=30)
        assert (result - 1).abs().max() < 1e-12

    @pytest.mark.parametrize("backend", ["fft", "partitioned", "direct", "reference"])
    def test_gradients(self, backend):
        inputs = [x.requires_grad_() for x in qkv(14, heads=2, kv_heads=1, d=3, d_v=2)]

        def attend(q, k, v):
            stats = cb.conv_basis_attention_stats(
                q, k, v, starts=[0, 4, 9], enable_gqa=True, backend=backend
            )
            return stats.output, stats.lse

        assert torch.autograd.gradcheck(attend, inputs)

    def test_gradients_with_padding_and_recomputed_rows(self):
        query, key, value = qkv(150, d=2, d_v=2)
        query = query.clone()
        query[..., :4, :] = 0.0
        query[..., 4:, :] = 25.0
        key = torch.ones_like(key)
        inputs = [x.requires_grad_() for x in (query, key, value)]
        real = (torch.arange(150) >= 2)[None]
        grads = []
        for backend in ("fft", "reference"):
            stats = cb.conv_basis_attention_stats(
                *inputs, starts=[0, 70], key_padding_mask=real, backend=backend
            )
            grads.append(torch.autograd.grad(stats.output.square().sum(), inputs))
            if backend == "fft":
                assert stats.dispatch.rows_recomputed > 0
        for one, other in zip(*grads, strict=True):
            assert (one - other).abs().max() <= 1e-6 * other.abs().max()

    @pytest.mark.parametrize("backend", ["partitioned", "direct", "fft"])
    def test_the_hundredth_call_gives_the_bits_of_the_first(self, backend):
        inputs = qkv(700, heads=2, dtype=torch.float32)
        attend = lambda: cb.conv_basis_attention(*inputs, segment_length=64, backend=backend)  # noqa: E731
        first = attend()
        for i in range(100 if backend != "fft" else 10):
            # Others leave the memory that is used again in every state.
            other = qkv(100 + 37 * (i % 23), d=4 + i % 5, dtype=torch.float32, seed=i, size=10.0)
            cb.conv_basis_attention(*other, segment_length=1 + i % 40, backend=backend)
            assert torch.equal(attend(), first)

    @pytest.mark.parametrize("backend", ["partitioned", "direct"])
    def test_two_threads_at_once_give_the_bits_of_one(self, backend):
        cases = [qkv(600 + 100 * i, dtype=torch.float32, seed=i) for i in range(2)]
        attend = lambda case: cb.conv_basis_attention(  # noqa: E731
            *case, segment_length=50, backend=backend
        )
        expected = [attend(case) for case in cases]
        wrong = []

        def repeat(case, right):
            wrong.extend(i for i in range(30) if not torch.equal(attend(case), right))

        threads = [
            threading.Thread(target=repeat, args=pair) for pair in zip(cases, expected, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_repeated_and_concurrent_calls_give_the_same_bits(self):
        inputs = qkv(700, heads=2, dtype=torch.float32)
        other = qkv(555, dtype=torch.float32, seed=5)
        attend = lambda: cb.conv_basis_attention(*inputs, num_bases=6)  # noqa: E731
        first = attend()
        results = []
        threads = [threading.Thread(target=lambda: results.append(attend())) for _ in range(4)]
        for thread in threads:
            thread.start()
        cb.conv_basis_attention(*other, segment_length=100)
        for thread in threads:
            thread.join()
        results.append(attend())
        assert len(results) == 5
        assert all(torch.equal(first, r) for r in results)

    def test_dispatch_is_kept_for_each_thread(self):
        cb.conv_basis_attention(*qkv(20), segment_length=4)
        mine = cb.last_dispatch()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(cb.last_dispatch()))
        thread.start()
        thread.join()
        assert seen == [None]
        assert cb.last_dispatch() is mine
        assert mine.backend == "direct"
        assert "n = 20" in mine.reason

    def test_stats_agree_with_the_plain_call(self):
        inputs = qkv(200, heads=2)
        stats = cb.conv_basis_attention_stats(*inputs, segment_length=50)
        assert torch.equal(stats.output, cb.conv_basis_attention(*inputs, segment_length=50))
        assert stats.error_estimate is None
        assert stats.basis.shape == (1, 2, 200, 200)
        expected = reference.conv_basis_logits(
            inputs[0][0, 1], inputs[1][0, 1], stats.basis.starts[0, 1]
        )
        assert (stats.basis.to_dense()[0, 1] - expected).abs().max() < 1e-12


class TestInputErrors:
    def base(self, **changes):
        query, key, value = qkv(40, batch=2, heads=4)
        arguments = {"query": query, "key": key, "value": value, "segment_length": 10}
        arguments.update(changes)
        return arguments

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"query": torch.zeros(4, 40, 16)}, "query has shape.*four dimensions"),
            ({"key": torch.zeros(40, 16)}, "key has shape.*four dimensions"),
            ({"query": [[1.0]]}, "query is a list"),
            ({"value": torch.zeros(2, 4, 40, 16, dtype=torch.int32)}, "value has dtype torch.int32"),
            ({"key": torch.zeros(2, 4, 40, 16)}, "key has dtype torch.float32 but query"),
            ({"key": torch.zeros(2, 4, 40, 16, dtype=torch.float64, device="meta")}, "key is on meta"),
            ({"key": torch.zeros(2, 4, 39, 16, dtype=torch.float64)}, "queries and keys of the same"),
            ({"key": torch.zeros(2, 4, 40, 15, dtype=torch.float64)}, "queries and keys of the same"),
            ({"key": torch.zeros(1, 4, 40, 16, dtype=torch.float64)}, "queries and keys of the same"),
            ({"value": torch.zeros(2, 2, 40, 16, dtype=torch.float64)}, "value has shape"),
            ({"value": torch.zeros(2, 4, 40, 0, dtype=torch.float64)}, "holds nothing"),
            ({"is_causal": False}, "lower triangular"),
            ({"is_causal": None}, "lower triangular"),
            ({"scale": float("inf")}, "scale=inf"),
            ({"scale": "big"}, "scale='big'"),
            ({"backend": "triton"}, "backend='triton'"),
            ({"max_bytes": 0}, "max_bytes=0"),
            ({"key_padding_mask": torch.ones(2, 39, dtype=torch.bool)}, r"shape \(2, 40\)"),
            ({"key_padding_mask": torch.ones(2, 40)}, "bool tensor"),
            ({"key_padding_mask": [True]}, "bool tensor"),
            ({"key_padding_mask": torch.ones(2, 40, dtype=torch.bool, device="meta")}, "is on meta"),
        ],
    )
    def test_message_says_what_is_wrong(self, changes, message):
        with pytest.raises(cb.InputError, match=message):
            cb.conv_basis_attention(**self.base(**changes))

    @pytest.mark.parametrize("name", ["query", "key", "value"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_nan_and_inf(self, name, bad):
        arguments = self.base()
        arguments[name] = arguments[name].clone()
        arguments[name][1, 2, 3, 4] = bad
        with pytest.raises(
            ValueError, match=rf"{name} holds 1 NaN or Inf, the first at \[1, 2, 3, 4\]"
        ):
            cb.conv_basis_attention(**arguments)

    def test_mismatched_heads(self):
        few = torch.zeros(2, 2, 40, 16, dtype=torch.float64)
        with pytest.raises(cb.InputError, match="key has 2 heads but query has 4; give enable_gqa"):
            cb.conv_basis_attention(**self.base(key=few, value=few))
        odd = torch.zeros(2, 3, 40, 16, dtype=torch.float64)
        with pytest.raises(cb.InputError, match="no multiple"):
            cb.conv_basis_attention(**self.base(key=odd, value=odd), enable_gqa=True)
