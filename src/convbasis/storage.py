"""Tensor files: safetensors alone, written beside and then renamed, never executed when read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from .errors import FileFormatError


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to one file; an interruption leaves an older file as it was."""
    from safetensors.torch import save_file

    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        save_file(own, name, metadata=metadata)
        with open(name, "rb+") as file:  # noqa: PTH123 (a name from mkstemp)
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_tensors(
    path: Path, kind: str, names: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the named tensors and the metadata of a file whose metadata say ``format = kind``.

    Raises:
        FileFormatError: the file is damaged, of another format, or lacks a tensor.
        FileNotFoundError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
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
