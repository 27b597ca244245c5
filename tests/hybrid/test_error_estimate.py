"""How well the stated error of a head's output fits the true one, and what it must not miss."""

import pytest
import torch
from oracle import gen, qkv

import convbasis as cb
from convbasis.hybrid.estimate import Judged, bound_of, judged
from convbasis.hybrid.sampling import own_rows, spread_rows
from convbasis.integrations.capture import capture_layers
from convbasis.integrations.smollm2 import sample_text, token_ids

SMALL = {"window": 64, "columns": 16}
SETTINGS = [
    {"window": 64, "columns": 0, "sinks": 1},
    {**SMALL},
    {"window": 128, "columns": 64},
    {**SMALL, "blocks": 2},
    {**SMALL, "far_field": "segments", "num_segments": 16},
    {**SMALL, "far_field": "segments", "num_segments": 16, "key_weights": True, "blocks": 1},
    {**SMALL, "far_field": "conv"},
    {**SMALL, "correction": True},
    {**SMALL, "blocks": 1, "correction": True},
]


def exact(query, key, value, scale=None):
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True, scale=scale
    )


def true_error(stats, query, key, value, scale=None):
    expected = exact(*(x.double() for x in (query, key, value)), scale)
    difference = (stats.output.double() - expected).norm(dim=(2, 3))
    return difference / expected.norm(dim=(2, 3))


def needles(n, looking, d=64, seed=0):
    """Every row that looks does so at one far key, another for each; the others look at themselves."""
    g = gen(seed)
    key = torch.nn.functional.normalize(torch.randn(1, 1, n, d, generator=g), dim=-1)
    value = torch.randn(1, 1, n, d, generator=g)
    target = torch.arange(n)
    for row in range(200, n):
        if looking(row):
            target[row] = torch.randint(0, row - 190, (), generator=g)
    return 30.0 * key[:, :, target], key, value


class TestRows:
    @pytest.mark.parametrize("begin", [0, 1, 63, 64])
    def test_rows_for_fits_and_for_estimates_differ(self, begin):
        for length in range(1, 70):
            for count in (1, 3, 64):
                fit, held = (spread_rows(begin, begin + length, count, p, seed=3) for p in (0, 1))
                for rows in (fit, held):
                    assert bool(((rows >= begin) & (rows < begin + length)).all())
                    assert len(rows) <= count
                    assert len(rows) >= min(1, length // 3)
                assert not set(fit.tolist()) & set(held.tolist())

    @pytest.mark.parametrize("parity", [0, 1])
    @pytest.mark.parametrize("period", [2, 3, 4, 8])
    def test_no_kind_of_row_is_left_out(self, parity, period):
        for seed in range(5):
            rows = spread_rows(100, 4000, 64, parity, seed)
            assert len(rows) >= 60
            assert (rows.remainder(period).bincount(minlength=period) >= 3).all()

    def test_halves_of_a_block(self):
        every = torch.arange(1000)
        for seed in (0, 1, 2**62 - 1):
            fit, held = (own_rows(every, parity, seed) for parity in (0, 1))
            assert torch.equal(fit + held, every // 2 * 4 + 1)
            assert torch.equal(own_rows(fit, 0, seed), fit)
            assert torch.equal(fit[64:128] - 64, fit[:64])
            assert torch.equal(fit[32:64] - 32, held[:32])


class TestEstimate:
    @pytest.mark.parametrize("options", SETTINGS, ids=str)
    def test_of_a_setting_on_noise(self, options):
        inputs = qkv(700, heads=6, kv_heads=2)
        stats = cb.hybrid_attention_stats(*inputs, enable_gqa=True, **options)
        true = true_error(stats, *inputs)
        assert (stats.error_estimate >= true).all()
        # More only where some rows are wrong altogether.
        of_rows = (stats.output - exact(*inputs)).norm(dim=-1) / exact(*inputs).norm(dim=-1)
        wrong = (of_rows > 0.5).double().mean(-1) > 0.02
        assert (wrong | (stats.error_estimate <= 4 * true)).all()
        assert (stats.error_estimate <= torch.where(wrong, 1.0, 4 * true).fmax(4 * true)).all()
        assert (stats.error_mean <= stats.error_estimate).all()
        assert ((stats.error_mean / true).log().abs() < 0.5).all()

    @pytest.mark.parametrize("noise", [0.0, 1.0])
    def test_on_planted_logits(self, noise):
        ratios = []
        for seed in range(4):
            planted = cb.planted_qk(600, 16, 5, noise=noise, generator=gen(seed))
            value = torch.randn(1, 1, 600, 16, dtype=torch.float64, generator=gen(seed))
            inputs = planted.query[None, None], planted.key[None, None], value
            for options in SETTINGS:
                stats = cb.hybrid_attention_stats(*inputs, **options)
                ratios.append(float(stats.error_estimate / true_error(stats, *inputs)))
        ratios = torch.tensor(ratios)
        assert (ratios >= 1.0).double().mean() >= 0.95
        assert ratios.median() <= 2.5

    def test_repeats_with_the_seed_and_moves_with_it(self):
        inputs = qkv(500)
        one, again, other = (
            cb.hybrid_attention_stats(*inputs, window=64, columns=0, seed=seed) for seed in (0, 0, 1)
        )
        assert torch.equal(one.error_estimate, again.error_estimate)
        assert not torch.equal(one.error_estimate, other.error_estimate)
        assert torch.equal(one.output, other.output)

    def test_more_rows_make_it_tighter(self):
        inputs = qkv(1500, heads=3)
        few, many = (
            cb.hybrid_attention_stats(*inputs, window=64, columns=0, samples=samples)
            for samples in (16, 400)
        )
        gap = [(x.error_estimate / x.error_mean).mean() for x in (few, many)]
        assert gap[1] - 1.0 < 0.5 * (gap[0] - 1.0)

    def test_exact_is_0(self):
        inputs = qkv(300, heads=2)
        for options in SETTINGS:
            stats = cb.hybrid_attention_stats(*inputs, **{**options, "window": 300})
            assert not stats.error_estimate.any()
            assert not stats.error_mean.any()

    @pytest.mark.parametrize("n", [65, 66, 67, 127, 128, 129, 130])
    @pytest.mark.parametrize("options", SETTINGS, ids=str)
    def test_a_few_rows_beyond_the_window(self, n, options):
        inputs = qkv(n, heads=2)
        stats = cb.hybrid_attention_stats(*inputs, **options)
        assert bool(stats.error_estimate.isfinite().all())
        assert (stats.error_estimate >= 0.5 * true_error(stats, *inputs) - 1e-12).all()

    @pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
    def test_does_not_depend_on_the_size_of_values(self, size):
        query, key, value = qkv(400)
        one = cb.hybrid_attention_stats(query, key, value, **SMALL)
        other = cb.hybrid_attention_stats(query, key, size * value, **SMALL)
        assert torch.allclose(one.error_estimate, other.error_estimate, rtol=1e-9)

    def test_values_of_0_have_no_error(self):
        query, key, value = qkv(400)
        for options in SETTINGS:
            stats = cb.hybrid_attention_stats(query, key, torch.zeros_like(value), **options)
            assert not stats.error_estimate.any()


class TestWarnings:
    """A wrong result has a large estimate."""

    @pytest.mark.parametrize("options", [x for x in SETTINGS if "num_segments" not in x], ids=str)
    @pytest.mark.parametrize(
        "looking",
        [
            lambda row: True,
            lambda row: row % 2 == 0,
            lambda row: row % 2 == 1,
            lambda row: row % 3 == 0,
            lambda row: row % 4 == 1,
        ],
        ids=["all", "even", "odd", "every third", "every fourth"],
    )
    def test_needles_that_no_statistic_finds(self, looking, options):
        for seed in range(2):
            inputs = needles(1200, looking, seed=seed)
            stats = cb.hybrid_attention_stats(*inputs, scale=1.0, seed=seed, **options)
            assert float(true_error(stats, *inputs, 1.0)) > 0.35
            assert float(stats.error_estimate) > 0.5
            assert stats.error_estimate >= true_error(stats, *inputs, 1.0)

    @pytest.mark.parametrize("options", SETTINGS, ids=str)
    def test_one_row_in_ten(self, options):
        """The error of the whole is small; those rows are wrong all the same."""
        inputs = needles(1200, lambda row: row * 37 % 101 < 10)
        stats = cb.hybrid_attention_stats(*inputs, scale=1.0, **options)
        off = (stats.output - exact(*inputs, 1.0)).norm(dim=-1) / exact(*inputs, 1.0).norm(dim=-1)
        wrong = float((off[0, 0, 200:] > 0.5).double().mean())
        assert wrong < 0.05 or float(stats.error_estimate) > 0.5
        assert float(stats.error_estimate) >= float(true_error(stats, *inputs, 1.0))

    def test_a_huge_value_elsewhere_hides_nothing(self):
        query, key, value = needles(1200, lambda row: True)
        value[0, 0, 0] *= 1e4
        query[0, 0, 1:] -= (query[0, 0, 1:] @ key[0, 0, 0])[:, None] * key[0, 0, 0]
        stats = cb.hybrid_attention_stats(query, key, value, scale=1.0, window=64, columns=16)
        assert float(true_error(stats, query, key, value, 1.0)) < 0.05
        assert float(stats.error_estimate) > 0.5

    def test_a_few_wrong_rows_of_many_are_let_pass(self):
        exact_rows = torch.randn(1, 128, 8, generator=gen(0), dtype=torch.float64)
        for wrong, told in ((0, False), (2, False), (3, True), (128, True)):
            output = exact_rows.repeat(1, 2, 1)
            output[:, :wrong] = -output[:, :wrong]
            _, bound = bound_of(judged(output, exact_rows, torch.arange(128), 0))
            assert (float(bound) >= 1.0) == told

    @pytest.mark.parametrize("size", [1e-5, 1.0, 1e8])
    @pytest.mark.parametrize("place", [3, 10, 40])
    def test_all_values_in_one_far_token(self, place, size):
        """Our own output is next to nothing there: it says nothing about how large the error is."""
        query, key, value = qkv(500, heads=4)
        value = torch.zeros_like(value)
        value[:, :, place] = size
        for seed in range(4):
            stats = cb.hybrid_attention_stats(
                query, key, value, window=64, columns=0, sinks=0, seed=seed
            )
            true = true_error(stats, query, key, value)
            assert (stats.error_estimate >= 0.75 * true).all()
            assert bool(stats.error_estimate.isfinite().all())

    def test_all_mass_on_one_far_token(self):
        query, key, value = qkv(500, d=8)
        query[..., -1] = 1.0
        key[..., -1] = 0.0
        key[:, :, 100, -1] = 20.0
        value[:, :, 100] = 5.0
        missed = cb.hybrid_attention_stats(query, key, value, scale=1.0, window=64, columns=0)
        assert float(missed.error_estimate) > 0.5
        found = cb.hybrid_attention_stats(query, key, value, scale=1.0, window=64, columns=1)
        assert float(found.error_estimate) < 0.05


@pytest.fixture(scope="module")
def layers(smollm2):
    tokens = token_ids(smollm2.tokenizer, sample_text(), 768)
    return capture_layers(smollm2.model, tokens, [1, 14, 27])


def test_bounds_of_real_heads_hold(layers):
    ratios = []
    for layer in layers.values():
        inputs = layer[:3]
        for options in SETTINGS:
            stats = cb.hybrid_attention_stats(*inputs, scale=layer.scale, enable_gqa=True, **options)
            ratios.append(stats.error_estimate / true_error(stats, *inputs, layer.scale))
    ratios = torch.stack(ratios)
    assert ratios.shape == (27, 1, 9)
    assert (ratios >= 1.0).double().mean() >= 0.95
    assert 1.0 < ratios.median() <= 2.0


def test_real_heads_are_close_where_more_is_exact(layers):
    layer = layers[14]
    inputs = layer[:3]
    options = {"scale": layer.scale, "enable_gqa": True}
    few, more, most = (
        true_error(cb.hybrid_attention_stats(*inputs, **options, **own), *inputs, layer.scale).mean()
        for own in (
            {"window": 64, "columns": 0},
            {"window": 64, "columns": 64},
            {"window": 64, "columns": 64, "blocks": 4},
        )
    )
    assert few > 1.2 * more > 1.44 * most
    plain = cb.conv_basis_attention(*inputs, num_bases=32, scale=layer.scale, enable_gqa=True)
    expected = exact(*inputs, layer.scale)
    assert few < (plain - expected).norm() / expected.norm()


class TestJudged:
    """What the estimate is made of may be known from before."""

    def output(self):
        return torch.randn(3, 200, 8, generator=torch.Generator().manual_seed(4))

    @pytest.mark.parametrize(("begin", "offset"), [(0, 0), (40, 0), (40, 30), (40, 60)])
    def test_known_squares_change_nothing(self, begin, offset):
        output, rows = self.output(), torch.tensor([70, 101, 180])
        known, exact = output.double().square().sum((1, 2)), output.flip(1)[:, :3]
        found = judged(output, exact, rows, begin, offset, known)
        expected = judged(output, exact, rows, begin, offset)
        split = max(0, begin - offset)
        assert found.rows.tolist() == expected.rows.tolist() == [200 - split] * 3
        own = output[:, rows - offset].double()
        for norms, tensor in zip(found[:3], (own - exact, exact.double(), own), strict=True):
            assert torch.allclose(norms, tensor.norm(dim=-1), rtol=1e-6)
        for own in (found, expected):
            assert torch.allclose(own.near, output[:, :split].double().square().sum((1, 2)), rtol=1e-6)
            assert torch.allclose(own.far, output[:, split:].double().square().sum((1, 2)), rtol=1e-6)

    def test_heads_with_other_exact_rows_are_judged_at_once_as_one_by_one(self):
        output, exact = self.output(), self.output()[:, 60:90] + 0.1
        rows = torch.arange(60, 90)
        parts = [judged(output[i : i + 1], exact[i : i + 1], rows, 20 * i) for i in range(3)]
        together = bound_of(Judged.joined(parts))
        for i, part in enumerate(parts):
            for found, alone in zip(together, bound_of(part), strict=True):
                assert torch.equal(found[i : i + 1], alone)
        assert len(set(together[1].tolist())) == 3

    def test_norms_beyond_the_dtype_bound_nothing(self):
        output = self.output() * 1e25
        _, bound = bound_of(judged(output, output[:, 50:80], torch.arange(50, 80), 40))
        assert not bool((bound <= 1e9).any())
