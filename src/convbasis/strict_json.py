"""JSON files that are read strictly: whole, in UTF-8, no name twice, every number finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import FileFormatError, InputError, MissingPathError

_T = TypeVar("_T")


def read_json(path: Path, kind: str, build: Callable[[Any], _T]) -> _T:
    """Return what build makes of a file's content.

    Args:
        path: the file.
        kind: what it should be, as ``"a plan"``, for messages.
        build: takes the parsed content, and raises InputError where it is not of that kind.

    Raises:
        FileFormatError: the file is damaged, or not of that kind; the message names the place.
        MissingPathError: there is no such file.
    """
    if not path.is_file():
        raise MissingPathError(f"there is no file {str(path)!r}")
    return parse_json(path.read_bytes(), repr(str(path)), kind, build)


def parse_json(content: bytes, place: str, kind: str, build: Callable[[Any], _T]) -> _T:
    """Return what build makes of JSON text.

    Args:
        content: the text in UTF-8.
        place: where it comes from, for messages.
        kind: what it should be.
        build: see `read_json`.

    Raises:
        FileFormatError: it is damaged, or not of that kind.
    """
    try:
        parsed = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
        )
        return build(parsed)
    except json.JSONDecodeError as error:
        raise FileFormatError(
            f"{place} is not JSON, or only the beginning of a file: "
            f"{error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{place} is not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:  # also numbers of too many digits
        raise FileFormatError(f"{place} is not {kind}: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputError(f"{', '.join(map(repr, twice))} stands twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise InputError(f"it holds {name}; every number must be finite")
