"""ConvBasis: a lower-triangular matrix as a sum of k sub-convolution matrices."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arrays import array_from
from .checks import (
    check_alike,
    check_finite,
    check_float_tensor,
    check_positive_int,
    check_starts,
    compute_dtype,
)
from .convolve import DEFAULT_MAX_BYTES, segment_product
from .convolve.segments import column_segments, lag_mask, segment_stops
from .convolve.sums import row_sums
from .dispatch import record_dispatch
from .errors import FileFormatError, InputError
from .linear_operator import linear_operator
from .storage import load_tensors, save_tensors

_FORMAT = "convbasis.ConvBasis"
_VERSION = "1"


class ConvBasis:
    """A batch of lower-triangular n×n matrices in the conv basis.

    The key axis is split into k contiguous segments; inside segment r the entry depends on the lag
    alone: ``A[i, j] = segment_kernels[r, i - j]`` for ``starts[r] <= j < starts[r + 1]`` and
    ``i >= j``. Columns before the first start are zero.

    Args:
        segment_kernels: ``(..., k, n)``, floating point. Entries past lag ``n - 1 - start`` lie
            outside the matrix and are set to zero.
        starts: integers ``(..., k)`` or ``(k,)``, strictly increasing in 0..n-1. In a batch of unequal
            k, the shorter members end in starts of n, whose kernels have no effect.

    Raises:
        InputError: wrong rank, dtype or device; starts not increasing or out of range; NaN or Inf.

    Complexity:
        O(k n) numbers; a product with n×c costs O(k n c log n) by FFT.

    Source:
        F1, F2 of docs/mathematics.md; Conv-Basis (arXiv 2405.05219), section 3.

    Example:
        >>> basis = ConvBasis(torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 0.0]]), [0, 2])
        >>> basis.to_dense()
        tensor([[1., 0., 0.],
                [2., 1., 0.],
                [3., 2., 5.]])
        >>> basis @ torch.ones(3)
        tensor([ 1.,  3., 10.])
    """

    def __init__(self, segment_kernels: Tensor, starts: Tensor | list[int]) -> None:
        """Check the arguments and keep the kernels, zeroed outside the matrix."""
        check_float_tensor("segment_kernels", segment_kernels)
        if segment_kernels.ndim < 2 or segment_kernels.shape[-1] == 0:
            raise InputError(
                f"segment_kernels has shape {tuple(segment_kernels.shape)}; (..., k, n) is wanted, "
                "with n >= 1"
            )
        *batch, k, n = segment_kernels.shape
        found = check_starts(starts, n, segment_kernels.device, from_zero=False)
        if found.shape[-1] != k:
            raise InputError(
                f"there are {found.shape[-1]} starts but {k} segment kernels; give one start for each"
            )
        if found.ndim > 1 and list(found.shape[:-1]) != batch:
            raise InputError(
                f"starts has shape {tuple(found.shape)} but segment_kernels has "
                f"{tuple(segment_kernels.shape)}; batch dimensions must agree, or starts be (k,)"
            )
        self._starts = found.expand(*batch, k)
        mask = lag_mask(found, n)
        check_finite("segment_kernels", segment_kernels, mask)
        self._segment_kernels = segment_kernels.masked_fill(~mask, 0.0)

    @classmethod
    def _trusted(cls, segment_kernels: Tensor, starts: Tensor) -> ConvBasis:
        """Build a basis from kernels and starts that are known to be consistent."""
        basis = cls.__new__(cls)
        basis._segment_kernels = segment_kernels
        basis._starts = starts.expand(*segment_kernels.shape[:-1])
        return basis

    @classmethod
    def from_telescoped(cls, kernels: Tensor, starts: Tensor | list[int]) -> ConvBasis:
        """Build a basis from the paper's kernels ``b_r``, with ``A = Σ_r conv(b_r, n - starts[r])``.

        Args:
            kernels: ``(..., k, n)``; ``b_r``, used up to lag ``n - 1 - starts[r]``.
            starts: as for the class.

        Returns:
            The basis with segment kernels ``c_r = b_1 + ... + b_r``. Where kernels differ much in
            size the sum loses digits: prefer segment kernels where you have them.

        Raises:
            InputError: as for the class.

        Source:
            F2.

        Example:
            >>> b = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
            >>> ConvBasis.from_telescoped(b, [0, 2]).segment_kernels
            tensor([[1., 2., 3.],
                    [5., 0., 0.]])
        """
        own = cls(kernels, starts)  # what lies outside each conv(b_r, m_r) is zeroed first
        return cls(own._segment_kernels.cumsum(-2), own._starts)

    @property
    def segment_kernels(self) -> Tensor:
        """The stored kernels ``c_r``, ``(..., k, n)``, zero outside the matrix."""
        return self._segment_kernels

    @property
    def starts(self) -> Tensor:
        """First column of each segment, int64 ``(..., k)``."""
        return self._starts

    @property
    def lengths(self) -> Tensor:
        """The paper's ``m_r = n - starts[r]``, ``(..., k)``."""
        return self.n - self._starts

    @property
    def ranks(self) -> Tensor:
        """Number of bases of each member of the batch, int64 ``(...)``."""
        return (self._starts < self.n).sum(-1)

    @property
    def kernels(self) -> Tensor:
        """The paper's telescoped kernels ``b_r = c_r - c_{r-1}``, ``(..., k, n)``, a computed view."""
        previous = torch.nn.functional.pad(self._segment_kernels, (0, 0, 1, 0))[..., :-1, :]
        return (self._segment_kernels - previous).masked_fill(~lag_mask(self._starts, self.n), 0.0)

    @property
    def k(self) -> int:
        """Number of bases; in a batch the largest (see `ranks`)."""
        return self._segment_kernels.shape[-2]

    @property
    def n(self) -> int:
        """Number of rows and of columns."""
        return self._segment_kernels.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrices, ``(..., n, n)``."""
        return torch.Size((*self._segment_kernels.shape[:-2], self.n, self.n))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the kernels."""
        return self._segment_kernels.dtype

    @property
    def device(self) -> torch.device:
        """Device of the kernels."""
        return self._segment_kernels.device

    @property
    def mT(self) -> TransposedConvBasis:
        """The transpose, upper triangular, as an operator with ``@``, ``matmul`` and ``to_dense``."""
        return TransposedConvBasis(self)

    def __repr__(self) -> str:
        """Say k, n, starts, and what else tells bases apart."""
        batch = tuple(self.shape[:-2])
        first = self._starts.reshape(-1, self.k)[0] if self._starts.numel() else self._starts
        listed = ", ".join(str(s) for s in first.flatten()[:6].tolist())
        more = ", ..." if self.k > 6 else ""
        which = f", batch={batch} (starts of the first)" if batch else ""
        return f"ConvBasis(k={self.k}, n={self.n}, starts=[{listed}{more}]{which}, dtype={self.dtype})"

    def to_dense(self) -> Tensor:
        """Return the matrices, ``(..., n, n)``; O(n^2) memory, for tests and pictures.

        Example:
            >>> ConvBasis(torch.tensor([[1.0, 2.0]]), [0]).to_dense()
            tensor([[1., 0.],
                    [2., 1.]])
        """
        n = self.n
        rows, columns = torch.arange(n, device=self.device), torch.arange(n, device=self.device)
        return self._entries(rows[:, None], columns[None, :])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return the matrices as a NumPy array ``(..., n, n)``, on the CPU and without gradients.

        Args:
            dtype: of the array; that of the basis by default, float32 for bfloat16.
            copy: None or True; the array is always a new one.

        Raises:
            InputError: copy is False.

        Example:
            >>> import numpy
            >>> numpy.asarray(ConvBasis(torch.tensor([[1.0, 2.0]]), [0]))
            array([[1., 0.],
                   [2., 1.]], dtype=float32)
        """
        return array_from(self.to_dense(), dtype, copy)

    def as_linear_operator(self) -> Any:
        """Return the matrix as a SciPy LinearOperator: NumPy arrays in and out, products alone.

        Its dtype is that of the basis, float32 for half types. Vectors of another dtype are multiplied
        in float64, complex ones by their parts. It carries no gradients.

        Returns:
            a ``scipy.sparse.linalg.LinearOperator`` with matvec, rmatvec, matmat and rmatmat.

        Raises:
            InputError: the basis is a batch.
            MissingExtraError: SciPy is not installed.

        Complexity:
            each product as `matmul`.

        Example:
            >>> import numpy
            >>> operator = ConvBasis(torch.tensor([[1.0, 2.0]]), [0]).as_linear_operator()
            >>> operator @ numpy.ones(2), operator.T @ numpy.ones(2)
            (array([1., 3.]), array([3., 1.]))
        """
        if len(self.shape) > 2:
            raise InputError(
                f"the basis is a batch of matrices, {tuple(self.shape)}; a LinearOperator is one "
                "matrix: make one ConvBasis of the segment_kernels and starts of each"
            )

        def multiply(x: Tensor, transpose: bool) -> Tensor:
            basis = self if x.dtype == self.dtype else self.to(x.dtype)
            with torch.no_grad():
                return basis._apply(x.to(self.device), "auto", None, transpose=transpose)

        return linear_operator(self.n, compute_dtype(self.dtype), multiply)

    def column(self, j: int) -> Tensor:
        """Return column j, ``(..., n)``.

        Raises:
            InputError: j is not in 0..n-1.

        Example:
            >>> ConvBasis(torch.tensor([[1.0, 2.0]]), [0]).column(1)
            tensor([0., 1.])
        """
        number: object = j
        if isinstance(number, bool) or not isinstance(number, Integral) or not 0 <= j < self.n:
            raise InputError(f"column {j!r} does not exist; columns are 0..{self.n - 1}")
        rows = torch.arange(self.n, device=self.device)
        return self._entries(rows[:, None], torch.tensor([[int(j)]], device=self.device))[..., 0]

    def _entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return entries at rows × columns, ``(..., n, number of columns)``."""
        *batch, n, _ = self.shape
        if self.k == 0:
            return self._segment_kernels.new_zeros((*batch, n, columns.shape[-1]))
        owner = column_segments(self._starts, n)[..., columns[0]]  # (..., columns)
        lag = rows - columns
        inside = (lag >= 0) & (owner >= 0)[..., None, :]
        index = owner.clamp(min=0)[..., None, :] * n + lag.clamp(min=0)
        flat = self._segment_kernels.flatten(-2).gather(-1, index.flatten(-2))
        return flat.view(index.shape).masked_fill(~inside, 0.0)

    def row_sum(self) -> Tensor:
        """Return ``A 1``, ``(..., n)``, by sliding sums of the kernels, without any transform.

        Complexity:
            O(k n log n) additions.

        Source:
            F4.

        Example:
            >>> ConvBasis(torch.tensor([[1.0, 2.0, 4.0]]), [0]).row_sum()
            tensor([1., 3., 7.])
        """
        kernels, starts = self._folded()
        sums = row_sums(kernels, starts, segment_stops(starts, self.n))
        return sums.reshape(*self.shape[:-1]).to(self.dtype)

    def matmul(self, x: Tensor, *, backend: str = "auto", max_bytes: int | None = None) -> Tensor:
        """Return ``A x``.

        Args:
            x: ``(n,)``, ``(n, c)`` or ``(..., n, c)`` with batch dimensions that broadcast with the
                basis's; same dtype and device.
            backend: ``"partitioned"``, ``"direct"``, ``"fft"``, ``"reference"`` or ``"auto"``; as in
                `conv_basis_attention`.
            max_bytes: bound on the working memory of the transforms, in bytes; 1 GiB by default.

        Returns:
            ``(n,)``, ``(n, c)`` or ``(..., n, c)``, in the dtype of x.

        Raises:
            InputError: shapes, dtypes or devices that do not fit; NaN or Inf in x.

        Complexity:
            O(n c log(n/k) + k n (c + log(n/k))) time for segments alike in length. Rows that would
            drown in the rounding of the transforms are found and evaluated directly.

        Source:
            F4.

        Example:
            >>> basis = ConvBasis(torch.tensor([[1.0, 2.0]]), [0])
            >>> basis.matmul(torch.tensor([[1.0], [1.0]]))
            tensor([[1.],
                    [3.]])
        """
        return self._apply(x, backend, max_bytes, transpose=False)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Return ``A x``; see `matmul`."""
        return self.matmul(x)

    def exp(self) -> ConvBasis:
        """Return the basis of ``exp(A)`` entry by entry on and below the diagonal, 0 above.

        Columns before the first start hold 0 and become a segment of ones, which adds a basis.

        Raises:
            InputError: an entry overflows the dtype.

        Source:
            F3.

        Example:
            >>> ConvBasis(torch.tensor([[0.0, 0.0]]), [1]).exp().to_dense()
            tensor([[1., 0.],
                    [1., 1.]])
        """
        n = self.n
        kernels = self._segment_kernels.exp().masked_fill(~lag_mask(self._starts, n), 0.0)
        check_finite("exp of the segment kernels", kernels)
        first = (
            self._starts[..., :1] if self.k else self._starts.new_full((*self._starts.shape[:-1], 1), n)
        )
        late = first > 0
        if not bool(late.any()):
            return ConvBasis._trusted(kernels, self._starts)
        ones = (
            torch.ones_like(kernels[..., :1, :])
            if self.k
            else kernels.new_ones((*kernels.shape[:-2], 1, n))
        )
        ones = ones * late[..., None]
        starts = torch.cat([torch.where(late, 0, n), self._starts], dim=-1)
        starts, order = starts.sort(dim=-1, stable=True)
        kernels = torch.cat([ones, kernels], dim=-2)
        kernels = kernels.gather(-2, order[..., None].expand(kernels.shape))
        return ConvBasis._trusted(kernels, starts)

    def to(self, *args: Any, **kwargs: Any) -> ConvBasis:
        """Return the basis with another dtype or on another device, as `torch.Tensor.to`.

        Raises:
            InputError: the dtype is no floating-point one, or an entry overflows it.
        """
        kernels = self._segment_kernels.to(*args, **kwargs)
        check_float_tensor("segment_kernels", kernels)
        check_finite("the converted kernels", kernels)
        return ConvBasis._trusted(kernels, self._starts.to(kernels.device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the basis to a safetensors file, beside it first and then renamed.

        Args:
            path: the file. An interrupted save leaves an older file as it was.

        Raises:
            MissingPathError: the folder does not exist.
            OSError: the file cannot be written.

        Example:
            >>> import tempfile, pathlib
            >>> file = pathlib.Path(tempfile.mkdtemp()) / "basis.safetensors"
            >>> ConvBasis(torch.tensor([[1.0, 2.0]]), [0]).save(file)
            >>> ConvBasis.load(file)
            ConvBasis(k=1, n=2, starts=[0], dtype=torch.float32)
        """
        tensors = {"segment_kernels": self._segment_kernels, "starts": self._starts}
        save_tensors(Path(path), tensors, {"format": _FORMAT, "version": _VERSION})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConvBasis:
        """Read a basis that `save` wrote; nothing in the file is executed.

        Raises:
            FileFormatError: the file is damaged, holds something else, or is of a later version.
            MissingPathError: there is no such file.
        """
        tensors, metadata = load_tensors(Path(path), _FORMAT, ("segment_kernels", "starts"))
        if metadata.get("version") != _VERSION:
            raise FileFormatError(
                f"{str(path)!r} is of version {metadata.get('version')}; this release reads {_VERSION}"
            )
        try:
            return cls(tensors["segment_kernels"], tensors["starts"])
        except InputError as error:
            raise FileFormatError(f"{str(path)!r} holds no valid basis: {error}") from error

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Return kernels ``(P, 1, k, n)`` in the dtype of computation, and starts ``(P, 1, k)``."""
        kernels = self._segment_kernels.to(compute_dtype(self.dtype))
        problems = self.shape[:-2].numel()
        return (
            kernels.reshape(problems, 1, self.k, self.n),
            self._starts.reshape(problems, 1, self.k),
        )

    def _apply(self, x: Tensor, backend: str, max_bytes: int | None, *, transpose: bool) -> Tensor:
        check_float_tensor("x", x)
        check_alike(basis=self._segment_kernels, x=x)
        if x.ndim == 1:
            return self._apply(x[:, None], backend, max_bytes, transpose=transpose)[..., 0]
        *batch, n, columns = x.shape if x.ndim else (0, 0)
        if n != self.n:
            raise InputError(
                f"x has shape {tuple(x.shape)}, n = {n}; the basis is {tuple(self.shape)}: "
                f"x must be (n,), (n, c) or (..., n, c) with n = {self.n}"
            )
        check_finite("x", x)
        own = self.shape[:-2]
        try:
            shape = torch.broadcast_shapes(own, tuple(batch))
        except RuntimeError:
            raise InputError(
                f"batch dimensions {tuple(own)} of the basis and {tuple(batch)} of x do not broadcast"
            ) from None
        problems = shape.numel()
        kernels = self._segment_kernels.expand(*shape, self.k, n).reshape(problems, 1, self.k, n)
        starts = self._starts.expand(*shape, self.k).reshape(problems, 1, self.k)
        values = x.expand(*shape, n, columns).reshape(problems, 1, n, columns)
        work = compute_dtype(x.dtype)
        budget = DEFAULT_MAX_BYTES
        if max_bytes is not None:
            budget = check_positive_int("max_bytes", max_bytes, "a number of bytes")
        product, dispatch = segment_product(
            kernels.to(work),
            starts,
            values.to(work),
            backend=backend,
            max_bytes=budget,
            transpose=transpose,
        )
        record_dispatch(dispatch)
        return product.reshape(*shape, n, columns).to(x.dtype)


class TransposedConvBasis:
    """The transpose of a `ConvBasis`: upper triangular, with the same segments as rows."""

    def __init__(self, basis: ConvBasis) -> None:
        """Keep the basis; nothing is computed."""
        self._basis = basis

    @property
    def mT(self) -> ConvBasis:
        """The basis itself."""
        return self._basis

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrices, ``(..., n, n)``."""
        return self._basis.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the kernels."""
        return self._basis.dtype

    @property
    def device(self) -> torch.device:
        """Device of the kernels."""
        return self._basis.device

    def __repr__(self) -> str:
        """Name the basis that is transposed."""
        return f"{self._basis!r}.mT"

    def to_dense(self) -> Tensor:
        """Return the matrices, ``(..., n, n)``."""
        return self._basis.to_dense().mT

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return the matrices as a NumPy array; see `ConvBasis.__array__`."""
        return array_from(self.to_dense(), dtype, copy)

    def matmul(self, x: Tensor, *, backend: str = "auto", max_bytes: int | None = None) -> Tensor:
        """Return ``A^T x``, a causal correlation; arguments and cost as `ConvBasis.matmul`.

        Example:
            >>> basis = ConvBasis(torch.tensor([[1.0, 2.0]]), [0])
            >>> basis.mT @ torch.ones(2)
            tensor([3., 1.])
        """
        return self._basis._apply(x, backend, max_bytes, transpose=True)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Return ``A^T x``; see `matmul`."""
        return self.matmul(x)
