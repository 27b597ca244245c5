"""Files: written beside and then renamed; tensors as safetensors alone, never executed when read."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from .errors import FileFormatError, InputError, MissingPathError


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to one file; an interruption leaves an older file as it was.

    Raises:
        MissingPathError: there is no such folder.
        InputError: the path is a folder.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_beside(path, lambda name: save_file(own, name, metadata=metadata))


def save_text(path: Path, text: str) -> None:
    """Write text as UTF-8; an interruption leaves an older file as it was.

    Raises:
        MissingPathError: there is no such folder.
        InputError: the path is a folder.
        OSError: the file cannot be written.
    """
    write_beside(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def write_beside(path: Path, write: Callable[[str], object]) -> None:
    """Let write fill a new file beside path, then rename it to path."""
    if not path.parent.is_dir():
        raise MissingPathError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into")
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; name a file in it")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        write(name)
        with open(name, "rb+") as file:  # noqa: PTH123 (a name from mkstemp)
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_parts(path: Path) -> None:
    """Remove what `write_beside` left beside path where it was killed."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        part.unlink(missing_ok=True)


def load_tensors(
    path: Path, kind: str, names: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the named tensors and the metadata of a file whose metadata say ``format = kind``.

    Raises:
        FileFormatError: the file is damaged, of another format, or lacks a tensor.
        MissingPathError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MissingPathError(f"there is no file {str(path)!r}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            found = set(file.keys())
            if metadata.get("format") != kind:
                raise FileFormatError(
                    f"{str(path)!r} holds {metadata.get('format', 'tensors of unknown origin')!r}; "
                    f"a file with {kind!r} is wanted"
                )
            missing = set(names) - found
            if missing:
                raise FileFormatError(f"{str(path)!r} lacks {', '.join(sorted(missing))}")
            return {name: file.get_tensor(name) for name in found}, dict(metadata)
    except SafetensorError as error:
        raise FileFormatError(f"{str(path)!r} is damaged or not a safetensors file: {error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
