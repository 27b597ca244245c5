"""Strictly causal hybrid attention against its dense definition, and a prompt in chunks."""

import copy
import itertools

import pytest
import reference
import torch
from comparison import assert_close
from oracle import gen, qkv

import convbasis as cb
from convbasis.hybrid.heads import attend_pieces, pieces_of_work
from convbasis.hybrid.running import STRETCH, rows_to_judge, stretch_rows
from convbasis.hybrid.sampling import own_rows
from convbasis.hybrid.settings import Settings
from convbasis.hybrid.window import BLOCK, Window

N = 1500
SMALL = {"window": 100, "columns": 9, "samples": 40}
PLAIN = {**SMALL}
BLOCKS = {**SMALL, "blocks": 2}
SEGMENTS = {**SMALL, "far_field": "segments", "num_segments": 6}
WEIGHED = {**SEGMENTS, "key_weights": True}
EVERYTHING = {**SMALL, "blocks": 1, "far_field": "segments", "num_segments": 5, "seed": 3}
ALSO_WEIGHED = {**EVERYTHING, "key_weights": True, "columns": 0}
# The first stretches have no key before the windows, and segments of another length.
LONG = {
    "window": 1300,
    "sinks": 0,
    "columns": 0,
    "far_field": "segments",
    "num_segments": 9,
    "samples": 40,
}
BARE = {"window": 1, "sinks": 0, "columns": 0, "blocks": 1}
ALL = [
    PLAIN,
    BLOCKS,
    SEGMENTS,
    WEIGHED,
    EVERYTHING,
    ALSO_WEIGHED,
    BARE,
    {**BARE, "far_field": "segments"},
    {**BARE, "far_field": "segments", "num_segments": 1, "key_weights": True},
]
# At and beside the borders of blocks and stretches, and elsewhere.
PLACES = [1, 63, 127, 128, 129, 300, 511, 512, 513, 575, 576, 577, 801, 1023, 1024, 1090]


def strictly(inputs, **options):
    return cb.hybrid_attention_stats(*inputs, enable_gqa=True, strict=True, **options)


def in_chunks(inputs, ends, **options):
    """Outputs and log-sum-exps of chunks, and the state after them."""
    query, key, value = inputs
    state, outputs, sums = cb.HybridState(enable_gqa=True, **options), [], []
    for end in ends:
        own = query[:, :, state.length : end], key[:, :, :end], value[:, :, :end]
        stats = state.attend_stats(*own)
        outputs.append(stats.output)
        sums.append(stats.lse)
    return torch.cat(outputs, 2), torch.cat(sums, 2), state


def one_heavy_key(n, place):
    """Queries that all look at one key."""
    query, key, value = qkv(n, d=8, dtype=torch.float32)
    query[..., 0] = 6.0
    key[..., 0] = 0.0
    key[:, :, place, 0] = 9.0
    return query, key, value


def ends_of(size, n=N):
    return [*range(size, n, size), n]


def dense(query, key, value, settings):
    """One head ``(n, d)``, each stretch by the dense reference on what came before its end."""
    n, scale = len(query), query.shape[-1] ** -0.5
    window = Window(settings.window, settings.shared)
    first = window.first(torch.arange(n)).clamp(min=0)
    if settings.shared > 1:  # the first stretch is exact
        first[:STRETCH] = 0
    logits = reference.exact_logits(query.detach(), key.detach(), scale)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    places = 2 * torch.randperm(BLOCK // 2, generator=gen(settings.seed))[:4]
    places = own_rows(places, 0, settings.seed)
    counted = Window(min(settings.window, BLOCK), BLOCK).first(torch.arange(n)).clamp(min=0)
    mass, sampled = torch.zeros(n, dtype=torch.float64), []
    outputs, sums = [], []
    for begin in range(0, n, STRETCH):
        end = min(n, begin + STRETCH)
        ranked = mass.clone()
        ranked[: settings.sinks] = 0.0
        heavy = [int(x) for x in ranked.argsort(descending=True)[: settings.columns] if ranked[x] > 0]
        columns = list(range(settings.sinks)) + heavy
        chosen = [[] for _ in range(-(-end // BLOCK))]
        for block in range(begin // BLOCK, len(chosen)):
            if settings.blocks and block:
                looked = weights[(block - 1) * BLOCK + places].sum(0)
                looked[[x for x in columns if x < n]] = 0.0
                before = int(first[block * BLOCK]) // BLOCK
                by_block = looked[: before * BLOCK].unflatten(0, (-1, BLOCK)).sum(1)
                chosen[block] = by_block.topk(min(settings.blocks, before)).indices.tolist()
        far = [None]
        if settings.far_field == "segments":
            far = [-(-(begin + STRETCH) // BLOCK // settings.num_segments)]
        known = [x[:end] for x in (query, key, value)]
        if settings.key_weights:
            own = [x for x in columns if x < end]
            rows = torch.tensor(sampled, dtype=torch.int64)
            q, k = (x.detach() for x in known[:2])
            far += reference.segment_fit(q, k, scale, counted, own, *far, rows, begin + STRETCH)
        output, lse = reference.hybrid_attention(*known, scale, first[:end], columns, chosen, *far)
        outputs.append(output[begin:])
        sums.append(lse[begin:])
        if end == begin + STRETCH:
            for row in stretch_rows(begin, settings, query.device).tolist():
                mass[: counted[row]] += weights[row, : counted[row]]
                sampled.append(row)
    return torch.cat(outputs), torch.cat(sums)


def dense_heads(query, key, value, **options):
    defaults = {"sinks": 4, "blocks": 0, "far_field": "none", "num_segments": 128, "seed": 0}
    settings = Settings(**{"samples": 64, "key_weights": False, **defaults, **options}, strict=True)
    group = query.shape[1] // key.shape[1]
    found = [
        dense(query[0, h], key[0, h // group], value[0, h // group], settings)
        for h in range(query.shape[1])
    ]
    return tuple(torch.stack(parts)[None] for parts in zip(*found, strict=True))


class TestOneCall:
    @pytest.mark.parametrize("options", ALL, ids=str)
    def test_equals_the_dense_definition(self, options):
        inputs = qkv(1100, heads=2, kv_heads=1, d=8, d_v=5)
        expected, lse = dense_heads(*inputs, **options)
        stats = strictly(inputs, **options)
        assert_close(expected, stats.output, whole=1e-11, row=1e-9)
        assert (stats.lse - lse).abs().max() < 1e-10
        other = cb.hybrid_attention(*inputs, enable_gqa=True, strict=True, **options)
        assert torch.equal(other, stats.output)

    @pytest.mark.parametrize("options", [BLOCKS, WEIGHED, ALSO_WEIGHED, LONG], ids=str)
    def test_equals_it_where_several_stretches_are_attended_to_together(self, options):
        inputs = qkv(2100, d=8, d_v=5)
        expected, lse = dense_heads(*inputs, **options)
        stats = strictly(inputs, **options)
        assert_close(expected, stats.output, whole=1e-11, row=1e-9)
        assert (stats.lse - lse).abs().max() < 1e-10

    def test_a_huge_query_changes_no_row_before_it(self):
        """Its logits overflow, also where sampled rows of later stretches are hidden."""
        query, key, value = qkv(2048, d=8, dtype=torch.float32)
        whole = strictly((query, key, value), **WEIGHED).output
        query[:, :, 1025:] = 3e38
        assert torch.equal(
            strictly((query, key, value), **WEIGHED).output[:, :, :1025], whole[:, :, :1025]
        )

    @pytest.mark.parametrize("options", [BLOCKS, {**BLOCKS, "blocks": 8}], ids=str)
    def test_sharp_rows_do_not_depend_on_later_tokens(self, options):
        """So sharp that most blocks have no weight at all."""
        query, key, value = qkv(1500, heads=2, kv_heads=1, d=8, dtype=torch.float32)
        whole = strictly((40.0 * query, key, value), **options).output
        for place in (700, 833, 1100):
            later = query.clone()
            later[:, :, place:] *= 0.001
            other = strictly((40.0 * later, key, value), **options).output
            assert torch.equal(other[:, :, :place], whole[:, :, :place])

    @pytest.mark.parametrize("options", [BLOCKS, EVERYTHING], ids=str)
    def test_gradients_equal_those_of_the_dense_definition(self, options):
        inputs = [x.requires_grad_() for x in qkv(700, heads=2, kv_heads=1, d=8)]
        expected = dense_heads(*inputs, **options)
        found = strictly(inputs, **options)[:2]
        up = [torch.randn(x.shape, generator=gen(1), dtype=x.dtype) for x in found]
        want = torch.autograd.grad(expected, inputs, up)
        for a, b in zip(want, torch.autograd.grad(found, inputs, up), strict=True):
            assert (a - b).abs().max() <= 1e-10 * a.abs().max()

    @pytest.mark.parametrize("options", ALL, ids=str)
    def test_rows_do_not_depend_on_later_tokens(self, options):
        inputs = qkv(1100, heads=2, kv_heads=1, d=8)
        whole = strictly(inputs, **options)
        for place in PLACES:
            changed = [x.clone() for x in inputs]
            for tensor in changed:
                tensor[:, :, place:] = 3.0 * tensor[:, :, place:].flip(2) + 1.0
            other = strictly(changed, **options)
            assert torch.equal(whole.output[:, :, :place], other.output[:, :, :place]), place
            assert torch.equal(whole.lse[:, :, :place], other.lse[:, :, :place]), place
            assert not torch.equal(whole.output[:, :, place], other.output[:, :, place])

    @pytest.mark.parametrize("options", [BLOCKS, EVERYTHING, WEIGHED], ids=str)
    def test_they_do_not_where_several_stretches_are_attended_to_together(self, options):
        inputs = [x.requires_grad_() for x in qkv(2100, heads=2, kv_heads=1, d=8)]
        whole = strictly(inputs, **options)
        for place in (600, 1024, 1111, 1700):
            changed = [x.detach().clone() for x in inputs]
            for tensor in changed:
                tensor[:, :, place:] = 3.0 * tensor[:, :, place:].flip(2) + 1.0
            other = strictly(changed, **options)
            assert torch.equal(whole.output[:, :, :place], other.output[:, :, :place]), place
            early = whole.output[:, :, :place].square().sum() + whole.lse[:, :, :place].sum()
            for gradient in torch.autograd.grad(early, inputs, retain_graph=True):
                assert bool((gradient[:, :, place:] == 0).all())
                assert bool((gradient[:, :, :place] != 0).any())

    def test_gradients_where_several_stretches_are_attended_to_together(self, monkeypatch):
        """The same as one by one."""
        inputs = [x.requires_grad_() for x in qkv(2100, heads=2, kv_heads=1, d=8)]
        found = []
        for together in (8, 1):
            monkeypatch.setattr("convbasis.hybrid.strict._TOGETHER", together)
            output = strictly(inputs, **ALSO_WEIGHED).output
            up = torch.randn(output.shape, generator=gen(1), dtype=output.dtype)
            found.append([output, *torch.autograd.grad(output, inputs, up)])
        for a, b in zip(*found, strict=True):
            assert (a - b).abs().max() <= 1e-10 * a.abs().max()

    @pytest.mark.parametrize("options", [PLAIN, BLOCKS, EVERYTHING], ids=str)
    def test_one_token_changes_no_row_before_it(self, options):
        inputs = qkv(1100, heads=2, kv_heads=1, d=8)
        whole = strictly(inputs, **options).output
        for place in torch.randint(1100, (6,), generator=gen(5)).tolist():
            for index in range(3):
                changed = [x.clone() for x in inputs]
                changed[index][:, :, place] *= -5.0
                other = strictly(changed, **options).output
                assert torch.equal(whole[:, :, :place], other[:, :, :place])
                assert not torch.equal(whole[:, :, place:], other[:, :, place:])

    @pytest.mark.parametrize("options", [PLAIN, BLOCKS], ids=str)
    def test_without_strict_they_do(self, options):
        inputs = qkv(1100, heads=2, kv_heads=1, d=8)
        changed = [x.clone() for x in inputs]
        changed[0][:, :, 576:] *= 3.0
        one, other = (cb.hybrid_attention(*x, enable_gqa=True, **options) for x in (inputs, changed))
        assert not torch.equal(one[:, :, :576], other[:, :, :576])

    @pytest.mark.parametrize("options", ALL, ids=str)
    def test_rows_do_not_depend_on_the_number_of_tokens(self, options):
        inputs = qkv(N, d=8)
        whole = strictly(inputs, **options)
        for n in (1, 100, 512, 545, 1024, 1300):
            own = strictly([x[:, :, :n] for x in inputs], **options)
            assert_close(own.output, whole.output[:, :, :n], whole=1e-11, row=1e-10)
            assert (own.lse - whole.lse[:, :, :n]).abs().max() < 1e-11

    @pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=str)
    def test_no_gradient_goes_to_later_tokens(self, options):
        inputs = [x.requires_grad_() for x in qkv(1100, heads=2, kv_heads=1, d=8)]
        stats = strictly(inputs, **options)
        for place in (64, 300, 512, 1000):
            early = stats.output[:, :, :place].square().sum() + stats.lse[:, :, :place].sum()
            for gradient in torch.autograd.grad(early, inputs, retain_graph=True):
                assert bool((gradient[:, :, place:] == 0).all())
                assert bool((gradient[:, :, :place] != 0).any())

    @pytest.mark.parametrize("options", [PLAIN, BLOCKS, EVERYTHING], ids=str)
    def test_the_option_changes_the_result(self, options):
        inputs = qkv(1100, d=8)
        one, other = (cb.hybrid_attention(*inputs, strict=s, **options) for s in (False, True))
        assert float((one - other).norm() / one.norm()) > 0.01

    def test_without_choices_it_changes_no_more_than_rounding(self):
        inputs = qkv(1100, d=8)
        options = {"window": 64, "columns": 0}
        one, other = (cb.hybrid_attention(*inputs, strict=s, **options) for s in (False, True))
        assert_close(one, other, whole=1e-12, row=1e-11)

    def test_a_heavy_column_is_found_a_stretch_later(self):
        query, key, value = one_heavy_key(1500, 600)
        options = {"window": 64, "sinks": 0, "columns": 2, "strict": True}
        output = cb.hybrid_attention(query, key, value, **options)
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        error = (output - exact).norm(dim=-1)[0, 0] / exact.norm(dim=-1)[0, 0]
        assert float(error[730:1024].min()) > 0.3
        assert float(error[1024:].max()) < 0.05

    @pytest.mark.parametrize("options", [PLAIN, BLOCKS, EVERYTHING, ALSO_WEIGHED], ids=str)
    def test_the_first_512_tokens_are_exact(self, options):
        """Nothing is known of them: columns come from stretches before."""
        inputs = qkv(1100, d=8)
        exact = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        for n in (300, 512, 1100):
            stats = strictly([x[:, :, :n] for x in inputs], **options)
            first = stats.output[:, :, :512]
            assert_close(exact[:, :, : first.shape[2]], first, whole=1e-12, row=1e-10)
            assert float(stats.error_estimate) == 0.0 or n > 512
        assert float((stats.output - exact)[:, :, 600:].norm()) > 0.1

    def test_a_column_is_found_while_it_is_in_the_windows(self):
        """A key counts in rows a block after it, though their windows still hold it."""
        query, key, value = one_heavy_key(1100, 300)
        options = {"window": 450, "sinks": 0, "columns": 2, "strict": True}
        output = cb.hybrid_attention(query, key, value, **options)
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        error = (output - exact).norm(dim=-1)[0, 0] / exact.norm(dim=-1)[0, 0]
        assert float(error.max()) < 0.05
        # Far enough for it to be before the windows.
        without = cb.hybrid_attention(query, key, value, **{**options, "columns": 0})
        assert float((without - exact).norm(dim=-1)[0, 0, 900:].min()) > 0.1

    def test_key_weights_bring_segments_nearer(self):
        """In each segment one key has all the weight: equal weights lose it among the others."""
        query, key, value = qkv(2048, heads=2, d=8, dtype=torch.float32)
        query[..., 0] = 3.0
        key[..., 0] = 0.0
        key[:, :, 17::64, 0] = 6.0
        options = {"window": 64, "columns": 0, "far_field": "segments", "strict": True}
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        errors = []
        for key_weights in (False, True):
            output = cb.hybrid_attention(query, key, value, key_weights=key_weights, **options)
            errors.append(float((output - exact)[:, :, 600:].norm() / exact[:, :, 600:].norm()))
        assert errors[1] < 0.5 * errors[0]

    @pytest.mark.parametrize("options", ALL, ids=str)
    def test_with_logits_of_0_the_normaliser_counts_keys(self, options):
        query, key, value = qkv(1100, heads=2)
        stats = strictly((torch.zeros_like(query), key, torch.ones_like(value)), **options)
        assert (stats.output - 1.0).abs().max() < 1e-12
        every = torch.arange(1.0, 1101).double().log()
        if options.get("far_field") == "segments":
            assert (stats.lse - every).abs().max() < 1e-11
        else:
            assert bool((stats.lse < every + 1e-12).all())

    @pytest.mark.parametrize("left", [True, False])
    @pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=str)
    def test_padding_and_other_sequences_change_nothing(self, options, left):
        inputs = qkv(700, batch=2, heads=2, kv_heads=1, d=8)
        mask = torch.ones(2, 700, dtype=torch.bool)
        real = slice(90, None) if left else slice(None, 610)
        mask[1] = False
        mask[1, real] = True
        both = strictly(inputs, key_padding_mask=mask, **options)
        alone = strictly([x[1:, :, real] for x in inputs], **options)
        assert torch.equal(both.output[1:, :, real], alone.output)
        assert torch.equal(both.lse[1:, :, real], alone.lse)
        assert bool((both.output[1, :, ~mask[1]] == 0).all())

    @pytest.mark.parametrize("options", [PLAIN, BLOCKS, SEGMENTS], ids=str)
    def test_the_estimate_is_near_the_error(self, options):
        query, key, value = qkv(N, heads=4, d=8)
        stats = strictly((1.5 * query, key, value), **options)
        exact = torch.nn.functional.scaled_dot_product_attention(
            1.5 * query, key, value, is_causal=True
        )
        error = (stats.output - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
        assert bool((stats.error_mean < 2.0 * error).all())
        assert bool((stats.error_mean > 0.5 * error).all())
        assert bool((stats.error_estimate > error).all())

    def test_dispatch_says_what_ran(self):
        inputs = qkv(1100, d=8)
        dispatch = strictly(inputs, **EVERYTHING).dispatch
        assert dispatch.parts == ("window", "columns", "blocks", "segments")
        assert dispatch.sampled_rows == pytest.approx(2 * (40 // 8) + (1100 - 512) // 8, abs=2)
        assert strictly([x[:, :, :80] for x in inputs], **EVERYTHING).dispatch.parts == ("window",)

    def test_the_seed_matters_and_repeats(self):
        inputs = qkv(1100, d=8)
        one, again, other = (strictly(inputs, **{**BLOCKS, "seed": s}).output for s in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)


class TestChunks:
    @pytest.mark.parametrize("size", [7, 64, 100, 512, 700, N])
    @pytest.mark.parametrize("options", ALL, ids=str)
    def test_any_size_gives_one_call(self, options, size):
        inputs = qkv(N, heads=2, kv_heads=1, d=8)
        whole = strictly(inputs, **options)
        output, lse, state = in_chunks(inputs, ends_of(size), **options)
        assert_close(whole.output, output, whole=1e-12, row=1e-10)
        assert (lse - whole.lse).abs().max() < 1e-10
        assert state.length == N

    @pytest.mark.parametrize("options", [BLOCKS, WEIGHED, EVERYTHING, LONG], ids=str)
    def test_long_prompts_in_chunks(self, options):
        """Of more stretches than are attended to together."""
        n = 5200
        inputs = qkv(n, heads=2, kv_heads=1, d=8)
        whole = strictly(inputs, **options)
        for size in (1000, 1536):
            output, lse, _ = in_chunks(inputs, ends_of(size, n), **options)
            assert_close(whole.output, output, whole=1e-12, row=1e-10)
            assert (lse - whole.lse).abs().max() < 1e-10

    @pytest.mark.parametrize("counts", [(1, 2, 3), (4, 1, 2)])
    def test_each_chunk_may_have_other_threads(self, counts):
        query, key, value = inputs = qkv(N, heads=4, kv_heads=2, d=8)
        state, parts = cb.HybridState(enable_gqa=True, **EVERYTHING), []
        for threads, begin, end in zip(counts, (0, 400, 700), (400, 700, N), strict=True):
            torch.set_num_threads(threads)
            parts.append(state.attend(query[:, :, begin:end], key[:, :, :end], value[:, :, :end]))
        assert_close(strictly(inputs, **EVERYTHING).output, torch.cat(parts, 2), whole=1e-12, row=1e-10)

    @pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=str)
    def test_token_by_token(self, options):
        query, key, value = inputs = qkv(N, d=8, dtype=torch.float32)
        whole = strictly(inputs, **options).output
        state = cb.HybridState(**options)
        parts = [
            state.attend(query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1])
            for i in range(N)
        ]
        assert_close(whole, torch.cat(parts, 2), whole=1e-5, row=1e-5)

    @pytest.mark.parametrize("options", ALL, ids=str)
    def test_random_sizes_in_single_precision(self, options):
        inputs = qkv(N, batch=2, heads=4, kv_heads=2, d=8, d_v=5, dtype=torch.float32)
        whole = strictly(inputs, **options)
        ends = sorted({*torch.randint(1, N, (9,), generator=gen(2)).tolist(), 512, 513, N})
        output, lse, _ = in_chunks(inputs, ends, **options)
        assert_close(whole.output, output, whole=1e-5, row=1e-5)
        assert (lse - whole.lse).abs().max() < 1e-5

    @pytest.mark.parametrize("options", ALL, ids=str)
    def test_equal_weights_are_chosen_alike(self, options):
        """Ties are broken in chunks as in one call."""
        query, key, value = qkv(N, d=8)
        inputs = (torch.zeros_like(query), key, value)
        whole = strictly(inputs, **options)
        for size in (100, 512):
            output, lse, _ = in_chunks(inputs, ends_of(size), **options)
            assert_close(whole.output, output, whole=1e-12, row=1e-10)
            assert (lse - whole.lse).abs().max() < 1e-10

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        inputs = qkv(1100, heads=2, kv_heads=1, d=8, dtype=dtype)
        whole = strictly(inputs, **EVERYTHING)
        output, lse, _ = in_chunks(inputs, ends_of(300, 1100), **EVERYTHING)
        assert output.dtype == dtype
        assert_close(whole.output, output, whole=0.01, row=0.01)
        assert (lse - whole.lse).abs().max() < 1e-5

    def test_gradients(self):
        """Those of all chunks together are those of one call."""
        inputs = [x.requires_grad_() for x in qkv(1100, heads=2, kv_heads=1, d=8)]
        whole = strictly(inputs, **EVERYTHING).output
        output, _, state = in_chunks(inputs, ends_of(150, 1100), **EVERYTHING)
        up = torch.randn(output.shape, generator=gen(1), dtype=output.dtype)
        want = torch.autograd.grad(whole, inputs, up)
        for a, b in zip(want, torch.autograd.grad(output, inputs, up), strict=True):
            assert (a - b).abs().max() <= 1e-10 * a.abs().max()
        for own in state._running:
            tensors = (own.mass, own.queries, own.sampled, own.lse)
            assert not any(x.requires_grad for x in tensors)

    def test_each_chunk_has_its_own_estimate(self):
        query, key, value = qkv(N, d=8)
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        state = cb.HybridState(window=64)
        for begin, end in itertools.pairwise((0, 50, 64, 700, N)):
            stats = state.attend_stats(query[:, :, begin:end], key[:, :, :end], value[:, :, :end])
            part = exact[:, :, begin:end]
            error = (stats.output - part).norm() / part.norm()
            if end <= 64:
                assert float(stats.error_estimate) == 0.0
            else:
                assert 0.5 * error < float(stats.error_mean) < 2.0 * error
                assert float(stats.error_estimate) > error

    def test_estimates_are_of_the_latest_rows(self):
        """One row in 8, then in 32, and what came of the rows before."""
        query, key, value = qkv(N + 600, d=8)
        state, ends, found = cb.HybridState(window=64), [1100, *range(1110, 2001, 10), N + 600], []
        for end in ends:
            own = query[:, :, state.length : end], key[:, :, :end], value[:, :, :end]
            found.append(state.attend_stats(*own))
        rows = [stats.dispatch.sampled_rows for stats in found]
        # With those for columns, of two stretches before 1,100 and of the one that ends at 1,536.
        assert rows[0] - 2 * 8 == pytest.approx((1100 - 512) / 8, abs=2)
        assert sum(rows[:44]) - 2 * 8 == pytest.approx((1530 - 512) / 8, abs=2)
        assert sum(rows[44:91]) - 8 == pytest.approx((2000 - 1530) / 32, abs=2)
        assert rows[-1] - 8 == pytest.approx(100 / 32, abs=2)
        assert {own.shape for one in state._running for own in one.held} == {(4, 128)}
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        ratios = []
        for stats, begin, end in zip(found[1:-1], ends, ends[1:], strict=False):
            part = exact[:, :, begin:end]
            ratios.append(stats.error_mean.float() * part.norm() / (stats.output - part).norm())
        assert 0.5 < float(torch.stack(ratios).median()) < 2.0

    def test_estimates_follow_what_changes(self):
        """Queries that look for something far away from some token on, and nobody asked before."""
        n = 7000
        query, key, value = qkv(n, d=8, dtype=torch.float32)
        query[:, :, 6400:] *= 4.0
        value = 1.0 + 0.3 * value  # means are near, single keys are not
        state = cb.HybridState(window=64, columns=8)
        state.attend(query[:, :, :5000], key[:, :, :5000], value[:, :, :5000])
        found = []
        for end in (5800, 6400, n):
            own = query[:, :, state.length : end], key[:, :, :end], value[:, :, :end]
            found.append(state.attend_stats(*own))
            (held,) = state._running[0].held
            assert held.shape[1] >= 90
            assert float(held[3].min()) >= max(5000, end - 4096)
        assert float(found[2].error_mean) > 1.05 * float(found[1].error_mean)
        exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        part = exact[:, :, 6400:]
        error = (found[2].output - part).norm() / part.norm()
        assert float(found[2].error_estimate) > error

    def test_heads_with_settings_of_their_own(self):
        """Heads of one layer that share keys, each with windows and parts of its own: as by itself."""
        n = 2600
        tensors = qkv(n, heads=6, kv_heads=2, d=8)
        each = [
            PLAIN,
            WEIGHED,
            {**WEIGHED, "window": 300},
            BLOCKS,
            WEIGHED,
            {"window": 64, "columns": 0},
        ]
        defaults = {"sinks": 4, "blocks": 0, "far_field": "none", "num_segments": 128, "seed": 0}
        own = [
            Settings(**{"key_weights": False, **defaults, **options, "samples": 40}, strict=True)
            for options in each
        ]
        pieces = pieces_of_work(tensors[0], tensors[1], 0, own)
        assert [piece.heads for piece in pieces] == [[0, 1, 2], [3, 4, 5]]
        running, outputs, bounds = None, [], []
        for begin, end in itertools.pairwise((0, 300, 512, 1400, n)):
            chunk = [tensors[0][:, :, begin:end], *(x[:, :, :end] for x in tensors[1:])]
            groups, running = attend_pieces(*chunk, pieces, 8**-0.5, None, True, running)
            outputs.append(torch.cat([group.output for group in groups])[None])
            bounds.append(torch.cat([group.bound for group in groups]))
        output = torch.cat(outputs, 2)
        for head, options in enumerate(each):
            alone = [x[:, [head // 3 if i else head]] for i, x in enumerate(tensors)]
            expected, _, state = in_chunks(alone, [300, 512, 1400, n], **{**options, "samples": 40})
            assert_close(expected, output[:, head : head + 1], whole=1e-12, row=1e-10)
            assert state.length == n
            query, key, value = alone
            stats = cb.HybridState(**{**options, "samples": 40}), []
            for low, high in itertools.pairwise((0, 300, 512, 1400, n)):
                own = query[:, :, low:high], key[:, :, :high], value[:, :, :high]
                stats[1].append(float(stats[0].attend_stats(*own).error_estimate))
            assert stats[1] == pytest.approx([float(bound[head]) for bound in bounds], abs=1e-9)
        # Where keys are chosen the first two chunks are exact, and only there.
        assert float(torch.stack(bounds[:2])[:, :5].max()) < 1e-12
        assert all(bool((bound < 5).all()) for bound in bounds)
        assert all(bool((bound > 0.1).all()) for bound in bounds[2:])

    def test_the_state_stays_small(self):
        inputs = qkv(N, heads=2, kv_heads=1, d=8)
        for n in (100, 511, 512, 600, 1023, N):
            state = in_chunks([x[:, :, :n] for x in inputs], ends_of(90, n), **EVERYTHING)[2]
            assert state.numbers() <= 2 * (n + 511 * 8)
            weighed = in_chunks([x[:, :, :n] for x in inputs], ends_of(90, n), **ALSO_WEIGHED)[2]
            assert weighed.numbers() <= 2 * (n + 511 * 8) + n // 512 * 5 * (2 * 9 + 1) * 2

    def test_a_copy_goes_on_by_itself(self):
        one, other = qkv(900, d=8), [x.clone() for x in qkv(900, d=8)]
        for tensor in other:
            tensor[:, :, 600:] += 1.0
        state = in_chunks([x[:, :, :600] for x in one], [600], **EVERYTHING)[2]
        fork = copy.copy(state)
        for inputs, own in ((one, state), (other, fork)):
            output = own.attend(inputs[0][:, :, 600:], *inputs[1:])
            whole = strictly(inputs, **EVERYTHING).output[:, :, 600:]
            assert_close(whole, output, whole=1e-12, row=1e-10)
            assert own.length == 900

    def test_inputs_may_be_overwritten_after_a_call(self):
        inputs = qkv(900, d=8)
        whole = strictly(inputs, **EVERYTHING).output
        state, first = cb.HybridState(**EVERYTHING), inputs[0][:, :, :600].clone()
        state.attend(first, *(x[:, :, :600] for x in inputs[1:]))
        first.zero_()
        output = state.attend(inputs[0][:, :, 600:], *inputs[1:])
        assert_close(whole[:, :, 600:], output, whole=1e-12, row=1e-10)

    def test_what_it_shows(self):
        state = cb.HybridState(window=9)
        state.attend(*qkv(30))
        assert repr(state).startswith("HybridState(length=30, window=9, sinks=4, columns=64, blocks=0")
        assert state.length == 30


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"far_field": "conv"},
                "far_field='conv' with strict=True: its factors are fitted to rows",
            ),
            ({"correction": True}, "correction=True with strict=True: the rows that correct a block"),
        ],
        ids=str,
    )
    def test_what_needs_the_whole_prompt(self, options, message):
        for call in (cb.hybrid_attention, cb.hybrid_attention_stats):
            with pytest.raises(cb.InputError, match=message):
                call(*qkv(30), strict=True, **options)

    def test_options(self):
        with pytest.raises(cb.InputError, match="strict='yes' is neither True nor False"):
            cb.hybrid_attention(*qkv(30), strict="yes")
        with pytest.raises(cb.InputError, match="far_field='conv' with strict=True"):
            cb.HybridState(far_field="conv")
        with pytest.raises(cb.InputError, match="window=0 is not a positive integer"):
            cb.HybridState(window=0)
        with pytest.raises(cb.InputError, match="scale='x' is not a finite number"):
            cb.HybridState(scale="x")

    def test_chunks_that_do_not_follow(self):
        query, key, value = qkv(300, heads=2, d=8)
        state = cb.HybridState(window=20, columns=3)
        state.attend(*(x[:, :, :100] for x in (query, key, value)))
        new, keys, values = query[:, :, 100:150], key[:, :, :150], value[:, :, :150]
        cases = [
            (
                (new, key[:, :, :151], values),
                r"1, heads, 150, 8\): keys of the 100 tokens before and of",
            ),
            ((new, key[:, :, 100:150], values), r"the 100 tokens before and of the 50 of the query"),
            ((new, keys, value[:, :, :149]), r"value has shape .*must be \(1, 2, 150, d_v\)"),
            ((new[:, :1], keys[:, :1], values[:, :1]), "query_heads 2, .*this chunk is of .*_heads 1,"),
            ((new, keys, values[..., :5]), "value_size 8, .*this chunk is of .*value_size 5"),
            ((new[..., :4], keys[..., :4], values), "key_size 8, .* this chunk is of .*key_size 4"),
            (tuple(x.float() for x in (new, keys, values)), "float64, .* is of .*float32"),
            (
                tuple(x.expand(3, -1, -1, -1) for x in (new, keys, values)),
                "the state is of sequences 1, .*this chunk is of sequences 3,.*a new HybridState",
            ),
            ((new, keys[:, :1], values[:, :1]), "key has 1 heads but query has 2"),
            ((new[:, :, :0], keys, values), "it holds nothing"),
            ((new[0], keys, values), "four dimensions"),
            ((None, keys, values), "query is None"),
            ((new.index_fill(2, torch.tensor([7]), float("nan")), keys, values), "query holds 16 NaN"),
            ((new, keys.index_fill(2, torch.tensor([7]), float("inf")), values), r"key holds 16 NaN"),
        ]
        for tensors, message in cases:
            with pytest.raises(cb.InputError, match=message):
                state.attend(*tensors)
            assert state.length == 100
        # A refused chunk leaves the state as it was.
        output = state.attend(new, keys, values)
        whole = cb.hybrid_attention(query, key, value, window=20, columns=3, strict=True)
        assert_close(whole[:, :, 100:150], output, whole=1e-12, row=1e-10)

    def test_keys_before_the_first_chunk(self):
        query, key, value = qkv(50)
        with pytest.raises(
            cb.InputError, match="keys of the 0 tokens before and of the 20 of the query"
        ):
            cb.HybridState().attend(query[:, :, 30:], key, value)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(
    ("begin", "end", "most", "missing", "count"),
    [
        (512, 1024, 128, 128, 64),  # one in 8
        (4096, 5120, 128, 0, 32),  # one in 32
        (512, 4096, 128, 128, 128),  # as many as there may be
        (700, 1900, 128, 40, 66),  # from the one to the other
        (5000, 5001, 128, 128, 1),
        (5000, 5020, 2, 2, 2),
        (33, 97, 130, 77, 8),
    ],
)
def test_rows_for_estimates(begin, end, most, missing, count, seed):
    rows = rows_to_judge(begin, end, most, missing, seed)
    assert abs(len(rows) - count) <= max(1, count // 20)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert bool(((rows >= begin) & (rows < end)).all())
    if end - begin > 1:
        assert torch.equal(own_rows(rows, 1, seed), rows)
        half = (begin + end) // 2
        assert abs(int((rows < half).sum()) - len(rows) / 2) <= max(1.5, len(rows) / 10)


def test_rows_for_estimates_are_none_where_enough_is_known():
    found = [len(rows_to_judge(n, n + 1, 128, 0, 3)) for n in range(4096, 4096 + 320)]
    assert sum(found) == 10


def test_sampled_rows_depend_on_place_and_seed_alone():
    def rows(begin, seed, samples=64):
        options = {"samples": samples, "key_weights": False, "num_segments": 1, "far_field": "none"}
        settings = Settings(window=9, sinks=0, columns=1, blocks=0, seed=seed, strict=True, **options)
        return stretch_rows(begin, settings, torch.device("cpu")).tolist()

    assert rows(512, 0) == rows(512, 0)
    assert (
        len({tuple(x % 512 for x in rows(512 * s, seed)) for s in range(5) for seed in range(5)}) == 25
    )
    for begin, seed, samples in ((0, 0, 64), (1024, 7, 1), (5120, 2**62 - 1, 10**6)):
        found = rows(begin, seed, samples)
        assert len(set(found)) == len(found) == max(1, min(samples // 8, 256))
        assert all(begin <= x < begin + 512 for x in found)
        # Of the half that is for fits.
        assert own_rows(torch.tensor(found), 0, seed).tolist() == found
