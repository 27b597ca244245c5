"""NumPy arrays in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    import numpy

# Whole numbers up to here are exact in float64.
_EXACT = 2**53


class SupportsArray(Protocol):
    """A NumPy array, or what becomes one."""

    def __array__(self) -> Any:
        """Return the array."""


def is_array(value: object) -> TypeGuard[SupportsArray]:
    """Whether a value is, or can become, a NumPy array, and is no tensor."""
    return not isinstance(value, Tensor) and hasattr(type(value), "__array__")


def tensor_from(name: str, value: object) -> Tensor:
    """Return a copy of an array as a tensor on the CPU.

    Args:
        name: of the argument, for messages.
        value: a NumPy array, or an object with ``__array__``. float16, float32 and float64 keep their
            dtype; integers and bools become float64.

    Raises:
        InputError: complex numbers or another dtype that has no tensor, integers beyond 2^53, or
            masked entries.
    """
    import numpy

    if numpy.ma.is_masked(value):
        raise InputError(
            f"{name} is an array with masked entries, which have no value; fill them first: "
            f"{name}.filled(0.0)"
        )
    array = numpy.asarray(value)
    if array.dtype.kind in "iub":
        if array.dtype.itemsize == 8 and array.size:
            largest = max(int(array.min()), int(array.max()), key=abs)
            if abs(largest) > _EXACT:
                raise InputError(
                    f"{name} holds the integer {largest}, beyond 2^53, where float64 is not exact; "
                    "convert it to floating point yourself"
                )
        return torch.from_numpy(array.astype(numpy.float64))
    if array.dtype.kind == "c":
        raise InputError(
            f"{name} has dtype {array.dtype}; a conv basis is real: give the real and the imaginary "
            "part one after the other"
        )
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InputError(
            f"{name} has dtype {array.dtype}; wanted float64, float32, float16, integers or bools: "
            f"convert it with .astype(float)"
        )
    # A copy of its own: native byte order, positive strides, writable.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))


def array_from(tensor: Tensor, dtype: Any, copy: bool | None) -> numpy.ndarray[Any, Any]:
    """Return a tensor that was just made as an array, for ``__array__``.

    Args:
        tensor: any device and dtype; bfloat16, which NumPy lacks, becomes float32.
        dtype: of the array; None for the tensor's.
        copy: False asks for no copy, which cannot be had.

    Raises:
        InputError: copy is False.
    """
    import numpy

    if copy is False:
        raise InputError(
            "copy=False: the dense array of a conv basis is always made anew; leave copy=None"
        )
    own = tensor.detach().cpu()
    array = (own.float() if own.dtype == torch.bfloat16 else own).numpy()
    return array if dtype is None else array.astype(numpy.dtype(dtype), copy=False)
