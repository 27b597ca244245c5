"""Reports as JSON: the data of a command's --json, read with every field checked."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from ..checks import describe
from ..errors import InputError
from ..strict_json import read_json
from .consistency import check_report
from .content import Report

FORMAT = "convbasis.report"
VERSION = 1


def report_json(report: Report) -> str:
    """Return a report as JSON text, in ASCII alone so that any terminal takes it.

    Raises:
        InputError: its parts do not agree, or a number is not finite; the message names the place.
    """
    check_report(report)
    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(report)}
    return json.dumps(content, allow_nan=False) + "\n"


def read_report(path: Path) -> Report:
    """Read a report that `report_json` made; fields that have a default may be absent.

    Raises:
        FileFormatError: the file is not a report of this version, or its parts do not agree; the
            message names the place.
        MissingPathError: there is no such file.
    """
    return read_json(path, "a report", _checked)


def _checked(parsed: object) -> Report:
    report = _report(parsed)
    check_report(report)
    return report


def _report(parsed: object) -> Report:
    if not isinstance(parsed, dict) or parsed.get("format") != FORMAT:
        found = parsed.get("format") if isinstance(parsed, dict) else parsed
        raise InputError(f"its format is {describe(found)}; {FORMAT!r} is wanted")
    version = parsed.get("version")
    if version != VERSION or not isinstance(version, int) or isinstance(version, bool):
        raise InputError(
            f"its version is {describe(version)}; this release reads version {VERSION}: "
            "use the release that wrote it, or run the command again"
        )
    rest = {name: value for name, value in parsed.items() if name not in ("format", "version")}
    return _read(Report, rest, "")


def _read(kind: Any, value: Any, place: str) -> Any:
    """Return value as the type that the content's annotations state."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), value, place)
    if origin is tuple:
        return _read_tuple(get_args(kind), value, place)
    if origin is dict:
        inner = get_args(kind)[1]
        entries = _expect(dict, value, "an object", place)
        return {name: _read(inner, entry, f"{place}[{name!r}]") for name, entry in entries.items()}
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, place)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        largest = sys.float_info.max
        return float(value) if abs(value) <= largest else _refuse(value, "a finite number", place)
    return _expect(kind, value, _NAMES[kind], place)


_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _read_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    """Return value unchanged if it is of a plain kind, or read as the one that is not plain."""
    if value is None and type(None) in kinds:
        return None
    plain = [kind for kind in kinds if kind in _NAMES]
    if type(value) in plain:
        return value
    for kind in kinds:
        if kind is not type(None) and (kind not in _NAMES or len(plain) == 1):
            return _read(kind, value, place)
    return _refuse(value, " or ".join([*(_NAMES[kind] for kind in plain), "null"]), place)


def _read_tuple(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    entries = _expect(list, value, "a list", place)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(entries)
    if len(entries) != len(kinds):
        raise InputError(f"{place} has {len(entries)} entries; {len(kinds)} are wanted")
    each = enumerate(zip(kinds, entries, strict=True))
    return tuple(_read(kind, entry, f"{place}[{index}]") for index, (kind, entry) in each)


def _read_fields(kind: Any, value: Any, place: str) -> Any:
    """Return the dataclass; what has a default may be absent, what is unknown may not be there."""
    entries = _expect(dict, value, "an object", place)
    hints = get_type_hints(kind)
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in entries]
    unknown = [name for name in entries if name not in hints]
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing)
        wrong += [f"has unknown {', '.join(map(repr, unknown))}"] * bool(unknown)
        raise InputError(f"{place or 'the file'} {' and '.join(wrong)}")
    dot = f"{place}." if place else ""
    return kind(**{name: _read(hints[name], entry, dot + name) for name, entry in entries.items()})


def _expect(kind: type, value: Any, name: str, place: str) -> Any:
    if type(value) is not kind:
        _refuse(value, name, place)
    return value


def _refuse(value: Any, wanted: str, place: str) -> NoReturn:
    raise InputError(f"{place or 'the file'} is {describe(value)}; {wanted} is wanted")
