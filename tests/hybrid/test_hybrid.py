"""hybrid_attention against the dense oracle, and the laws that it keeps."""

import itertools
import threading

import oracle
import pytest
import torch
from comparison import assert_close
from oracle import qkv
from torch.utils._python_dispatch import TorchDispatchMode

import convbasis as cb
from convbasis.hybrid.group import first_keys
from convbasis.hybrid.segments import segment_keys
from convbasis.hybrid.window import Window

LIMITS = {torch.float64: (1e-11, 1e-9), torch.float32: (1e-5, 1e-4)}
LENGTHS = [1, 2, 5, 63, 64, 65, 127, 300, 513, 1000]
# Windows, columns and blocks small enough that all parts take part from 127 tokens on.
SMALL = {"window": 20, "columns": 7, "samples": 12}
SETTINGS = [
    {"window": 20, "sinks": 0, "columns": 0},
    {"window": 20, "columns": 0},
    {**SMALL},
    {**SMALL, "sinks": 0, "blocks": 1},
    {**SMALL, "blocks": 3, "seed": 5},
    {"window": 1, "sinks": 0, "columns": 0, "far_field": "segments"},
    {**SMALL, "far_field": "segments", "num_segments": 3},
    {**SMALL, "far_field": "segments", "blocks": 2},
    {**SMALL, "far_field": "segments", "num_segments": 2, "key_weights": True, "blocks": 1},
    {**SMALL, "far_field": "segments", "key_weights": True},
    {**SMALL, "far_field": "conv"},
    {**SMALL, "correction": True, "seed": 3},
    {**SMALL, "blocks": 1, "correction": True},
    {**SMALL, "far_field": "conv", "correction": True},
]
# One of each way to the far field.
FAR = [
    {**SMALL},
    {**SMALL, "blocks": 2},
    {**SMALL, "far_field": "segments", "num_segments": 3, "blocks": 1},
    {**SMALL, "far_field": "segments", "num_segments": 128, "key_weights": True},
    {**SMALL, "far_field": "conv"},
    {**SMALL, "blocks": 1, "correction": True},
]


def check(query, key, value, *, whole=None, row=None, scale=None, **options):
    limits = LIMITS.get(query.dtype, (None, None))
    expected, lse = oracle.hybrid_attention(query, key, value, scale, **options)
    enable_gqa = query.shape[1] != key.shape[1]
    stats = cb.hybrid_attention_stats(query, key, value, scale=scale, enable_gqa=enable_gqa, **options)
    assert stats.output.dtype == query.dtype
    assert_close(expected, stats.output, whole=whole or limits[0], row=row or limits[1])
    assert (stats.lse.double() - lse).abs().max() < (1e-9 if query.dtype == torch.float64 else 1e-3)
    other = cb.hybrid_attention(query, key, value, scale=scale, enable_gqa=enable_gqa, **options)
    assert torch.equal(other, stats.output)
    return stats


def sdpa(query, key, value, mask=None):
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


class TestOracle:
    @pytest.mark.parametrize("options", SETTINGS, ids=str)
    @pytest.mark.parametrize("n", LENGTHS)
    def test_equals_the_dense_result(self, n, options):
        check(*qkv(n, seed=n), **options)

    @pytest.mark.parametrize("options", FAR, ids=str)
    def test_batch_of_grouped_heads_with_wide_values(self, options):
        check(*qkv(300, batch=2, heads=6, kv_heads=2, d=8, d_v=5), **options)

    @pytest.mark.parametrize("options", SETTINGS, ids=str)
    def test_single_precision(self, options):
        check(*qkv(513, heads=2, kv_heads=1, dtype=torch.float32), **options)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("options", FAR, ids=str)
    def test_half_precision_rounds_the_output_alone(self, options, dtype):
        rounding = torch.finfo(dtype).eps
        stats = check(*qkv(300, dtype=dtype), whole=rounding, row=rounding, **options)
        assert stats.lse.dtype == torch.float32

    @pytest.mark.parametrize("options", FAR, ids=str)
    def test_scale(self, options):
        inputs = qkv(300)
        one = check(*inputs, scale=0.05, **options)
        other = check(*inputs, scale=0.6, **options)
        assert (one.output - other.output).abs().max() > 1e-2

    @pytest.mark.parametrize("options", FAR, ids=str)
    def test_strided_inputs(self, options):
        inputs = qkv(300, heads=2)
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        wide = [torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in inputs]
        same = cb.hybrid_attention(*inputs, **options)
        for others in (strided, wide):
            assert not others[0].is_contiguous()
            assert_close(same, cb.hybrid_attention(*others, **options), whole=1e-12, row=1e-11)

    def test_blocks_of_which_the_first_sixteen_choose_none(self):
        check(*qkv(1300, d=4), window=1000, columns=3, blocks=1)

    def test_defaults_of_the_oracle_are_those_of_the_library(self):
        check(*qkv(600, d=4))


class TestExactCases:
    @pytest.mark.parametrize("n", [1, 2, 5, 64, 127, 300, 513])
    @pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 3), (17, 1), (64, 4), (130, 9)])
    def test_window_and_sinks_are_exact_tokens(self, n, window, sinks):
        inputs = qkv(n, heads=2)
        lag = torch.arange(n)[:, None] - torch.arange(n)
        mask = (lag >= 0) & ((lag < window) | (torch.arange(n) < sinks))
        result = cb.hybrid_attention(*inputs, window=window, sinks=sinks, columns=0)
        assert_close(sdpa(*inputs, mask), result, whole=1e-12, row=1e-11)

    @pytest.mark.parametrize("window", [300, 301, 10_000])
    @pytest.mark.parametrize("far", FAR, ids=str)
    def test_a_window_over_everything_is_exact(self, window, far):
        inputs = qkv(300, heads=2)
        stats = cb.hybrid_attention_stats(*inputs, **{**far, "window": window})
        assert_close(sdpa(*inputs), stats.output, whole=1e-12, row=1e-11)
        assert not stats.error_estimate.any()
        assert not stats.error_mean.any()
        assert stats.dispatch.parts == ("window",)

    @pytest.mark.parametrize("far_field", ["none", "segments"])
    @pytest.mark.parametrize("columns", [0, 9])
    @pytest.mark.parametrize("blocks", [8, 10_000_000])
    def test_all_blocks_are_exact(self, far_field, columns, blocks):
        inputs = qkv(500, heads=4, kv_heads=2, d_v=7)
        stats = cb.hybrid_attention_stats(
            *inputs, window=3, columns=columns, blocks=blocks, far_field=far_field, enable_gqa=True
        )
        assert_close(sdpa(*inputs), stats.output, whole=1e-12, row=1e-11)
        assert float(stats.error_estimate.max()) < 1e-12

    def test_all_columns_are_exact(self):
        inputs = qkv(300, heads=2)
        for far_field in cb.hybrid.FAR_FIELDS:
            result = cb.hybrid_attention(*inputs, window=5, columns=300, far_field=far_field)
            # The latest keys that no fitting row could see stay unseen, or far.
            exact = sdpa(*inputs)
            assert_close(exact[..., :250, :], result[..., :250, :], whole=1e-11, row=1e-10)


PLACES = {
    "left": lambda n, m: torch.arange(n) >= m,
    "right": lambda n, m: torch.arange(n) < n - m,
    "both": lambda n, m: (torch.arange(n) >= m // 2) & (torch.arange(n) < n - (m - m // 2)),
    "within": lambda n, m: torch.arange(n).remainder(n // m + 1) > 0,
}


class TestPadding:
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("far", FAR, ids=str)
    def test_padding_changes_nothing(self, place, far):
        """Each sequence gives what it gives alone, whatever padding holds and beside whom it is."""
        n = 300
        inputs = qkv(n, batch=3, heads=4, kv_heads=2, dtype=torch.float32)
        mask = torch.ones(3, n, dtype=torch.bool)
        mask[1] = PLACES[place](n, 40)
        mask[2] = PLACES[place](n, 131)
        filled = [x.masked_fill(~mask[:, None, :, None], float("nan")) for x in inputs]
        stats = cb.hybrid_attention_stats(*filled, key_padding_mask=mask, enable_gqa=True, **far)
        for b in range(3):
            own = [x[b : b + 1, :, mask[b]] for x in inputs]
            alone = cb.hybrid_attention_stats(*own, enable_gqa=True, **far)
            kept = stats.output[b : b + 1, :, mask[b]]
            assert_close(alone.output, kept, whole=1e-6, row=1e-6)
            assert (alone.lse - stats.lse[b : b + 1, :, mask[b]]).abs().max() < 1e-5
            assert torch.allclose(alone.error_estimate[0], stats.error_estimate[b], rtol=1e-4)
            assert not stats.output[b, :, ~mask[b]].any()
            assert (stats.lse[b, :, ~mask[b]] == -torch.inf).all()

    def test_a_sequence_of_padding_alone(self):
        inputs = qkv(100, batch=2)
        mask = torch.tensor([True, False])[:, None].expand(2, 100)
        stats = cb.hybrid_attention_stats(*inputs, window=10, key_padding_mask=mask)
        assert not stats.output[1].any()
        assert (stats.lse[1] == -torch.inf).all()
        assert stats.error_estimate[1] == 0
        nothing = cb.hybrid_attention_stats(*inputs, key_padding_mask=torch.zeros_like(mask))
        assert not nothing.output.any()


COUNTING = [
    {"far_field": "segments"},
    {"far_field": "segments", "num_segments": 3},
    {"far_field": "segments", "key_weights": True},
    {"far_field": "segments", "num_segments": 3, "key_weights": True},
    {"far_field": "segments", "num_segments": 3, "blocks": 2},
    {"far_field": "segments", "num_segments": 3, "key_weights": True, "blocks": 1, "columns": 0},
    {"far_field": "segments", "columns": 0, "sinks": 0},
    {"far_field": "conv"},
    {"far_field": "conv", "columns": 0, "sinks": 0},
]


class TestLaws:
    @pytest.mark.parametrize("n", [127, 513, 1000])
    @pytest.mark.parametrize("options", COUNTING, ids=str)
    def test_every_key_counts_once(self, n, options):
        """With logits of 0 the normaliser counts keys: near and far keys partition each row."""
        query, key, value = qkv(n, heads=2)
        stats = cb.hybrid_attention_stats(
            torch.zeros_like(query), key, torch.ones_like(value), **{**SMALL, **options}
        )
        assert (stats.output - 1.0).abs().max() < 1e-12
        assert (stats.lse - torch.arange(1.0, n + 1).double().log()).abs().max() < 1e-11
        assert float(stats.error_estimate.max()) < 1e-12

    def test_without_a_far_field_seen_keys_count(self):
        query, key, value = qkv(300)
        options = {"window": 20, "sinks": 5, "columns": 0}
        stats = cb.hybrid_attention_stats(
            torch.zeros_like(query), key, torch.ones_like(value), **options
        )
        row = torch.arange(300)
        count = (row + 1).clamp(max=20) + (row - 19).clamp(min=0, max=5)
        assert (stats.lse - count.double().log()).abs().max() < 1e-12

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("peak", [None, 0, -1])
    @pytest.mark.parametrize("far", FAR, ids=str)
    def test_a_constant_moves_the_normaliser_alone(self, far, peak, dtype):
        """Also where the largest logit is in the first block of keys, or in the last."""
        query, key, value = qkv(500, heads=2, d=8)
        query[..., -1] = 1.0
        key[..., -1] = 0.0
        if peak is not None:
            key[:, :, peak, -1] = 30.0
        moved = key.clone()
        moved[..., -1] += 50.0
        inputs = [x.to(dtype) for x in (query, key, value)]
        one = cb.hybrid_attention_stats(*inputs, scale=1.0, **far)
        other = cb.hybrid_attention_stats(inputs[0], moved.to(dtype), inputs[2], scale=1.0, **far)
        # Logits near 50 are rounded to 4e-6 in float32.
        whole = 1e-10 if dtype == torch.float64 else 1e-3
        assert_close(one.output, other.output, whole=whole, row=20 * whole)
        assert (other.lse - one.lse - 50.0).abs().max() < whole

    @pytest.mark.parametrize("far", FAR, ids=str)
    def test_logits_that_overflow_exp(self, far):
        query, key, value = qkv(300, dtype=torch.float32)
        stats = cb.hybrid_attention_stats(query, key, value, scale=100.0, **far)
        assert bool(stats.output.isfinite().all())
        assert bool(stats.lse.isfinite().all())
        assert bool(stats.error_estimate.isfinite().all())

    @pytest.mark.parametrize("far", FAR, ids=str)
    def test_values_are_averaged(self, far):
        query, key, value = qkv(300)
        output = cb.hybrid_attention(query, key, value, **far)
        assert (output.amax(2) <= value.amax(2) + 1e-12).all()
        twice = cb.hybrid_attention(query, key, 2.0 * value + 3.0, **far)
        assert_close(2.0 * output + 3.0, twice, whole=1e-11, row=1e-10)

    @pytest.mark.parametrize(
        "options",
        [{}, {"far_field": "segments"}, {"far_field": "segments", "num_segments": 2}],
        ids=str,
    )
    def test_without_statistics_rows_see_what_came_before_alone(self, options):
        inputs = qkv(400, dtype=torch.float32)
        options = {**options, "window": 20, "columns": 0}
        one = cb.hybrid_attention(*inputs, **options)
        changed = [x.clone() for x in inputs]
        for tensor in changed:
            tensor[:, :, 333:] += 1.0
        other = cb.hybrid_attention(*changed, **options)
        assert torch.equal(one[:, :, :333], other[:, :, :333])
        assert not torch.equal(one[:, :, 333], other[:, :, 333])


EVERYTHING = {**SMALL, "blocks": 1, "far_field": "segments", "num_segments": 3, "key_weights": True}


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("window", 90), ("sinks", 0), ("columns", 8), ("blocks", 2), ("far_field", "none"),
            ("num_segments", 2), ("key_weights", False), ("samples", 30), ("scale", 0.1), ("seed", 1),
            ("correction", True),
        ],
    )  # fmt: skip
    def test_each_changes_the_result(self, name, other):
        inputs = qkv(500)
        one = cb.hybrid_attention(*inputs, **EVERYTHING)
        two = cb.hybrid_attention(*inputs, **{**EVERYTHING, name: other})
        assert (one - two).abs().max() > 1e-5

    def test_far_fields_differ(self):
        inputs = qkv(500)
        found = [cb.hybrid_attention(*inputs, **SMALL, far_field=far) for far in cb.hybrid.FAR_FIELDS]
        for one, two in itertools.combinations(found, 2):
            assert (one - two).abs().max() > 1e-3

    @pytest.mark.parametrize("far", FAR, ids=str)
    def test_the_same_bits_again_and_from_threads(self, far):
        inputs = qkv(500, heads=2, dtype=torch.float32)
        expected = cb.hybrid_attention_stats(*inputs, **far)
        found = []
        state = torch.get_rng_state()
        threads = [
            threading.Thread(target=lambda: found.append(cb.hybrid_attention_stats(*inputs, **far)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found.append(cb.hybrid_attention_stats(*inputs, **far))
        assert len(found) == 3
        for again in found:
            assert all(torch.equal(again[i], expected[i]) for i in (0, 1, 2, 4))
        assert torch.equal(torch.get_rng_state(), state), "the global generator was used"

    def test_dispatch_says_what_ran(self):
        inputs = qkv(500)
        stats = cb.hybrid_attention_stats(*inputs, **EVERYTHING)
        assert stats.dispatch.parts == ("window", "columns", "blocks", "segments")
        assert 0 < stats.dispatch.sampled_rows <= 3 * SMALL["samples"]
        stats = cb.hybrid_attention_stats(*inputs, **SMALL, far_field="conv")
        assert stats.dispatch.parts == ("window", "columns", "conv")
        more = cb.hybrid_attention_stats(*inputs, **SMALL, far_field="conv", correction=True)
        assert more.dispatch.parts == ("window", "columns", "conv", "correction")
        # Four rows in each of the two whole blocks of 128 after the one where the first window ends.
        assert more.dispatch.sampled_rows == stats.dispatch.sampled_rows + 8
        plain = cb.hybrid_attention_stats(*inputs, window=30, sinks=0, columns=0)
        assert plain.dispatch.parts == ("window",)
        assert plain.dispatch.keys_per_query == 30

    def test_autocast_changes_nothing(self):
        inputs = qkv(300, dtype=torch.float32)
        for far in FAR:
            expected = cb.hybrid_attention(*inputs, **far)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(cb.hybrid_attention(*inputs, **far), expected)


class Largest(TorchDispatchMode):
    """Records the entries of the largest tensor that any operation stores."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                held = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
                self.entries = max(self.entries, held)
        return result


@pytest.mark.parametrize("d_v", [8, 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 2},
        {"blocks": 2, "correction": True},
        {"far_field": "segments", "num_segments": 32},
        {"far_field": "segments", "blocks": 2, "num_segments": 32, "key_weights": True},
        {"far_field": "conv"},
        {"far_field": "segments", "blocks": 2, "num_segments": 32, "strict": True},
    ],
    ids=str,
)
def test_nothing_is_stored_for_each_pair_of_tokens(options, d_v, monkeypatch):
    n = 4096
    monkeypatch.setattr("convbasis.hybrid.piece._LOGITS", 1 << 18)
    inputs = [x.requires_grad_() for x in qkv(n, d=8, d_v=d_v, dtype=torch.float32)]
    largest = Largest()
    with largest:
        stats = cb.hybrid_attention_stats(*inputs, window=64, columns=16, samples=32, **options)
        stats.output.sum().backward()
    assert 8 * n < largest.entries < 0.15 * n * n


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 2, "correction": True},
        {"far_field": "segments", "num_segments": 32, "key_weights": True},
        {"far_field": "segments", "blocks": 2, "num_segments": 32},
        {"far_field": "conv"},
        {"far_field": "segments", "blocks": 2, "num_segments": 32, "strict": True},
    ],
    ids=str,
)
def test_what_is_stored_grows_with_the_tokens(options, monkeypatch):
    monkeypatch.setattr("convbasis.hybrid.piece._LOGITS", 1 << 18)
    found = []
    for n in (4096, 16384):
        inputs = qkv(n, d=8, dtype=torch.float32)
        with torch.no_grad(), Largest() as largest:
            cb.hybrid_attention_stats(*inputs, window=64, columns=16, samples=32, **options)
        found.append(largest.entries)
    assert found[1] <= 4.4 * found[0]


@pytest.mark.parametrize("blocks", [0, 2])
def test_segments_keep_no_number_for_each_pair_of_blocks(blocks):
    n, generator = 1 << 16, torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, n, 4, generator=generator) for _ in range(2))
    before = first_keys(Window(64, 64), 0, n, key.device)[None] // 64
    chosen = None
    if blocks:
        chosen = torch.stack([before.div(blocks + 1 - i).long() for i in range(blocks)], dim=-1)
        chosen = chosen.where(chosen < before[..., None], n // 64)
    seen = torch.zeros(1, n, dtype=torch.bool)
    with torch.no_grad(), Largest() as largest:
        segment_keys(key, value, seen, chosen, before, n // 64 // 32, 0.5, None)
    assert 4 * n <= largest.entries < 8 * n


class TestInputErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"window": 0}, r"window=0 is not a positive integer; give a number of tokens"),
            ({"window": 2.5}, r"window=2.5 is not a positive integer"),
            ({"window": True}, r"window=True is not a positive integer"),
            ({"num_segments": 0}, r"num_segments=0 is not a positive integer; give a number of seg"),
            ({"samples": 0}, r"samples=0 is not a positive integer; give a number of rows"),
            ({"blocks": -1}, r"blocks=-1 is not an integer >= 0"),
            ({"columns": -2}, r"columns=-2 is not an integer >= 0"),
            ({"sinks": "4"}, r"sinks='4' is not an integer >= 0"),
            ({"far_field": "far"}, r"far_field='far' is not known; use one of 'none', 'segments', 'co"),
            ({"far_field": None}, r"far_field=None is not known"),
            ({"far_field": ["none"]}, r"far_field=a list is not known"),
            ({"far_field": "conv", "blocks": 1}, r"blocks=1 with far_field='conv'.*use blocks=0"),
            ({"is_causal": False}, r"is_causal=False: hybrid attention is causal"),
            ({"scale": float("nan")}, r"scale=nan is not a finite number"),
            ({"scale": "x"}, r"scale='x' is not a finite number"),
            ({"key_weights": "yes"}, r"key_weights='yes' is neither True nor False"),
            ({"correction": 1}, r"correction=1 is neither True nor False"),
            ({"seed": 1.5}, r"seed=1.5 is not an integer"),
            ({"seed": -1}, r"seed=-1 is not an integer >= 0"),
            ({"seed": 2**62}, r"seed=\d+ is too large; give one below 2\^62"),
            ({"key_padding_mask": torch.ones(1, 30)}, r"key_padding_mask is a torch.float32 tensor"),
            ({"key_padding_mask": torch.ones(2, 30, dtype=torch.bool)}, r"\(1, 30\), True for real"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        for call in (cb.hybrid_attention, cb.hybrid_attention_stats):
            with pytest.raises(cb.InputError, match=message):
                call(*qkv(30), **options)

    def test_tensors(self):
        query, key, value = qkv(30, heads=4, kv_heads=2)
        cases = [
            ((query, key, value), {}, "key has 2 heads but query has 4; give enable_gqa=True"),
            (
                (query[:, :3], key, value),
                {"enable_gqa": True},
                "3 heads, which is no multiple of the 2",
            ),
            ((query, key.float(), value), {"enable_gqa": True}, "key has dtype torch.float32"),
            ((query[0], key, value), {}, "four dimensions"),
            ((query, key[:, :, :20], value), {"enable_gqa": True}, "queries and keys of the same"),
            ((query, key, value[:, :1]), {"enable_gqa": True}, "value has shape"),
            ((query.long(), key, value), {}, "query has dtype torch.int64"),
            ((None, key, value), {}, "query is None; a torch.Tensor is wanted"),
            ((query[:, :, :0], key[:, :, :0], value[:, :, :0]), {}, "it holds nothing"),
        ]
        for tensors, options, message in cases:
            with pytest.raises(cb.InputError, match=message):
                cb.hybrid_attention(*tensors, **options)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("name", ["query", "key", "value"])
    def test_nan_and_inf_are_named_with_their_place(self, name, bad):
        inputs = dict(zip(("query", "key", "value"), qkv(30), strict=True))
        inputs[name][0, 0, 7, 3] = bad
        with pytest.raises(cb.InputError, match=rf"{name} holds 1 NaN or Inf.*\[0, 0, 7, 3\]"):
            cb.hybrid_attention(**inputs)


def test_any_seed_works():
    inputs = qkv(200)
    for seed in (0, 2**31, 2**62 - 1):
        cb.hybrid_attention(*inputs, window=9, columns=3, blocks=1, seed=seed)
