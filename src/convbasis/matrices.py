"""One square matrix from a file of arrays; nothing in the file is executed."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from torch import Tensor

from .arrays import tensor_from
from .checks import FLOATS
from .errors import FileFormatError, InputError, MissingPathError


def read_matrix(path: str | PathLike[str], key: str | None = None) -> Tensor:
    """Read a square matrix from a ``.npy``, ``.npz`` or ``.safetensors`` file.

    Args:
        path: the file; its ending tells the format.
        key: name of the array in an .npz or .safetensors file; not needed if it holds one alone.

    Returns:
        ``(n, n)`` on the CPU, in the dtype of the file; integers and bools become float64.

    Raises:
        FileFormatError: another ending, a damaged file, Python objects instead of numbers, complex
            numbers, or an array that is no square matrix; the message names the file.
        InputError: key is needed, or names nothing in the file.
        MissingPathError: there is no such file.

    Example:
        >>> import numpy, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "matrix.npy"
        >>> numpy.save(file, numpy.tri(3))
        >>> read_matrix(file)
        tensor([[1., 0., 0.],
                [1., 1., 0.],
                [1., 1., 1.]], dtype=torch.float64)
    """
    file = Path(path)
    read = _READERS.get(file.suffix.lower())
    if read is None:
        raise FileFormatError(
            f"{str(file)!r} ends in {file.suffix!r}; a matrix is read from {', '.join(_READERS)}"
        )
    if not file.is_file():
        raise MissingPathError(f"there is no file {str(file)!r}")
    matrix = read(file, key)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise FileFormatError(
            f"{str(file)!r} holds an array of shape {tuple(matrix.shape)}; one square matrix (n, n) "
            "with n >= 1 is wanted"
        )
    return matrix


def _read_npy(file: Path, key: str | None) -> Tensor:
    from numpy.lib.format import open_memmap

    if key is not None:
        raise InputError(f"key={key!r}: {str(file)!r} is a .npy file, whose one array has no name")
    try:
        # Mapping compares the header with the size of the file before any memory is taken, and refuses
        # Python objects.
        return tensor_from("its array", open_memmap(file, mode="r"))
    except (ValueError, OSError, OverflowError) as error:
        raise _unreadable(file, "a .npy file of real numbers", error) from error


def _read_npz(file: Path, key: str | None) -> Tensor:
    from zipfile import BadZipFile
    from zlib import error as ZlibError

    import numpy
    from numpy.lib.npyio import NpzFile

    # Beside damage: compression that zipfile does not know, and a header that asks for too much memory.
    damages = (ValueError, OSError, EOFError, MemoryError, NotImplementedError, BadZipFile, ZlibError)
    with file.open("rb") as stream:
        try:
            archive = NpzFile(stream, allow_pickle=False)
        except damages as error:
            raise _unreadable(file, "an .npz file", error) from error
        name = _chosen(file, key, archive.files)
        try:
            array = archive[name]
            if not isinstance(array, numpy.ndarray):
                raise ValueError(f"{name!r} is no array")
            return tensor_from(repr(name), array)
        except damages as error:
            raise _unreadable(file, "an .npz file of real numbers", error) from error


def _read_safetensors(file: Path, key: str | None) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as content:
            name = _chosen(file, key, list(content.keys()))
            tensor: Tensor = content.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, "a safetensors file", error) from error
    if tensor.dtype in FLOATS:
        return tensor
    try:
        return tensor_from(repr(name), tensor.numpy())
    except (InputError, TypeError) as error:
        raise _unreadable(file, "a safetensors file of real numbers", error) from error


_READERS: dict[str, Callable[[Path, str | None], Tensor]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}


def _chosen(file: Path, key: str | None, names: list[str]) -> str:
    """Return the name of the array to read."""
    listed = ", ".join(map(repr, sorted(names)[:8])) + (", ..." if len(names) > 8 else "")
    if not names:
        raise FileFormatError(f"{str(file)!r} holds no array; a square matrix is wanted")
    if key is None and len(names) > 1:
        raise InputError(f"{str(file)!r} holds {len(names)} arrays; give one of them as key: {listed}")
    if key is not None and key not in names:
        raise InputError(f"{str(file)!r} has no array {key!r}; it has {listed}")
    return names[0] if key is None else key


def _unreadable(file: Path, wanted: str, error: Exception) -> FileFormatError:
    """Return the error, in one line, for a file that is damaged or holds something else."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return FileFormatError(f"{str(file)!r} is damaged or not {wanted}: {reason}")
