"""A matrix that is known by its products, as a SciPy LinearOperator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import MissingExtraError

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]


def linear_operator(n: int, dtype: torch.dtype, multiply: Callable[[Tensor, bool], Tensor]) -> Any:
    """Return the ``scipy.sparse.linalg.LinearOperator`` of a real n×n matrix.

    Args:
        n: number of rows and of columns.
        dtype: float64 or float32.
        multiply: given x ``(n, c)`` in dtype or float64, on the CPU, and whether to transpose, returns
            the product in the dtype of x.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    try:
        import numpy
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise MissingExtraError("as_linear_operator", "scipy", error) from error
    own = numpy.dtype("float64" if dtype == torch.float64 else "float32")

    def apply(x: Array, transpose: bool) -> Array:
        x = numpy.asarray(x)
        if x.dtype.kind == "c":
            return apply(x.real, transpose) + 1j * apply(x.imag, transpose)
        work = numpy.float32 if numpy.result_type(own, x.dtype) == numpy.float32 else numpy.float64
        columns = torch.from_numpy(x.reshape(n, -1).astype(work, order="C", copy=True))
        return multiply(columns, transpose).detach().cpu().numpy().reshape(x.shape)

    def product(x: Array) -> Array:
        return apply(x, False)

    def transposed(x: Array) -> Array:
        return apply(x, True)

    return LinearOperator(
        (n, n), matvec=product, rmatvec=transposed, matmat=product, rmatmat=transposed, dtype=own
    )
