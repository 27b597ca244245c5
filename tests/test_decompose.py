"""decompose: exactness, the smallest k, the tolerance."""

import hypothesis.strategies as st
import pytest
import reference
import torch
from factories import random_basis, random_lower, random_starts
from hypothesis import given, settings

import convbasis as cb


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def smallest_k(H):
    """F1, column by column and entry by entry."""
    n = len(H)
    current, count = torch.zeros(n, dtype=H.dtype), 0
    for j in range(n):
        column = H[j:, j]
        if not torch.equal(column, current[: n - j]):
            current = torch.zeros(n, dtype=H.dtype)
            current[: n - j] = column
            count += 1
    return count


class TestExact:
    def test_random_matrix_needs_every_basis(self):
        H = random_lower(512, gen())
        basis = cb.decompose(H)
        assert basis.k == 512
        assert (basis.to_dense() - H).abs().max() <= 1e-12

    @pytest.mark.parametrize(
        ("n", "k"), [(1, 1), (2, 1), (2, 2), (17, 5), (100, 1), (100, 23), (257, 40)]
    )
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_planted_bases_are_found(self, n, k, dtype):
        kernels, starts = random_basis(n, k, gen(n + k), dtype)
        H = reference.dense_matrix(kernels, starts).to(dtype)
        basis = cb.decompose(H)
        assert basis.dtype == dtype
        assert basis.starts.tolist() == starts.tolist()
        assert torch.equal(basis.segment_kernels, kernels)
        assert torch.equal(basis.to_dense(), H)

    def test_kernels_of_very_different_size_do_not_blow_up_k(self):
        kernels, starts = random_basis(64, 6, gen(), torch.float32)
        kernels *= torch.logspace(-8, 8, 6)[:, None]
        H = reference.dense_matrix(kernels, starts).float()
        assert cb.decompose(H).k == 6
        assert torch.equal(cb.decompose(H).to_dense(), H)

    def test_zero_matrix_has_no_basis(self):
        basis = cb.decompose(torch.zeros(7, 7))
        assert basis.k == 0
        assert torch.equal(basis.to_dense(), torch.zeros(7, 7))

    def test_an_important_column_costs_two_bases_and_one_at_the_border(self):
        H = torch.ones(10, 10).tril()
        for column, k in ((4, 3), (0, 2), (9, 2)):
            changed = H.clone()
            changed[column:, column] = 5.0
            assert cb.decompose(changed).k == k

    def test_leading_zero_columns_and_a_zero_segment(self):
        H = torch.zeros(6, 6)
        H[2:, 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        basis = cb.decompose(H)
        assert basis.starts.tolist() == [2, 3]
        assert torch.equal(basis.segment_kernels[1], torch.zeros(6))
        assert torch.equal(basis.to_dense(), H)

    def test_batches_of_unequal_k(self):
        H = torch.zeros(2, 3, 9, 9, dtype=torch.float64)
        for i, k in enumerate((0, 1, 4, 9, 2)):
            if k:
                kernels, starts = random_basis(9, k, gen(i))
                H.view(-1, 9, 9)[i] = reference.dense_matrix(kernels, starts)
        basis = cb.decompose(H)
        assert basis.ranks.tolist() == [[0, 1, 4], [9, 2, 0]]
        assert basis.k == 9
        assert torch.equal(basis.to_dense(), H)
        alone = cb.decompose(H[0, 2])
        assert torch.equal(basis.starts[0, 2, :4], alone.starts)
        assert (basis.starts[0, 2, 4:] == 9).all()
        assert torch.equal(basis.segment_kernels[0, 2, :4], alone.segment_kernels)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 12), st.integers(0, 2**31))
    def test_property_smallest_basis(self, n, seed):
        H = torch.randint(-1, 2, (n, n), generator=gen(seed)).double().tril()
        basis = cb.decompose(H)
        assert basis.k == smallest_k(H)
        assert torch.equal(basis.to_dense(), H)

    def test_gradient_reaches_the_columns_that_are_kept(self):
        kernels, starts = random_basis(8, 3, gen())
        H = reference.dense_matrix(kernels, starts).requires_grad_()
        cb.decompose(H).segment_kernels.sum().backward()
        expected = torch.zeros(8, 8, dtype=torch.float64)
        for s in starts.tolist():
            expected[s:, s] = 1.0
        assert torch.equal(H.grad, expected)


class TestTolerance:
    def test_error_is_within_tolerance_on_200_random_matrices(self):
        ks = []
        for seed in range(200):
            g = gen(seed)
            n = int(torch.randint(1, 40, (), generator=g))
            tol = float(torch.rand((), generator=g)) * 2
            dtype = torch.float64 if seed % 2 else torch.float32
            H = random_lower(n, g).to(dtype)
            basis = cb.decompose(H, tol=tol)
            assert (basis.to_dense() - H).abs().max() <= tol
            ks.append(n - basis.k)
        assert max(ks) > 0

    def fewest(self, H, tol):
        """The least number of segments by dynamic programming over all splits."""
        n = len(H)

        def feasible(a, b):  # one kernel for columns a..b-1
            low = H[a:, a].clone()
            high = low.clone()
            for j in range(a + 1, b):
                low[: n - j] = torch.minimum(low[: n - j], H[j:, j])
                high[: n - j] = torch.maximum(high[: n - j], H[j:, j])
            return bool(((high - low) / 2 <= tol).all())

        zero = [bool((H[j:, j].abs() <= tol).all()) for j in range(n)]
        best = [0] + [n + 1] * n
        for b in range(1, n + 1):
            if all(zero[:b]):
                best[b] = 0
            for a in range(b):
                if feasible(a, b):
                    best[b] = min(best[b], best[a] + 1)
        return best[n]

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 9), st.floats(0.05, 1.5), st.integers(0, 2**31))
    def test_property_no_basis_within_tolerance_has_fewer_segments(self, n, tol, seed):
        H = random_lower(n, gen(seed))
        basis = cb.decompose(H, tol=tol)
        assert (basis.to_dense() - H).abs().max() <= tol
        assert basis.k == self.fewest(H, tol)

    def test_noise_below_the_tolerance_is_absorbed(self):
        kernels, starts = random_basis(120, 6, gen())
        H = reference.dense_matrix(kernels, starts)
        noisy = H + ((torch.rand(120, 120, generator=gen(1), dtype=torch.float64) - 0.5) * 2e-3).tril()
        assert cb.decompose(noisy).k == 120
        assert cb.decompose(noisy, tol=1e-3).starts.tolist() == starts.tolist()

    def test_everything_within_tolerance_of_zero_needs_no_basis(self):
        H = random_lower(20, gen())
        assert cb.decompose(H, tol=float(H.abs().max())).k == 0
        assert cb.decompose(H, tol=0.999 * float(H.abs().max())).k >= 1

    def test_k_falls_with_the_tolerance(self):
        H = random_lower(80, gen()).cumsum(-2).tril()
        ks = [cb.decompose(H, tol=t).k for t in (0.0, 0.5, 2.0, 8.0, 32.0)]
        assert ks == sorted(ks, reverse=True)
        assert ks[0] == 80
        assert ks[-1] < 10

    def test_batch(self):
        H = random_lower(30, gen(), batch=(3,))
        H[1] = 0.1 * H[1]
        basis = cb.decompose(H, tol=1.0)
        for b in range(3):
            alone = cb.decompose(H[b], tol=1.0)
            assert int(basis.ranks[b]) == alone.k
            assert torch.equal(basis.to_dense()[b], alone.to_dense())

    def test_no_gradient_within_a_tolerance(self):
        H = random_lower(8, gen()).requires_grad_()
        assert not cb.decompose(H, tol=0.3).segment_kernels.requires_grad


class TestInputErrors:
    @pytest.mark.parametrize(
        ("H", "options", "message"),
        [
            (torch.ones(3, 3), {}, r"not lower triangular: entry \[0, 1\] is 1.0.*tril"),
            (torch.ones(3, 4).tril(), {}, r"shape \(3, 4\)"),
            (torch.ones(3), {}, r"shape \(3,\)"),
            (torch.ones(0, 0), {}, "n >= 1"),
            (torch.ones(3, 3, dtype=torch.int64).tril(), {}, "float"),
            ("H", {}, "torch.Tensor"),
            (torch.full((2, 2), float("nan")).tril(), {}, "NaN"),
            (torch.full((2, 2), float("inf")).tril(), {}, "Inf"),
            (torch.eye(2), {"tol": -1.0}, "tol=-1.0"),
            (torch.eye(2), {"tol": float("nan")}, "tol=nan"),
            (torch.eye(2), {"tol": float("inf")}, "tol=inf"),
            (torch.eye(2), {"tol": "small"}, "tol='small'"),
            (torch.eye(2), {"tol": True}, "tol=True"),
        ],
    )
    def test_message_says_what_is_wrong(self, H, options, message):
        with pytest.raises(cb.InputError, match=message):
            cb.decompose(H, **options)


def test_random_starts_are_what_they_say():
    for n, k in ((1, 1), (5, 5), (50, 7)):
        starts = random_starts(n, k, gen())
        assert len(starts) == k
        assert starts[0] == 0
        assert (starts.diff() > 0).all()
