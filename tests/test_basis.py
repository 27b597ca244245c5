"""ConvBasis: what it stores, its views, its products, its files."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import reference
import torch
from comparison import assert_close
from factories import random_basis
from hypothesis import given, settings
from safetensors.torch import save_file

import convbasis as cb

SIZES = (1, 2, 3, 5, 17, 64, 97, 255, 256, 257, 1000, 4099)
BACKENDS = ("fft", "reference", "auto")
LIMITS = {torch.float64: (1e-12, 1e-9), torch.float32: (1e-6, 1e-4)}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def ranks(n):
    return sorted({1, min(n, 2), min(n, 5), min(n, 40)})


class TestProducts:
    @pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("n", SIZES)
    def test_equals_the_dense_product(self, n, backend, dtype, transpose):
        whole, row = LIMITS[dtype]
        for k in ranks(n) if n < 4099 or backend != "reference" else (5,):
            kernels, starts = random_basis(n, k, gen(n + k), dtype)
            basis = cb.ConvBasis(kernels, starts)
            x = torch.randn(n, 3, generator=gen(1), dtype=torch.float64).to(dtype)
            dense = reference.dense_matrix(kernels, starts)
            if transpose:
                basis, dense = basis.mT, dense.T
            magnitude = (dense.abs() @ x.double().abs()).norm(dim=-1)
            for _ in range(2):  # a later call must not see anything of an earlier one
                result = basis.matmul(x, backend=backend)
                assert result.dtype == dtype
                assert_close(dense @ x.double(), result, whole=whole, row=row, row_scale=magnitude)

    @pytest.mark.parametrize("n", [17, 64, 97, 256])
    def test_every_k(self, n):
        for k in range(1, min(n, 40) + 1):
            kernels, starts = random_basis(n, k, gen(n + k))
            x = torch.randn(n, 2, generator=gen(1), dtype=torch.float64)
            dense = reference.dense_matrix(kernels, starts)
            magnitude = (dense.abs() @ x.abs()).norm(dim=-1)
            for dtype, (whole, row) in LIMITS.items():
                result = cb.ConvBasis(kernels.to(dtype), starts).matmul(x.to(dtype), backend="fft")
                exact = reference.dense_matrix(kernels.to(dtype), starts) @ x.to(dtype).double()
                assert_close(exact, result, whole=whole, row=row, row_scale=magnitude)

    @pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
    @pytest.mark.parametrize("dtype", LIMITS, ids=str)
    def test_small_rows_beside_large_ones_keep_their_digits(self, dtype, transpose):
        n, k = 1500, 6
        kernels, starts = random_basis(n, k, gen(), torch.float64)
        kernels *= torch.logspace(-9, 0, k, dtype=torch.float64)[:, None]
        x = torch.randn(n, 2, generator=gen(1), dtype=torch.float64)
        x[slice(0, 100) if transpose else slice(-100, n)] *= 1e6
        kernels, x = kernels.to(dtype), x.to(dtype)
        dense = reference.dense_matrix(kernels, starts)
        basis = cb.ConvBasis(kernels, starts)
        if transpose:
            basis, dense = basis.mT, dense.T
        result = basis.matmul(x, backend="fft")
        mended = cb.last_dispatch()
        assert mended.rows_recomputed + mended.heads_float64 + mended.heads_direct > 0
        assert_close(dense @ x.double(), result, whole=1e-6, row=5e-5)

    def test_columns_that_cancel_cost_no_direct_evaluation(self):
        n = 20_000
        x = ((-1.0) ** torch.arange(n, dtype=torch.float64))[:, None].float()
        basis = cb.ConvBasis(torch.ones(1, n), [0])
        result = basis.matmul(x, backend="fft")
        assert cb.last_dispatch().heads_float64 == 1
        assert cb.last_dispatch().heads_direct == 0
        expected = (torch.arange(n)[:, None] % 2 == 0).float()
        assert (result - expected).abs().max() < 1e-6

    def test_rows_that_see_only_zeros_are_exactly_zero(self):
        kernels, starts = random_basis(600, 4, gen(), torch.float32)
        x = torch.zeros(600, 2)
        x[400:] = torch.randn(200, 2)
        basis = cb.ConvBasis(kernels, starts)
        assert (basis.matmul(x, backend="fft")[:400] == 0).all()
        assert cb.last_dispatch().heads_direct == 0
        assert (basis.mT.matmul(x.flip(0), backend="fft")[200:] == 0).all()

    @pytest.mark.parametrize("n", [3, 129, 257, 300])
    def test_segments_without_columns_give_zero(self, n):
        basis = cb.ConvBasis(torch.zeros(2, 1, n), torch.full((2, 1), n))
        for operator in (basis, basis.mT):
            assert (operator.matmul(torch.ones(n, 2), backend="fft") == 0).all()
        assert basis.ranks.tolist() == [0, 0]

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_empty_batches_and_columns(self, backend):
        basis = cb.ConvBasis(torch.zeros(0, 2, 200), [0, 5])
        assert basis.matmul(torch.ones(200, 3), backend=backend).shape == (0, 200, 3)
        assert basis.row_sum().shape == (0, 200)
        single = cb.ConvBasis(torch.ones(2, 200), [0, 5])
        assert single.matmul(torch.ones(200, 0), backend=backend).shape == (200, 0)

    def test_zero_matrix(self):
        basis = cb.ConvBasis(torch.zeros(0, 300), torch.zeros(0, dtype=torch.int64))
        for backend in BACKENDS:
            assert (basis.matmul(torch.ones(300, 2), backend=backend) == 0).all()
            assert (basis.mT.matmul(torch.ones(300, 2), backend=backend) == 0).all()
        assert (basis.row_sum() == 0).all()
        assert (basis.to_dense() == 0).all()
        assert basis.k == 0

    def test_batches_broadcast(self):
        parts = [random_basis(200, k, gen(k)) for k in (2, 2, 2)]
        kernels = torch.stack([p[0] for p in parts])
        starts = torch.stack([p[1] for p in parts])
        basis = cb.ConvBasis(kernels, starts)
        dense = torch.stack([reference.dense_matrix(*p) for p in parts])
        x = torch.randn(4, 1, 200, 3, dtype=torch.float64)
        assert_close(dense @ x, basis @ x, whole=1e-12, row=1e-9)
        assert_close(dense.mT @ x, basis.mT @ x, whole=1e-12, row=1e-9)
        vector = torch.randn(200, dtype=torch.float64)
        assert_close(dense @ vector, basis @ vector, whole=1e-12, row=1e-9)
        single = cb.ConvBasis(*parts[0])
        assert_close(dense[0] @ x, single @ x, whole=1e-12, row=1e-9)

    def test_a_small_memory_budget_changes_nothing(self):
        kernels, starts = random_basis(700, 5, gen(), torch.float32)
        basis = cb.ConvBasis(kernels.expand(3, 5, 700), starts)
        x = torch.randn(3, 700, 4)
        for operator in (basis, basis.mT):
            one = operator.matmul(x, backend="fft", max_bytes=1)
            assert_close(operator.matmul(x, backend="fft"), one, whole=1e-6, row=1e-5)

    def test_linearity(self):
        kernels, starts = random_basis(300, 7, gen())
        basis = cb.ConvBasis(kernels, starts)
        x, y = torch.randn(2, 300, 3, dtype=torch.float64)
        assert_close(2 * (basis @ x) + basis @ y, basis @ (2 * x + y), whole=1e-12, row=1e-9)

    def test_adjoint_identity(self):
        kernels, starts = random_basis(333, 9, gen())
        basis = cb.ConvBasis(kernels, starts)
        x, y = torch.randn(2, 333, dtype=torch.float64)
        assert float((basis @ x) @ y) == pytest.approx(float(x @ (basis.mT @ y)), rel=1e-11)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_types_are_computed_in_float32(self, dtype):
        kernels, starts = random_basis(257, 4, gen(), dtype)
        x = torch.randn(257, 2).to(dtype)
        dense = reference.dense_matrix(kernels, starts)
        result = cb.ConvBasis(kernels, starts) @ x
        assert result.dtype == dtype
        exact = dense @ x.double()
        rounding = (exact.to(dtype).double() - exact).norm() / exact.norm()
        assert (result.double() - exact).norm() / exact.norm() < 1.1 * rounding + 1e-6

    def test_scipy_agrees_for_one_segment(self):
        scipy_linalg = pytest.importorskip("scipy.linalg")
        kernel = torch.randn(501, dtype=torch.float64)
        x = torch.randn(501, dtype=torch.float64)
        row = torch.zeros(501, dtype=torch.float64)
        expected = torch.from_numpy(
            scipy_linalg.matmul_toeplitz((kernel.numpy(), row.numpy()), x.numpy())
        )
        assert torch.allclose(cb.ConvBasis(kernel[None], [0]) @ x, expected, atol=1e-11)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
    def test_property_any_shape(self, n, k, seed, transpose):
        kernels, starts = random_basis(n, min(n, k), gen(seed))
        x = torch.randn(n, 2, generator=gen(seed), dtype=torch.float64)
        dense = reference.dense_matrix(kernels, starts)
        basis = cb.ConvBasis(kernels, starts)
        if transpose:
            basis, dense = basis.mT, dense.T
        assert_close(dense @ x, basis.matmul(x, backend="fft"), whole=1e-12, row=1e-7)

    def test_gradients(self):
        kernels, starts = random_basis(12, 3, gen())
        kernels.requires_grad_()
        x = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)

        def product(kernels, x):
            basis = cb.ConvBasis(kernels, starts)
            return basis.matmul(x, backend="fft"), basis.mT.matmul(x, backend="fft")

        assert torch.autograd.gradcheck(product, (kernels, x))


class TestViews:
    def test_attributes(self):
        kernels, starts = random_basis(20, 3, gen())
        basis = cb.ConvBasis(kernels, starts)
        assert (basis.k, basis.n, basis.shape) == (3, 20, (20, 20))
        assert basis.dtype == torch.float64
        assert basis.device == torch.device("cpu")
        assert basis.starts.tolist() == starts.tolist()
        assert basis.lengths.tolist() == [20 - s for s in starts.tolist()]
        assert int(basis.ranks) == 3
        assert basis.mT.mT is basis
        assert basis.mT.shape == (20, 20)
        assert (basis.mT.dtype, basis.mT.device) == (basis.dtype, basis.device)
        assert torch.equal(basis.mT.to_dense(), basis.to_dense().T)

    def test_dense_matches_both_definitions(self):
        kernels, starts = random_basis(37, 6, gen())
        basis = cb.ConvBasis(kernels, starts)
        assert torch.equal(basis.to_dense(), reference.dense_matrix(kernels, starts))
        telescoped = reference.telescoped_matrix(basis.kernels, starts)
        assert (telescoped - basis.to_dense()).abs().max() < 1e-14

    def test_telescoped_round_trip(self):
        kernels = torch.randn(4, 30, dtype=torch.float64)
        starts = torch.tensor([0, 3, 11, 29])
        basis = cb.ConvBasis.from_telescoped(kernels, starts)
        assert (basis.to_dense() - reference.telescoped_matrix(kernels, starts)).abs().max() < 1e-14
        inside = torch.arange(30) < (30 - starts)[:, None]
        assert (basis.kernels - kernels * inside).abs().max() < 1e-14

    def test_what_lies_outside_the_matrix_has_no_effect(self):
        kernels, starts = random_basis(10, 2, gen())
        spoiled = kernels.clone()
        spoiled[1, 10 - int(starts[1]) :] = float("nan")
        basis = cb.ConvBasis(spoiled, starts)
        assert torch.equal(basis.segment_kernels, kernels)

    def test_columns_and_row_sums(self):
        kernels, starts = random_basis(45, 5, gen())
        basis = cb.ConvBasis(kernels, starts)
        dense = reference.dense_matrix(kernels, starts)
        for j in (0, 1, 20, 44):
            assert torch.equal(basis.column(j), dense[:, j])
        assert (basis.row_sum() - dense.sum(-1)).abs().max() < 1e-12

    def test_columns_of_a_batch(self):
        parts = [random_basis(25, 3, gen(s)) for s in range(2)]
        basis = cb.ConvBasis(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))
        for b in range(2):
            assert torch.equal(basis.column(7)[b], reference.dense_matrix(*parts[b])[:, 7])

    def test_row_sums_of_positive_kernels_lose_nothing(self):
        n = 700
        kernels = torch.exp(torch.rand(3, n, dtype=torch.float64) * 60 - 60)
        starts = torch.tensor([0, 100, 500])
        basis = cb.ConvBasis(kernels, starts)
        expected = reference.dense_matrix(kernels, starts).sum(-1)
        assert ((basis.row_sum() - expected) / expected).abs().max() < 1e-13

    @pytest.mark.parametrize("starts", [[0, 4, 9], [3, 4, 9]])
    def test_exp(self, starts):
        kernels = torch.randn(3, 12, dtype=torch.float64)
        basis = cb.ConvBasis(kernels, starts).exp()
        expected = reference.dense_matrix(kernels, torch.tensor(starts)).exp().tril()
        assert basis.k == 3 + (starts[0] > 0)
        assert torch.allclose(basis.to_dense(), expected, rtol=1e-14)

    def test_exp_of_a_batch_of_unequal_bases(self):
        H = torch.zeros(3, 8, 8, dtype=torch.float64)
        H[1, :, 0] = 2.0
        H[2, 5:, 4] = 1.0
        basis = cb.decompose(H).exp()
        assert torch.allclose(basis.to_dense(), H.exp().tril())
        assert basis.ranks.tolist() == [1, 2, 3]

    def test_exp_that_overflows_is_refused(self):
        with pytest.raises(cb.InputError, match="exp of the segment kernels"):
            cb.ConvBasis(torch.full((1, 3), 100.0), [0]).exp()

    def test_exp_of_the_zero_matrix_is_one_segment_of_ones(self):
        basis = cb.decompose(torch.zeros(4, 4)).exp()
        assert basis.k == 1
        assert torch.equal(basis.to_dense(), torch.ones(4, 4).tril())

    def test_to(self):
        basis = cb.ConvBasis(*random_basis(9, 2, gen()))
        other = basis.to(torch.float32)
        assert other.dtype == torch.float32
        assert other.starts.dtype == torch.int64
        assert torch.equal(other.to_dense(), basis.to_dense().float())
        with pytest.raises(cb.InputError, match="dtype"):
            basis.to(torch.int64)
        with pytest.raises(cb.InputError, match="converted kernels"):
            cb.ConvBasis(torch.full((1, 3), 1e6), [0]).to(torch.float16)

    def test_repr(self):
        basis = cb.ConvBasis(torch.zeros(3, 9), [0, 2, 5])
        assert repr(basis) == "ConvBasis(k=3, n=9, starts=[0, 2, 5], dtype=torch.float32)"
        assert repr(basis.mT).endswith(".mT")
        many = cb.ConvBasis(torch.zeros(2, 8, 9), list(range(8)))
        assert "k=8, n=9" in repr(many)
        assert "[0, 1, 2, 3, 4, 5, ...]" in repr(many)
        assert "batch=(2,)" in repr(many)


class TestInputErrors:
    @pytest.mark.parametrize(
        ("kernels", "starts", "message"),
        [
            (torch.zeros(2, 5), [0, 0], "increase strictly"),
            (torch.zeros(2, 5), [3, 1], "increase strictly"),
            (torch.zeros(2, 5), [0, 6], "0..4"),
            (torch.zeros(2, 5), [-1, 2], "0..4"),
            (torch.zeros(2, 5), [0, 1, 2], "3 starts but 2"),
            (torch.zeros(2, 5), [0.0, 1.0], "integers"),
            (torch.zeros(2, 5), ["a", "b"], "integers"),
            (torch.zeros(2, 5), 3, "tensor or list"),
            (torch.zeros(2, 5), torch.tensor(3), "no dimension"),
            (torch.zeros(5), [0], "\\(\\.\\.\\., k, n\\)"),
            (torch.zeros(1, 0), [0], "n >= 1"),
            (torch.zeros(1, 5, dtype=torch.int64), [0], "float"),
            (torch.zeros(1, 5, dtype=torch.complex64), [0], "float"),
            ([[0.0]], [0], "torch.Tensor"),
            (torch.zeros(3, 2, 5), torch.zeros(2, 2, dtype=torch.int64) + torch.arange(2), "batch"),
            (torch.tensor([[1.0, float("nan")]]), [0], "NaN"),
            (torch.tensor([[1.0, float("inf")]]), [0], "Inf"),
        ],
    )
    def test_constructor(self, kernels, starts, message):
        with pytest.raises(cb.InputError, match=message):
            cb.ConvBasis(kernels, starts)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(4, 2), "n = 5"),
            (torch.zeros(()), "n = 5"),
            (torch.zeros(5, 2, dtype=torch.float64), "dtype"),
            (torch.zeros(5, 2, dtype=torch.int64), "float"),
            (torch.full((5, 2), float("nan")), "NaN"),
            (torch.zeros(4, 5, 2), "broadcast"),
            (torch.zeros(5, 2, device="meta"), "device"),
        ],
    )
    def test_product(self, x, message):
        basis = cb.ConvBasis(torch.zeros(3, 1, 5), [0])
        with pytest.raises(cb.InputError, match=message):
            basis @ x

    @pytest.mark.parametrize("bad", [0, -5, "x", 1.5])
    def test_max_bytes(self, bad):
        with pytest.raises(cb.InputError, match="max_bytes"):
            cb.ConvBasis(torch.zeros(1, 5), [0]).matmul(torch.zeros(5), max_bytes=bad)

    def test_unknown_backend_is_named_with_the_known_ones(self):
        with pytest.raises(cb.InputError, match="'auto', 'partitioned', 'direct', 'fft', 'reference'"):
            cb.ConvBasis(torch.zeros(1, 5), [0]).matmul(torch.zeros(5), backend="fast")

    @pytest.mark.parametrize("j", [-1, 5, 1.0, True])
    def test_column(self, j):
        with pytest.raises(cb.InputError, match=r"0\.\.4"):
            cb.ConvBasis(torch.zeros(1, 5), [0]).column(j)

    def test_errors_are_value_errors_too(self):
        with pytest.raises(ValueError, match="increase"):
            cb.ConvBasis(torch.zeros(2, 5), [1, 1])
        assert issubclass(cb.InputError, cb.ConvBasisError)


class TestFiles:
    def basis(self):
        return cb.ConvBasis(*random_basis(40, 3, gen()))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_round_trip(self, tmp_path, dtype):
        basis = self.basis().to(dtype)
        basis.save(tmp_path / "b.safetensors")
        loaded = cb.ConvBasis.load(str(tmp_path / "b.safetensors"))
        assert loaded.dtype == dtype
        assert torch.equal(loaded.segment_kernels, basis.segment_kernels)
        assert torch.equal(loaded.starts, basis.starts)
        assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]

    def test_batch_and_zero_matrix_round_trip(self, tmp_path):
        H = torch.zeros(2, 5, 5)
        cb.decompose(H).save(tmp_path / "zero")
        assert cb.ConvBasis.load(tmp_path / "zero").k == 0
        H[1, 4, 4] = 1.0
        cb.decompose(H).save(tmp_path / "batch")
        assert torch.equal(cb.ConvBasis.load(tmp_path / "batch").to_dense(), H)

    def test_interrupted_save_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "b"
        self.basis().save(path)
        before = path.read_bytes()

        def interrupted(tensors, filename, metadata):
            Path(filename).write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr("safetensors.torch.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cb.ConvBasis(torch.zeros(1, 3), [0]).save(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["b"]

    def test_killed_save_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "b"
        self.basis().save(path)
        before = path.read_bytes()
        script = (
            "import os, sys, torch, convbasis as cb, pathlib\n"
            "pathlib.Path.replace = lambda *a: os._exit(9)\n"
            "cb.ConvBasis(torch.zeros(1, 3), [0]).save(sys.argv[1])\n"
        )
        done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
        assert done.returncode == 9
        assert path.read_bytes() == before

    def test_save_into_a_missing_folder_or_onto_a_folder(self, tmp_path):
        with pytest.raises(cb.MissingPathError, match="no folder"):
            self.basis().save(tmp_path / "no" / "b")
        with pytest.raises(cb.InputError, match="is a folder"):
            self.basis().save(tmp_path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(cb.MissingPathError, match="no file"):
            cb.ConvBasis.load(tmp_path / "nothing")

    @pytest.mark.parametrize(
        "content", [b"", b"\x80\x04K\x01.", b"x" * 1000, struct.pack("<Q", 1 << 60)]
    )
    def test_damaged_file(self, tmp_path, content):
        path = tmp_path / "b"
        path.write_bytes(content)
        with pytest.raises(cb.FileFormatError, match="damaged"):
            cb.ConvBasis.load(path)

    def test_truncated_file(self, tmp_path):
        path = tmp_path / "b"
        self.basis().save(path)
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(cb.FileFormatError, match="damaged"):
            cb.ConvBasis.load(path)

    def test_pickle_is_refused_and_never_executed(self, tmp_path):
        path, proof = tmp_path / "b.pt", tmp_path / "executed"

        class Payload:
            def __reduce__(self):
                return open, (str(proof), "w")

        torch.save(Payload(), path)
        with pytest.raises(cb.ConvBasisError):
            cb.ConvBasis.load(path)
        assert not proof.exists()

    def test_foreign_files(self, tmp_path):
        foreign = tmp_path / "foreign"
        save_file({"segment_kernels": torch.zeros(1, 3)}, foreign)
        with pytest.raises(cb.FileFormatError, match="unknown origin"):
            cb.ConvBasis.load(foreign)
        lacking = tmp_path / "lacking"
        save_file({"starts": torch.zeros(1)}, lacking, metadata={"format": "convbasis.ConvBasis"})
        with pytest.raises(cb.FileFormatError, match="lacks segment_kernels"):
            cb.ConvBasis.load(lacking)

    def test_contradicting_content_is_refused(self, tmp_path):
        path = tmp_path / "b"
        tensors = {"segment_kernels": torch.zeros(2, 3), "starts": torch.tensor([2, 1])}
        metadata = {"format": "convbasis.ConvBasis", "version": "1"}
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(cb.FileFormatError, match=r"no valid basis.*increase"):
            cb.ConvBasis.load(path)
        save_file(tensors, path, metadata={**metadata, "version": "99"})
        with pytest.raises(cb.FileFormatError, match="version 99"):
            cb.ConvBasis.load(path)

    def test_the_header_is_plain_json(self, tmp_path):
        self.basis().save(tmp_path / "b")
        data = (tmp_path / "b").read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        assert header["__metadata__"] == {"format": "convbasis.ConvBasis", "version": "1"}
