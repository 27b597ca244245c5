"""Texts that people give: read with one clear line for whatever cannot be used, and cut to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError, MissingPathError
from .smollm2 import sample_text, token_ids

PROSE = "prose of the standard library"


def read_text(path: Path | None) -> tuple[str, str]:
    """Return the name and the text of a file, or the prose of the standard library.

    Args:
        path: a UTF-8 text file; None for the prose, about 113,000 tokens.

    Raises:
        MissingPathError: there is no such file.
        InputError: a folder, a binary file, an empty one, or one that is not UTF-8.
    """
    if path is None:
        return PROSE, sample_text()
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; a text file is wanted")
    if not path.exists():
        raise MissingPathError(f"there is no file {str(path)!r}")
    content = path.read_bytes()
    if b"\0" in content:
        raise InputError(f"{str(path)!r} is a binary file (it holds NUL bytes); UTF-8 text is wanted")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}; convert it, as "
            "with iconv -t UTF-8"
        ) from None
    if not text.strip():
        raise InputError(f"{str(path)!r} is empty; a text is wanted")
    return path.name, text


def read_texts(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Return the names and texts of files, or the prose alone if there are none; see `read_text`."""
    return [read_text(path) for path in paths] if paths else [read_text(None)]


def text_tokens(model: Any, tokenizer: Any, name: str, text: str, count: int) -> Tensor:
    """Return the first `count` tokens of a text, ``(1, count)``, checked to be what the model takes.

    Raises:
        InputError: the text is shorter, the model has fewer positions, or the tokenizer's numbers go
            beyond the model's.
    """
    check_positions(model, count)
    try:
        ids = token_ids(tokenizer, text, count)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return checked_ids(model, ids)


def check_positions(model: Any, count: int) -> None:
    """Check that a model has positions for so many tokens.

    Raises:
        InputError: it has not.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and count > positions:
        raise InputError(f"{count} tokens are more than the {positions} positions of the model")


def checked_ids(model: Any, ids: Tensor) -> Tensor:
    """Return token numbers after checking that a model has all of them.

    Raises:
        InputError: it has not.
    """
    known, largest = model.get_input_embeddings().num_embeddings, int(ids.max())
    if largest >= known:
        raise InputError(
            f"the tokenizer gives token {largest}, but the model knows {known} only; they do not "
            "belong together"
        )
    return ids
