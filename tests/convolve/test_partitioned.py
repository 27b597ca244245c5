"""Partitioned convolution: partitions, windows, products, their noise, and memory used again."""

import threading

import pytest
import reference
import torch
from factories import random_basis, random_starts
from hypothesis import given, settings
from hypothesis import strategies as st

from convbasis.convolve import (
    KernelWindows,
    LogitWindows,
    Partition,
    Sizes,
    partitioned_blocks,
    row_noise,
)
from convbasis.convolve.gradients import partitioned_transposed
from convbasis.convolve.spectra import WindowSpectra, column_step
from convbasis.workspace import take


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def multiply(kernels, starts, x, sizes, weights=None, max_bytes=1 << 28):
    """Return the product, that with the weights, and the expected errors."""
    partition = Partition(starts.tolist(), len(x), sizes)
    product = torch.full_like(x, torch.nan)
    weighed = x.new_full((len(x),), torch.nan)
    energy = torch.zeros(len(x), 2, dtype=x.dtype)
    windows = KernelWindows(kernels, partition)
    for block in partitioned_blocks(windows, partition, x, weights, max_bytes):
        rows, columns = slice(*block.rows), slice(*block.columns)
        product[rows, columns] = block.values.mT.flatten(0, 1)
        energy[rows] += block.energy.repeat_interleave(block.values.shape[-1], dim=0)
        if block.weights is not None:
            weighed[rows] = block.weights.flatten()
        assert block.shifts == [0.0] * len(block.values)
    return product, weighed, row_noise(energy, sizes.transform, x.dtype)


class TestPartition:
    def test_pieces_and_blocks(self):
        partition = Partition([0, 3, 4], 11, Sizes(4, 8))
        assert [(p.low, p.high, p.segment, p.level) for p in partition.pieces] == [
            (0, 3, 0, 0),
            (3, 4, 1, 0),
            (4, 8, 2, 0),
            (8, 11, 2, 1),
        ]
        assert partition.levels == 2
        assert partition.blocks == 3
        assert [partition.rows(i) for i in range(3)] == [(0, 4), (4, 8), (8, 11)]
        assert partition.positions == [[0, 1, 2], [3]]
        assert partition.segments == [[0, 1, 2], [2]]
        assert [partition.pieces_before(row) for row in (0, 1, 4, 5, 11)] == [0, 1, 2, 3, 4]
        assert [partition.segments_before(row) for row in (0, 4, 5)] == [0, 2, 3]

    def test_unused_starts_count_for_nothing(self):
        assert Partition([0, 5, 9, 9], 9, Sizes(5, 16)).starts == [0, 5]
        empty = Partition([9, 9], 9, Sizes(5, 16))
        assert empty.pieces == []

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 300), st.integers(1, 12), st.integers(1, 70), st.integers(0, 2**31))
    def test_pieces_tile_the_columns(self, n, k, piece, seed):
        starts = random_starts(n, min(k, n), gen(seed)).tolist()
        partition = Partition(starts, n, Sizes(piece, 2 * piece))
        position = 0
        for part in partition.pieces:
            assert part.low == position
            assert 0 < part.high - part.low <= piece
            assert part.low == starts[part.segment] + part.level * piece
            position = part.high
        assert position == n


class TestProducts:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(
        "sizes", [Sizes(1, 2), Sizes(4, 8), Sizes(16, 32), Sizes(128, 256)], ids=str
    )
    @pytest.mark.parametrize("n", [1, 2, 3, 17, 97, 256, 257])
    def test_equals_the_dense_product(self, n, sizes, dtype):
        for k in sorted({1, min(n, 3), min(n, 20)}):
            kernels, starts = random_basis(n, k, gen(k), dtype)
            x = torch.randn(n, 5, generator=gen(), dtype=torch.float64).to(dtype)
            weights = torch.rand(n, generator=gen(), dtype=torch.float64).to(dtype)
            dense = reference.dense_matrix(kernels, starts)
            limit = 1e-12 if dtype == torch.float64 else 1e-5
            for _ in range(2):
                product, weighed, _ = multiply(kernels, starts, x, sizes, weights)
                exact = dense @ x.double()
                assert (product - exact).norm() <= limit * exact.norm()
                exact = dense @ weights.double()
                assert (weighed - exact).norm() <= limit * exact.norm()

    def test_blocks_longer_than_pieces(self):
        for longest, transform in ((7, 16), (20, 96), (20, 1024)):
            starts = torch.arange(0, 200, longest)
            kernels = torch.randn(len(starts), 200, generator=gen(), dtype=torch.float64)
            kernels *= torch.arange(200) < (200 - starts)[:, None]
            x = torch.randn(200, 3, generator=gen(), dtype=torch.float64)
            product, _, _ = multiply(kernels, starts, x, Sizes(longest, transform))
            exact = reference.dense_matrix(kernels, starts) @ x
            assert (product - exact).norm() <= 1e-13 * exact.norm()

    def test_columns_before_the_first_start_are_zero(self):
        starts = torch.tensor([100, 130])
        kernels = torch.randn(2, 300, generator=gen(), dtype=torch.float64)
        kernels *= torch.arange(300) < (300 - starts)[:, None]
        x = torch.randn(300, 3, generator=gen(), dtype=torch.float64)
        dense = reference.dense_matrix(kernels, starts)
        product, _, _ = multiply(kernels, starts, x, Sizes(8, 16))
        assert (product[:96] == 0).all()  # blocks that see no segment
        assert product[96:100].abs().max() <= 1e-14
        assert (product - dense @ x).norm() <= 1e-13 * product.norm()

    def test_a_small_budget_splits_the_columns_and_changes_nothing_else(self):
        kernels, starts = random_basis(500, 6, gen())
        x = torch.randn(500, 9, generator=gen(), dtype=torch.float64)
        weights = torch.ones(500, dtype=torch.float64)
        sizes = Sizes(64, 128)
        partition = Partition(starts.tolist(), 500, sizes)
        pieces, bins = len(partition.pieces), sizes.bins
        assert column_step(pieces, bins, 10, 8, 1) == 1
        assert column_step(pieces, bins, 10, 8, 1 << 40) == 10
        fitting = 2 * 20 * 8 * 2 * bins * pieces
        assert column_step(pieces, bins, 100, 8, fitting) == 16
        whole = multiply(kernels, starts, x, sizes, weights)
        for budget in (1, 100_000):
            parts = multiply(kernels, starts, x, sizes, weights, max_bytes=budget)
            for one, other in zip(whole[:2], parts[:2], strict=True):
                assert (one - other).norm() <= 1e-14 * one.norm()

    def test_groups_of_blocks_stay_within_a_quarter_of_the_budget(self):
        kernels, starts = random_basis(3000, 40, gen())
        sizes = Sizes(32, 64)
        partition = Partition(starts.tolist(), 3000, sizes)
        sizes_seen = set()
        for budget in (1, 1 << 20, 8 << 20):
            windows = KernelWindows(kernels, partition)
            spectra = WindowSpectra(windows, partition, 5, torch.complex128, True, budget)
            for group in spectra.groups():
                blocks = len(group.squares)
                of_block = group.spectra[0].numel() * 16
                assert blocks == 1 or blocks * of_block <= 1.3 * budget / 4
                sizes_seen.add(blocks)
        assert len(sizes_seen) > 2

    def test_groups_and_chunks_of_any_size_give_the_same(self, monkeypatch):
        kernels, starts = random_basis(700, 11, gen())
        x = torch.randn(700, 4, generator=gen(), dtype=torch.float64)
        exact = reference.dense_matrix(kernels, starts) @ x
        for group in (1, 30_000, 1 << 22):
            for chunk in (1, 5_000, 1 << 20):
                monkeypatch.setattr("convbasis.convolve.spectra._GROUP_BYTES", group)
                monkeypatch.setattr("convbasis.convolve.spectra.CHUNK_BYTES", chunk)
                for sizes in (Sizes(16, 32), Sizes(int(exact.shape[0]), 2048)):
                    product, _, _ = multiply(kernels, starts, x, sizes)
                    assert (product - exact).norm() <= 1e-13 * exact.norm()

    @pytest.mark.parametrize("sizes", [Sizes(8, 16), Sizes(64, 128), Sizes(400, 1024)], ids=str)
    def test_transposed(self, sizes):
        for k in (1, 5, 30):
            kernels, starts = random_basis(333, k, gen(k))
            x = torch.randn(333, 4, generator=gen(), dtype=torch.float64)
            partition = Partition(starts.tolist(), 333, sizes)
            exact = reference.dense_matrix(kernels, starts).T @ x
            for budget in (1, 1 << 28):
                windows = KernelWindows(kernels, partition)
                product, noise = partitioned_transposed(windows, partition, x, budget)
                assert (product - exact).norm() <= 1e-13 * exact.norm()
                assert (noise > 0).all()

    @pytest.mark.parametrize("transpose", [False, True])
    def test_estimated_noise_covers_the_true_error(self, transpose):
        for seed in range(5):
            kernels, starts = random_basis(900, 6, gen(seed), torch.float32)
            x = torch.randn(900, 8, generator=gen(seed))
            x[850:] *= 10.0 ** (seed - 1)
            sizes = Sizes(64, 128)
            dense = reference.dense_matrix(kernels, starts)
            if transpose:
                partition = Partition(starts.tolist(), 900, sizes)
                windows = KernelWindows(kernels, partition)
                product, noise = partitioned_transposed(windows, partition, x, 1 << 28)
                exact = dense.T @ x.double()
            else:
                product, _, both = multiply(kernels, starts, x, sizes)
                noise, exact = both[:, 0], dense @ x.double()
            error = (product.double() - exact).norm(dim=-1)
            assert (error <= 1.5 * noise).all()
            # Not vacuous: an estimate that is far too large would send everything to direct evaluation.
            assert error.square().mean().sqrt() >= 0.02 * noise.median()


class TestLogitWindows:
    def test_rows_are_scaled_by_block(self):
        n, sizes = 256, Sizes(16, 32)
        query = torch.ones(n, 1, dtype=torch.float64)
        query[100:, 0] = 300.0
        query[200:, 0] = -300.0
        partition = Partition(list(range(0, n, 16)), n, sizes)
        windows = LogitWindows(query, torch.ones(16, 1, dtype=torch.float64), partition)
        seen = []
        for block in range(partition.blocks):
            count = partition.segments_before(partition.rows(block)[1])
            window, shift = windows.next(block, 1, count)
            assert 0 < float(window.max()) <= 4e6
            seen.append(shift)
        assert seen[0] == 0.0
        assert 300.0 in seen
        assert seen[-1] == -300.0

    def test_blocks_at_once_are_blocks_one_by_one(self):
        n, sizes = 300, Sizes(20, 64)
        query = torch.randn(n, 3, generator=gen(), dtype=torch.float64)
        starts = list(range(0, n, 20))
        keys = torch.randn(len(starts), 3, generator=gen(1), dtype=torch.float64)
        partition = Partition(starts, n, sizes)
        single = LogitWindows(query, keys, partition)
        one_by_one = []
        for block in range(partition.blocks):
            count = partition.segments_before(partition.rows(block)[1])
            one_by_one.append(single.next(block, 1, count)[0][:, 0].clone())
        several = LogitWindows(query, keys, partition)
        together, _ = several.next(0, partition.blocks, len(starts))
        for block, window in enumerate(one_by_one):
            assert (together[: len(window), block] - window).abs().max() <= 1e-12 * window.max()
            assert (together[len(window) :, block] == 0).all()


class TestWorkspace:
    def take(self, name="test", shape=(3, 4)):
        return take(name, shape, torch.float32, torch.device("cpu"))

    def test_the_same_memory_comes_again(self):
        first = self.take()
        assert self.take(shape=(2, 3)).data_ptr() == first.data_ptr()
        assert self.take("other").data_ptr() != first.data_ptr()
        assert take("test", (2,), torch.complex128, torch.device("cpu")).data_ptr() == first.data_ptr()

    def test_threads_do_not_share(self):
        mine, theirs = self.take(), []
        thread = threading.Thread(target=lambda: theirs.append(self.take()))
        thread.start()
        thread.join()
        assert theirs[0].data_ptr() != mine.data_ptr()

    def test_large_memory_is_not_kept(self, monkeypatch):
        monkeypatch.setattr("convbasis.workspace._LARGEST_KEPT", 40)
        assert self.take(shape=(11,)).data_ptr() != self.take(shape=(11,)).data_ptr()

    def test_memory_taken_in_inference_mode_serves_outside(self):
        with torch.inference_mode():
            self.take("inference").fill_(1.0)
        self.take("inference").fill_(2.0)
