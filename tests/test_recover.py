"""recover and planted_qk: exact starts, the error bound, termination on anything."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import reference
import torch
from hypothesis import given, settings

import convbasis as cb

SEARCHES = ("linear", "binary")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def planted_with_noise(n, d, k, share, window, seed):
    """Plant, then plant the same with noise of the given share of the bound delta/(5T)."""
    delta = cb.planted_qk(n, d, k, generator=gen(seed)).delta
    noise = share * delta / (5 * window)
    return cb.planted_qk(n, d, k, noise=noise, generator=gen(seed)), noise


class TestPlanted:
    @pytest.mark.parametrize(
        ("n", "d", "k"),
        [(1, 1, 1), (2, 1, 2), (30, 1, 4), (50, 2, 5), (50, 3, 5), (200, 16, 9), (65, 64, 65)],
    )
    def test_logits_have_the_basis_that_is_claimed(self, n, d, k):
        planted = cb.planted_qk(n, d, k, generator=gen(n))
        assert planted.query.shape == planted.key.shape == (n, d)
        logits = reference.exact_logits(planted.query, planted.key)
        dense = reference.dense_matrix(planted.basis.segment_kernels, planted.basis.starts)
        assert planted.basis.k == k
        assert (logits - dense).abs().max() < 1e-11
        assert logits.abs().max() < 60

    @pytest.mark.parametrize("k", [1, 2, 7, 40])
    def test_delta_separates_the_kernels(self, k):
        planted = cb.planted_qk(60, 8, k, generator=gen())
        first = planted.basis.segment_kernels[:, 0]
        assert (first.abs() >= planted.delta - 1e-9).all()
        gaps = (first[:, None] - first).abs() + 99 * torch.eye(k)
        assert gaps.min() >= planted.delta - 1e-9

    @pytest.mark.parametrize("noise", [1e-6, 0.01, 0.5])
    def test_noise_has_the_known_maximum(self, noise):
        plain = cb.planted_qk(80, 8, 5, generator=gen(3))
        noisy = cb.planted_qk(80, 8, 5, noise=noise, generator=gen(3))
        assert torch.equal(plain.basis.to_dense(), noisy.basis.to_dense())
        error = reference.exact_logits(noisy.query, noisy.key) - plain.basis.to_dense()
        assert float(error.abs().max()) == pytest.approx(noise, rel=1e-6)

    def test_dtype_and_repeatability(self):
        one = cb.planted_qk(40, 8, 3, generator=gen(1), dtype=torch.float32)
        two = cb.planted_qk(40, 8, 3, generator=gen(1), dtype=torch.float32)
        assert one.query.dtype == one.basis.dtype == torch.float32
        assert torch.equal(one.query, two.query)
        assert not torch.equal(one.query, cb.planted_qk(40, 8, 3, generator=gen(2)).query.float())

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((0, 4, 1), {}, "n=0"),
            ((5, 0, 1), {}, "d=0"),
            ((5, 4, 0), {}, "num_bases=0"),
            ((5, 4, 6), {}, "do not fit"),
            ((5, 4, 2), {"noise": -1.0}, "noise=-1.0"),
            ((5, 1, 2), {"noise": 0.1}, "d >= 2"),
        ],
    )
    def test_errors(self, arguments, options, message):
        with pytest.raises(cb.InputError, match=message):
            cb.planted_qk(*arguments, **options)


class TestExactRecovery:
    @pytest.mark.parametrize("search", SEARCHES)
    @pytest.mark.parametrize("window", [1, 4, 16])
    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("tell", [False, True], ids=["epsilon unknown", "epsilon given"])
    def test_planted_starts_are_found(self, search, window, share, tell):
        for seed, (n, d, k) in enumerate([(100, 8, 1), (100, 8, 6), (257, 16, 12), (90, 3, 20)]):
            planted, noise = planted_with_noise(n, d, k, share, window, seed)
            basis = cb.recover(
                planted.query,
                planted.key,
                num_bases=k,
                window=window,
                delta=planted.delta,
                epsilon=noise if tell else 0.0,
                search=search,
            )
            assert basis.starts.tolist() == planted.basis.starts.tolist()
            error = (basis.segment_kernels - planted.basis.segment_kernels).abs().max()
            assert error <= noise * (1 + 1e-9) + 1e-11

    @pytest.mark.parametrize("window", [1, 4, 16])
    def test_delta_none_finds_the_planted_starts(self, window):
        for seed in range(10):
            planted, _ = planted_with_noise(150, 8, 7, 0.9, window, seed)
            basis = cb.recover(planted.query, planted.key, num_bases=7, window=window)
            assert basis.starts.tolist() == planted.basis.starts.tolist()

    @pytest.mark.parametrize("search", SEARCHES)
    def test_more_bases_than_there_are_change_nothing_when_delta_is_given(self, search):
        planted = cb.planted_qk(120, 8, 4, generator=gen())
        basis = cb.recover(planted.query, planted.key, num_bases=40, delta=planted.delta, search=search)
        assert basis.starts.tolist() == planted.basis.starts.tolist()

    @pytest.mark.parametrize("search", SEARCHES)
    def test_fewer_bases_give_the_first_ones(self, search):
        planted = cb.planted_qk(120, 8, 6, generator=gen())
        basis = cb.recover(planted.query, planted.key, num_bases=3, delta=planted.delta, search=search)
        assert basis.starts.tolist() == planted.basis.starts.tolist()[:3]

    def test_repeating_kernels_need_the_linear_scan(self):
        n = 90
        angles = torch.arange(n, dtype=torch.float64)[:, None] * torch.tensor([0.3, 1.1]).double()
        rotation = torch.polar(torch.ones_like(angles), angles)
        vectors = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.complex128)
        which = torch.tensor([0] * 20 + [1] * 20 + [0] * 50)  # A-B-A
        q = torch.view_as_real(rotation * (1.0 + 0.5j)).flatten(1)
        k = torch.view_as_real(rotation * vectors[which]).flatten(1)
        options = {"num_bases": 3, "delta": 0.5, "window": 2}
        assert cb.recover(q, k, **options).starts.tolist() == [0, 20, 40]
        assert cb.recover(q, k, num_bases=3, window=2).starts.tolist() == [0, 20, 40]
        # The binary search looks at the middle first, finds A there, and never sees B.
        assert cb.recover(q, k, search="binary", **options).starts.tolist() == [0]

    def test_batch_of_unequal_ranks(self):
        parts = [cb.planted_qk(100, 8, k, generator=gen(k)) for k in (2, 5, 1, 3)]
        q = torch.stack([p.query for p in parts]).view(2, 2, 100, 8)
        k = torch.stack([p.key for p in parts]).view(2, 2, 100, 8)
        delta = min(p.delta for p in parts)
        for search in SEARCHES:
            basis = cb.recover(q, k, num_bases=6, delta=delta, search=search)
            assert basis.ranks.tolist() == [[2, 5], [1, 3]]
            assert basis.k == 5
            for i, part in enumerate(parts):
                own = basis.starts.view(4, 5)[i]
                assert own[own < 100].tolist() == part.basis.starts.tolist()
                assert (
                    basis.to_dense().view(4, 100, 100)[i] - part.basis.to_dense()
                ).abs().max() < 1e-11

    def test_float32_finds_them_too(self):
        planted = cb.planted_qk(300, 32, 8, generator=gen(), dtype=torch.float32)
        basis = cb.recover(planted.query, planted.key, num_bases=8)
        assert basis.dtype == torch.float32
        assert basis.starts.tolist() == planted.basis.starts.tolist()
        half = cb.recover(planted.query.bfloat16(), planted.key.bfloat16(), num_bases=2, delta=1.0)
        assert half.dtype == torch.float32

    def test_scale(self):
        planted = cb.planted_qk(100, 16, 5, generator=gen())
        plain = cb.recover(planted.query, planted.key, num_bases=5)
        scaled = cb.recover(planted.query, planted.key, num_bases=5, scale=1.0)
        assert torch.allclose(scaled.segment_kernels, 4 * plain.segment_kernels)


class TestBound:
    def test_f6_holds_on_every_one_of_200_random_instances(self):
        tightest = 0.0
        for seed in range(200):
            window = (1, 4, 16)[seed % 3]
            n, d, k = 40 + seed % 60, 4 + seed % 9, 1 + seed % 9
            planted, noise = planted_with_noise(n, d, k, 1.0, window, seed)
            basis = cb.recover(
                planted.query, planted.key, num_bases=k, window=window, delta=planted.delta
            )
            value = torch.randn(n, 3, generator=gen(seed), dtype=torch.float64)
            exact, _ = reference.softmax_attention(
                reference.exact_logits(planted.query, planted.key), value
            )
            heads = (x[None, None] for x in (planted.query, planted.key, value))
            ours = cb.conv_basis_attention(*heads, starts=basis.starts)[0, 0]
            difference = (exact - ours).abs()
            largest = value.abs().max()
            assert difference.max() <= 2 * (math.exp(2 * noise) - 1) * largest + 1e-12
            assert difference.max() <= 2 * math.tanh(noise) * largest + 1e-12
            logit_error = basis.to_dense() - reference.exact_logits(planted.query, planted.key)
            for i in range(n):
                row = logit_error[i, : i + 1]
                spread = value[: i + 1].amax(0) - value[: i + 1].amin(0)
                limit = torch.tanh((row.max() - row.min()) / 4) * spread
                assert (difference[i] <= limit + 1e-12).all()
            tightest = max(tightest, float(difference.max() / (2 * math.tanh(noise) * largest)))
        assert tightest > 0.05  # the bound is not vacuous


class TestAnyInput:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"window": 5},
            {"delta": 1.0},
            {"delta": 0.0},
            {"delta": 1e9},
            {"delta": 1.0, "search": "binary"},
            {"delta": 0.0, "search": "binary", "window": 3},
            {"epsilon": 0.2},
        ],
        ids=str,
    )
    def test_result_is_a_valid_basis_from_column_zero(self, options):
        q, k = torch.randn(2, 3, 120, 8, dtype=torch.float64)
        basis = cb.recover(q, k, num_bases=9, **options)
        assert (basis.starts[:, 0] == 0).all()
        assert (basis.ranks <= 9).all()
        for b in range(3):
            expected = reference.conv_basis_logits(q[b], k[b], basis.starts[b])
            assert (basis.to_dense()[b] - expected).abs().max() < 1e-12

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 60),
        st.integers(1, 70),
        st.integers(1, 60),
        st.one_of(st.none(), st.floats(0.0, 5.0)),
        st.sampled_from(SEARCHES),
        st.integers(0, 2**31),
    )
    def test_property_terminates_and_is_valid(self, n, bases, window, delta, search, seed):
        window = min(window, n)
        if search == "binary" and delta is None:
            delta = 0.5
        q, k = torch.randn(2, n, 3, generator=gen(seed), dtype=torch.float64)
        basis = cb.recover(q, k, num_bases=bases, window=window, delta=delta, search=search)
        assert basis.starts[0] == 0
        assert 1 <= int(basis.ranks) <= min(bases, n - window + 1)
        assert int(basis.starts[-1]) <= n - window
        expected = reference.conv_basis_logits(q, k, basis.starts)
        assert (basis.to_dense() - expected).abs().max() < 1e-12

    @pytest.mark.parametrize("window", [1, 3])
    def test_delta_none_is_the_largest_delta_that_finds_all(self, window):
        for seed in range(5):
            q, k = torch.randn(2, 150, 8, generator=gen(seed), dtype=torch.float64)
            found = cb.recover(q, k, num_bases=6, window=window)
            assert int(found.ranks) == 6
            # Replay the scan to see at which delta these starts appear.
            logits = reference.exact_logits(q, k)
            windows = torch.stack([logits[j : j + window, j] for j in range(150 - window + 1)])
            s = found.starts.tolist()
            jumps = [float((windows[b] - windows[a]).abs().sum()) for a, b in itertools.pairwise(s)]
            delta = 2 * min(jumps)
            at = cb.recover(q, k, num_bases=6, window=window, delta=0.999 * delta)
            above = cb.recover(q, k, num_bases=6, window=window, delta=1.002 * delta)
            assert int(at.ranks) == 6
            assert int(above.ranks) < 6

    def test_delta_none_with_as_many_bases_as_columns_takes_all(self):
        q, k = torch.randn(2, 64, 4, dtype=torch.float64)
        assert cb.recover(q, k, num_bases=64).starts.tolist() == list(range(64))
        assert cb.recover(q, k, num_bases=64, window=4).starts.tolist() == list(range(61))
        assert cb.recover(q, k, num_bases=500).starts.tolist() == list(range(64))

    def test_equal_logits_still_give_as_many_bases_as_wanted(self):
        ones = torch.ones(20, 4)
        assert cb.recover(ones, ones, num_bases=3).starts.tolist() == [0, 1, 2]
        assert cb.recover(ones, ones, num_bases=3, delta=0.5).starts.tolist() == [0]
        assert cb.recover(ones, ones, num_bases=3, epsilon=1e-3).starts.tolist() == [0]

    def test_large_sequence_never_forms_the_matrix(self):
        # At n = 200,000 the n×n matrix would take 160 GB.
        planted = cb.planted_qk(200_000, 8, 3, generator=gen(), dtype=torch.float32)
        basis = cb.recover(planted.query, planted.key, num_bases=3, delta=planted.delta)
        assert basis.starts.tolist() == planted.basis.starts.tolist()

    def test_gradients_reach_the_keys_at_starts_alone(self):
        q, k = torch.randn(2, 10, 3, dtype=torch.float64)
        k.requires_grad_()
        cb.recover(q, k, num_bases=3, delta=2.0).segment_kernels.square().sum().backward()
        starts = cb.recover(q, k.detach(), num_bases=3, delta=2.0).starts.tolist()
        moved = k.grad.abs().sum(-1) > 0
        assert moved.nonzero()[:, 0].tolist() == starts


class TestEpsilon:
    def test_warning_where_the_guarantee_ends(self):
        planted = cb.planted_qk(60, 8, 3, generator=gen())
        with pytest.warns(cb.ConvBasisWarning, match="exceeds delta"):
            cb.recover(
                planted.query, planted.key, num_bases=3, delta=planted.delta, epsilon=planted.delta / 4
            )

    def test_error_where_no_threshold_is_left(self):
        q = torch.zeros(9, 2)
        with pytest.raises(cb.InputError, match="too large for delta"):
            cb.recover(q, q, num_bases=2, delta=1.0, epsilon=0.5)

    def test_numbers_of_numpy_are_numbers(self):
        numpy = pytest.importorskip("numpy")
        q, k = torch.randn(2, 30, 4)
        options = {"num_bases": numpy.int64(3), "delta": numpy.float32(1.0)}
        same = cb.recover(q, k, num_bases=3, delta=1.0)
        assert torch.equal(cb.recover(q, k, **options).starts, same.starts)

    @pytest.mark.parametrize("search", SEARCHES)
    def test_a_huge_last_token_does_not_move_the_threshold(self, search):
        q, k = torch.zeros(300, 2), torch.zeros(300, 2)
        q[:, 0] = 1.0
        k[:, 0] = 5.0
        k[100:, 0] = 5.93
        options = {"num_bases": 4, "delta": 1.0, "epsilon": 0.01, "scale": 1.0}
        before = cb.recover(q, k, **options).starts.tolist()
        k[299, 0] = 3e6
        after = cb.recover(q, k, **options).starts.tolist()
        assert [s for s in after if s < 299] == before == [0]


class TestInputErrors:
    @pytest.mark.parametrize(
        ("q", "k", "options", "message"),
        [
            (torch.zeros(5), torch.zeros(5), {}, r"\(\.\.\., n, d\)"),
            (torch.zeros(5, 2), torch.zeros(4, 2), {}, r"\(\.\.\., n, d\)"),
            (torch.zeros(0, 2), torch.zeros(0, 2), {}, r"\(\.\.\., n, d\)"),
            (torch.zeros(5, 2), torch.zeros(5, 2).double(), {}, "k has dtype"),
            (torch.zeros(5, 2), torch.zeros(5, 2, device="meta"), {}, "k is on meta"),
            (torch.zeros(5, 2).int(), torch.zeros(5, 2).int(), {}, "float"),
            (torch.full((5, 2), float("nan")), torch.zeros(5, 2), {}, "q holds"),
            (torch.zeros(5, 2), torch.full((5, 2), float("inf")), {}, "k holds"),
            (torch.full((5, 2), 1e30), torch.full((5, 2), 1e30), {}, "logits"),
            (torch.zeros(5, 2), torch.zeros(5, 2), {"num_bases": 0}, "num_bases=0"),
            (torch.zeros(5, 2), torch.zeros(5, 2), {"window": 0}, "window=0"),
            (torch.zeros(5, 2), torch.zeros(5, 2), {"window": 6}, "window=6"),
            (torch.zeros(5, 2), torch.zeros(5, 2), {"delta": -0.1}, "delta=-0.1"),
            (torch.zeros(5, 2), torch.zeros(5, 2), {"delta": "x"}, "delta='x'"),
            (torch.zeros(5, 2), torch.zeros(5, 2), {"epsilon": float("inf")}, "epsilon=inf"),
            (torch.zeros(5, 2), torch.zeros(5, 2), {"search": "binary"}, "needs delta"),
            (torch.zeros(5, 2), torch.zeros(5, 2), {"search": ""}, "search=''"),
            (torch.zeros(5, 2), torch.zeros(5, 2), {"scale": float("nan")}, "scale=nan"),
        ],
    )
    def test_message_says_what_is_wrong(self, q, k, options, message):
        with pytest.raises(cb.InputError, match=message):
            cb.recover(q, k, **{"num_bases": 2, **options})
