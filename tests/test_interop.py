"""NumPy arrays in and out, and the SciPy operator, against the dense matrix."""

import numpy as np
import pytest
import torch
from factories import random_basis
from scipy.sparse.linalg import LinearOperator, eigs, lsqr, svds

import convbasis as cb


def basis(n=70, k=5, dtype=torch.float64):
    return cb.ConvBasis(*random_basis(n, k, torch.Generator().manual_seed(n), dtype))


class TestDecomposeOfArrays:
    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
    def test_keeps_the_dtype_and_is_exact(self, dtype):
        matrix = basis().to_dense().numpy().astype(dtype)
        found = cb.decompose(matrix)
        assert found.device.type == "cpu"
        assert found.dtype == getattr(torch, dtype)
        assert found.k == 5
        assert np.array_equal(np.asarray(found), matrix)

    @pytest.mark.parametrize(
        "change",
        [
            np.asfortranarray,
            lambda m: m.astype(">f8"),
            lambda m: m[::-1, ::-1].copy()[::-1, ::-1],
            lambda m: np.repeat(m, 2, axis=1)[:, ::2],
            np.asmatrix,
            np.ma.asarray,
        ],
        ids=["fortran", "big endian", "reversed", "strided", "matrix", "unmasked"],
    )
    @pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
    def test_layouts(self, change):
        matrix = basis().to_dense().numpy()
        assert np.array_equal(np.asarray(cb.decompose(change(matrix))), matrix)

    def test_what_cannot_be_written_is_not(self):
        matrix = np.tri(5)
        matrix.setflags(write=False)
        found = cb.decompose(matrix)
        found.segment_kernels.add_(1.0)
        assert np.array_equal(matrix, np.tri(5))

    def test_batches_and_tolerance(self):
        matrices = np.stack([np.tri(6), 0.0 * np.tri(6), np.tri(6) + 0.1 * np.eye(6)])
        assert cb.decompose(matrices).ranks.tolist() == [1, 0, 1]
        noisy = matrices[0] + 1e-3 * np.tril(np.random.default_rng(0).uniform(-1, 1, (6, 6)))
        assert cb.decompose(noisy).k > cb.decompose(noisy, tol=1e-3).k == 1

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64", "bool"])
    def test_integers_and_bools_become_float64(self, dtype):
        matrix = np.tri(9).astype(dtype)
        found = cb.decompose(matrix)
        assert found.dtype == torch.float64
        assert np.array_equal(np.asarray(found), matrix)

    @pytest.mark.parametrize("largest", [2**53 + 1, -(2**53) - 1])
    def test_integers_that_float64_cannot_hold(self, largest):
        with pytest.raises(cb.InputError, match=rf"holds the integer {largest}, beyond 2\^53"):
            cb.decompose(np.diag([1, largest]))
        assert cb.decompose(np.diag([1, 2**53])).dtype == torch.float64

    def test_whatever_becomes_an_array(self):
        class Table:
            def __array__(self, dtype=None, copy=None):
                return np.tri(4)

        assert cb.decompose(Table()).k == 1
        assert cb.decompose(basis()).starts.tolist() == basis().starts.tolist()

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.eye(2, dtype=np.complex128), "dtype complex128; a conv basis is real"),
            (np.eye(2, dtype=np.longdouble), "longdouble|float128"),
            (np.array([["a"]]), "dtype <U1"),
            (np.array([[None]]), "dtype object"),
            (np.array([["2020-01-01"]], dtype="datetime64[D]"), "dtype datetime64"),
            (np.ma.masked_equal(np.tri(3), 1.0), "masked entries"),
            (np.ones((2, 2)), "not lower triangular"),
            (np.ones((2, 3)), r"shape \(2, 3\)"),
            (np.float64(3.0), r"shape \(\)"),
            (np.full((2, 2), np.nan), "NaN"),
            ([[1.0]], "H is a list"),
        ],
    )
    def test_refusals(self, array, message):
        with pytest.raises(cb.InputError, match=message):
            cb.decompose(array)


class TestArrayOfABasis:
    def test_the_dense_matrix(self):
        own = basis()
        for array in (np.asarray(own), np.array(own), np.array(own, copy=True)):
            assert array.dtype == np.float64
            assert np.array_equal(array, own.to_dense().numpy())
        assert np.array_equal(np.asarray(own.mT), own.to_dense().mT.numpy())

    @pytest.mark.parametrize("dtype", [np.float32, np.float16, np.complex128])
    def test_dtype(self, dtype):
        array = np.asarray(basis(), dtype=dtype)
        assert array.dtype == dtype
        assert np.array_equal(array, basis().to_dense().numpy().astype(dtype))

    def test_half_types(self):
        assert np.asarray(basis(dtype=torch.float16)).dtype == np.float16
        array = np.asarray(basis(dtype=torch.bfloat16))
        assert array.dtype == np.float32
        assert np.array_equal(array, basis(dtype=torch.bfloat16).to_dense().float().numpy())

    def test_without_a_copy_there_is_none(self):
        for own in (basis(), basis().mT):
            with pytest.raises(ValueError, match="copy=False"):
                np.asarray(own, copy=False)

    def test_it_is_the_callers_own(self):
        own = basis()
        before = own.to_dense()
        np.asarray(own)[:] = 7.0
        assert torch.equal(own.to_dense(), before)

    def test_batches_and_gradients(self):
        kernels = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
        own = cb.ConvBasis(kernels, [0, 2])
        assert np.array_equal(np.asarray(own), own.to_dense().detach().numpy())

    def test_functions_of_numpy_take_it(self):
        own = basis()
        x = np.random.default_rng(0).normal(size=70)
        assert np.allclose(np.dot(own, x), own.to_dense().numpy() @ x)
        assert np.allclose(x @ own, x @ own.to_dense().numpy())


class TestLinearOperator:
    def test_every_product(self):
        own = basis()
        dense, operator = np.asarray(own), own.as_linear_operator()
        assert isinstance(operator, LinearOperator)
        assert operator.shape == (70, 70)
        generator = np.random.default_rng(0)
        x, many = generator.normal(size=70), generator.normal(size=(70, 3))
        for found, exact in (
            (operator.matvec(x), dense @ x),
            (operator.matvec(x[:, None]), dense @ x[:, None]),
            (operator.rmatvec(x), dense.T @ x),
            (operator.matmat(many), dense @ many),
            (operator.rmatmat(many), dense.T @ many),
            (operator @ many, dense @ many),
            (operator.T @ many, dense.T @ many),
            (operator.H @ x, dense.T @ x),
            ((operator + operator.T) @ x, (dense + dense.T) @ x),
        ):
            assert found.shape == exact.shape
            assert np.abs(found - exact).max() < 1e-12

    def test_long_ones_are_not_laid_out(self):
        own = basis(6000, 3)
        x = np.random.default_rng(0).normal(size=6000)
        found = own.as_linear_operator() @ x
        assert cb.last_dispatch().backend in ("partitioned", "fft")
        exact = own.matmul(torch.from_numpy(x), backend="reference").numpy()
        assert np.linalg.norm(found - exact) < 1e-12 * np.linalg.norm(exact)

    @pytest.mark.parametrize("kind", [np.complex128, np.int64, np.float32, np.float64])
    def test_dtypes_of_vectors(self, kind):
        own = basis(dtype=torch.float32)
        operator, dense = own.as_linear_operator(), own.to_dense().double().numpy()
        assert operator.dtype == np.float32
        x = (10 * np.random.default_rng(0).normal(size=(70, 2))).astype(kind)
        if kind == np.complex128:
            x += 3j * x[::-1]
        found = operator @ x
        assert found.dtype == np.result_type(np.float32, kind)
        limit = 1e-5 if kind == np.float32 else 1e-12
        assert np.linalg.norm(found - dense @ x) < limit * np.linalg.norm(dense @ x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_types_are_computed_in_float32(self, dtype):
        own = basis(dtype=dtype)
        operator = own.as_linear_operator()
        assert operator.dtype == np.float32
        x = np.ones(70, dtype=np.float32)
        exact = own.to_dense().double().numpy() @ x
        assert np.linalg.norm(operator @ x - exact) < 1e-6 * np.linalg.norm(exact)

    def test_no_gradients_and_no_graph(self):
        kernels = torch.randn(2, 6, requires_grad=True)
        operator = cb.ConvBasis(kernels, [0, 2]).as_linear_operator()
        assert (operator @ np.ones(6, dtype=np.float32)).shape == (6,)
        assert kernels.grad is None

    def test_vectors_that_cannot_be_written(self):
        x = np.ones(70)
        x.setflags(write=False)
        assert np.isfinite(basis().as_linear_operator() @ x).all()

    def test_the_zero_matrix(self):
        assert np.array_equal(
            cb.decompose(np.zeros((4, 4))).as_linear_operator() @ np.ones(4), np.zeros(4)
        )

    def test_a_batch_is_refused(self):
        with pytest.raises(cb.InputError, match=r"batch of matrices, \(3, 6, 6\)"):
            cb.ConvBasis(torch.ones(3, 1, 6), [0]).as_linear_operator()

    def test_what_is_not_finite_is_refused(self):
        with pytest.raises(cb.InputError, match="x holds 1 NaN"):
            basis().as_linear_operator() @ np.r_[np.nan, np.ones(69)]
        with pytest.raises(ValueError, match="dimension mismatch"):
            basis().as_linear_operator() @ np.ones(69)

    def test_solvers(self):
        own = basis()
        dense, operator = np.asarray(own), own.as_linear_operator()
        right = np.random.default_rng(0).normal(size=70)
        solution = lsqr(operator, right, damp=1.0, atol=1e-13, btol=1e-13, iter_lim=2000)[0]
        exact = np.linalg.solve(dense.T @ dense + np.eye(70), dense.T @ right)
        assert np.linalg.norm(solution - exact) < 1e-8 * np.linalg.norm(exact)
        start = np.ones(70)
        found = svds(operator, k=3, v0=start, return_singular_vectors=False)
        assert np.allclose(np.sort(found)[::-1], np.linalg.svd(dense, compute_uv=False)[:3])
        symmetric = operator.T @ operator
        largest = eigs(symmetric, k=1, v0=start, return_eigenvectors=False)[0].real
        assert largest == pytest.approx(np.linalg.eigvalsh(dense.T @ dense)[-1])
