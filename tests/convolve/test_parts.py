"""The parts of products: lengths, row sums, blocks of rows, lost rows, the ladder of rescue."""

import pytest
import reference
import torch
from factories import random_basis

from convbasis.convolve import evaluate_safely, fft_product, segment_product
from convbasis.convolve.guard import lost_rows, reached_rows
from convbasis.convolve.lengths import fast_length
from convbasis.convolve.reference import _BLOCK_ENTRIES, product_rows, row_blocks
from convbasis.convolve.segments import column_segments, lag_mask, segment_stops
from convbasis.convolve.sums import row_sums


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_fast_lengths_are_long_enough_smooth_and_close():
    for n in range(1, 3000):
        length = fast_length(n)
        assert n <= length <= max(2, 1.25 * n + 1)
        odd = length
        while odd % 2 == 0:
            odd //= 2
        assert odd in (1, 3, 5, 7, 9, 15)
        assert length <= 2 or length % 2 == 0


def test_geometry_of_segments():
    starts = torch.tensor([[0, 2, 5], [1, 6, 6]])
    assert segment_stops(starts, 6).tolist() == [[2, 5, 6], [6, 6, 6]]
    assert column_segments(starts, 6).tolist() == [[0, 0, 1, 1, 1, 2], [-1, 0, 0, 0, 0, 0]]
    assert lag_mask(starts, 6).sum(-1).tolist() == [[6, 4, 1], [5, 0, 0]]
    assert lag_mask(starts, 6, torch.tensor([[4]])).sum(-1).tolist() == [[4, 2, 0], [3, 0, 0]]


@pytest.mark.parametrize("transpose", [False, True])
def test_blocks_of_rows_stay_within_their_memory(transpose):
    n = 3000
    kernels, starts = random_basis(n, 3, gen())
    rows = torch.arange(n).expand(2, n)
    kernels, starts = kernels.expand(2, 3, n), starts.expand(2, 3)
    seen = total = 0
    for _, block, columns, entries in row_blocks(kernels, starts, rows, 0.0, transpose=transpose):
        assert entries.numel() <= _BLOCK_ENTRIES
        assert entries.dtype == torch.float64
        assert entries.shape[-1] == columns.stop - columns.start
        seen += block.stop - block.start
        total += entries.numel()
    assert seen == n
    assert total < 1.1 * n * n  # of the two triangles alone


def test_many_matrices_are_taken_in_groups(monkeypatch):
    monkeypatch.setattr("convbasis.convolve.reference._BLOCK_ENTRIES", 200)
    parts = [random_basis(50, 4, gen(s)) for s in range(9)]
    kernels, starts = torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
    x = torch.randn(9, 50, 2, dtype=torch.float64)
    dense = torch.stack([reference.dense_matrix(*p) for p in parts])
    rows = torch.arange(50).expand(9, 50)
    for transpose, matrix in ((False, dense), (True, dense.mT)):
        result = product_rows(kernels, starts, x, rows, transpose=transpose)
        assert (result - matrix @ x).abs().max() < 1e-12


def test_row_sums_in_groups_of_kernels(monkeypatch):
    kernels, starts = random_basis(90, 7, gen())
    expected = reference.dense_matrix(kernels, starts).sum(-1)
    monkeypatch.setattr("convbasis.convolve.sums._BLOCK_ENTRIES", 1)
    sums = row_sums(kernels[None, None], starts[None, None], segment_stops(starts, 90)[None, None])
    assert (sums[0, 0] - expected).abs().max() < 1e-12


def test_row_sums_can_end_before_their_segments():
    kernels, starts = random_basis(40, 3, gen())
    stops = starts + 1
    sums = row_sums(kernels[None, None], starts[None, None], stops[None, None])[0, 0]
    expected = reference.dense_matrix(kernels, starts)[:, starts].sum(-1)
    assert (sums - expected).abs().max() < 1e-12


@pytest.mark.parametrize("transpose", [False, True])
def test_estimated_noise_covers_the_true_error(transpose):
    for seed in range(5):
        kernels, starts = random_basis(900, 6, gen(seed))
        x = torch.randn(900, 8, generator=gen(seed), dtype=torch.float64)
        x[850:] *= 10.0 ** (seed - 1)
        single = kernels.float(), x.float()
        product, noise = fft_product(
            single[0][None, None],
            starts[None, None],
            single[1][None, None],
            1 << 28,
            transpose=transpose,
        )
        dense = reference.dense_matrix(single[0], starts)
        exact = (dense.T if transpose else dense) @ single[1].double()
        error = (product[0, 0].double() - exact).norm(dim=-1)
        assert (error <= 1.5 * noise[0, 0]).all()
        # Not vacuous: an estimate that is far too large would send everything to direct evaluation.
        assert error.square().mean().sqrt() >= 0.02 * noise[0, 0].median()


def test_lost_rows():
    product = torch.ones(1, 1, 4, 2)
    product[0, 0, 1] = 1e-9
    product[0, 0, 2] = float("nan")
    product[0, 0, 3] = 0.0
    noise = torch.full((1, 1, 1), 1e-6, dtype=torch.float64)
    reached = torch.tensor([True, True, True, False])[None, None]
    norms = product.double().norm(dim=-1)
    options = {"tolerance": 1e-5}
    found = lost_rows(norms, noise, reached, None, worked=torch.float32, **options)
    assert found.tolist() == [[[False, True, True, False]]]
    # In float64 a row whose terms cancel is kept: a direct sum would round as much.
    large = lambda: torch.tensor([1.0, 1e9, 1e9, 1.0], dtype=torch.float64)[None, None]  # noqa: E731
    kept = lost_rows(norms, noise, reached, large, worked=torch.float64, **options)
    assert kept.tolist() == [[[False, False, True, False]]]


def test_reached_rows():
    x = torch.zeros(1, 1, 5, 2)
    x[0, 0, 2, 1] = 1.0
    assert reached_rows(torch.tensor([[[0]]]), x).tolist() == [[[False, False, True, True, True]]]
    assert reached_rows(torch.tensor([[[3]]]), x).tolist() == [[[False] * 5]]
    backward = reached_rows(torch.tensor([[[1]]]), x, transpose=True)
    assert backward.tolist() == [[[False, True, True, False, False]]]


class TestLadder:
    """Rows, then float64, then everything: each step only where the one before was not enough."""

    n = 100

    def run(self, lost32, lost64, dtype=torch.float32):
        calls = []

        def transform(chosen, work):
            lost = (lost32 if work == torch.float32 else lost64).clone()
            lost = lost if chosen is None else lost[chosen]
            calls.append((None if chosen is None else chosen.tolist(), work))
            return (
                torch.full((*lost.shape, 1), 32.0 if work == torch.float32 else 64.0, dtype=work),
            ), lost

        def direct(chosen, rows):
            return (torch.full((*rows.shape, 1), 1.0, dtype=dtype),)

        (result,), rescue = evaluate_safely(transform, direct, dtype)
        assert result.dtype == dtype
        return result[..., 0], rescue, calls

    def lost(self, *counts):
        lost = torch.zeros(len(counts), self.n, dtype=torch.bool)
        for i, count in enumerate(counts):
            lost[i, :count] = True
        return lost

    def test_nothing_lost(self):
        result, rescue, calls = self.run(self.lost(0, 0), self.lost(0, 0))
        assert (result == 32).all()
        assert tuple(rescue) == (0, 0, 0)
        assert len(calls) == 1

    def test_each_matrix_takes_its_own_way(self):
        result, rescue, calls = self.run(self.lost(1, 2, 3, 50, 0), self.lost(0, 0, 0, 40, 0))
        assert tuple(rescue) == (3, 2, 1)
        assert calls[1] == ([2, 3], torch.float64)
        assert result[0].tolist() == [1.0] + [32.0] * 99
        assert result[1].tolist() == [1.0] * 2 + [32.0] * 98
        assert (result[2] == 64).all()
        assert (result[3] == 1).all()
        assert (result[4] == 32).all()

    def test_few_rows_left_after_float64(self):
        result, rescue, _ = self.run(self.lost(90), self.lost(2))
        assert tuple(rescue) == (2, 1, 0)
        assert result[0].tolist() == [1.0] * 2 + [64.0] * 98

    def test_float64_has_no_second_try(self):
        _, rescue, calls = self.run(None, self.lost(3), torch.float64)
        assert tuple(rescue) == (0, 0, 1)
        assert len(calls) == 1


def test_shared_values_are_not_repeated_but_give_the_same():
    parts = [random_basis(300, 4, gen(s), torch.float32) for s in range(3)]
    kernels = torch.stack([p[0] for p in parts])[None]
    starts = torch.stack([p[1] for p in parts])[None]
    x = torch.randn(1, 1, 300, 5)
    for transpose in (False, True):
        for backend in ("fft", "reference"):
            together, _ = segment_product(kernels, starts, x, backend=backend, transpose=transpose)
            for r in range(3):
                dense = reference.dense_matrix(*parts[r])
                exact = (dense.T if transpose else dense) @ x[0, 0].double()
                assert (together[0, r] - exact).norm() / exact.norm() < 1e-6
