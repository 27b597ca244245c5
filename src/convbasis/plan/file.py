"""Plans as JSON: written one head a line, read with every field checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..checks import describe
from ..errors import InputError
from ..strict_json import parse_json, read_json
from .model import ModelShape
from .plan import HeadPlan, Plan
from .settings import HeadSetting, Size

FORMAT = "convbasis.plan"
VERSION = 1
_SIZES = ("window", "sinks", "columns", "blocks")
_OTHERS = ("far_field", "key_weights", "correction")
_T = TypeVar("_T")


def dumps(plan: Plan) -> str:
    """Return the plan as JSON text."""
    top = {
        "format": FORMAT,
        "version": VERSION,
        "model": dataclasses.asdict(plan.model),
        "texts_sha256": plan.texts_sha256,
        "tolerance": plan.tolerance,
        "calibrated_length": plan.calibrated_length,
        "min_length": plan.min_length,
        "predicted_kl": plan.predicted_kl,
        "weights_sha256": plan.weights_sha256,
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in top.items()]
    layers = [
        "    [\n" + ",\n".join(f"      {json.dumps(_head(planned))}" for planned in heads) + "\n    ]"
        for heads in plan.heads
    ]
    return "{\n" + "\n".join(lines) + '\n  "layers": [\n' + ",\n".join(layers) + "\n  ]\n}\n"


def _head(planned: HeadPlan) -> dict[str, object]:
    rest = {"error": planned.error, "cost": planned.cost}
    if planned.setting is None:
        return {"setting": "exact", **rest}
    sizes = {name: _size(getattr(planned.setting, name)) for name in _SIZES}
    others = {name: getattr(planned.setting, name) for name in _OTHERS}
    return {"setting": {**sizes, **others}, **rest}


def _size(size: int | Size) -> object:
    if isinstance(size, int):
        return size
    return {"size": size.size, "power": size.power, "multiple": size.multiple}


def load(path: Path) -> Plan:
    """Read a plan from a file.

    Raises:
        FileFormatError: the file is not a plan; the message names the place.
        MissingPathError: there is no such file.
    """
    return read_json(path, "a plan", _plan)


def loads(content: bytes, place: str) -> Plan:
    """Read a plan from the text that `dumps` returned, which comes from some place.

    Raises:
        FileFormatError: it is not a plan.
    """
    return parse_json(content, place, "a plan", _plan)


def _plan(parsed: object) -> Plan:
    if not isinstance(parsed, dict) or parsed.get("format") != FORMAT:
        found = parsed.get("format") if isinstance(parsed, dict) else parsed
        raise InputError(f"its format is {describe(found)}; {FORMAT!r} is wanted")
    if parsed.get("version") != VERSION or isinstance(parsed["version"], bool):
        raise InputError(
            f"its version is {describe(parsed.get('version'))}; this release reads version {VERSION}: "
            "use the release that wrote it, or calibrate again"
        )
    names: tuple[str, ...] = (
        "format",
        "version",
        "model",
        "texts_sha256",
        "tolerance",
        "calibrated_length",
    )
    rest = ("min_length", "predicted_kl", "weights_sha256", "layers")
    # Plans of earlier releases do not tell the weights.
    top = _fields("the file", {"weights_sha256": None, **parsed}, (*names, *rest))
    names = tuple(field.name for field in dataclasses.fields(ModelShape))
    shape = _make("model", ModelShape, **_fields("model", top["model"], names))
    length = top["calibrated_length"]
    layers = tuple(
        tuple(
            _head_plan(f"layer {layer}, head {head}", entry, length)
            for head, entry in enumerate(_list(f"layer {layer}", heads))
        )
        for layer, heads in enumerate(_list("layers", top["layers"]))
    )
    return Plan(
        model=shape,
        texts_sha256=top["texts_sha256"],
        tolerance=top["tolerance"],
        calibrated_length=length,
        min_length=top["min_length"],
        heads=layers,
        predicted_kl=top["predicted_kl"],
        weights_sha256=top["weights_sha256"],
    )


def _head_plan(place: str, entry: object, length: Any) -> HeadPlan:
    fields = _fields(place, entry, ("setting", "error", "cost"))
    setting = fields["setting"]
    if setting == "exact":
        fields["setting"] = None
    elif isinstance(setting, dict):
        where = f"{place}, setting"
        found = _fields(where, setting, (*_SIZES, *_OTHERS))
        for name in _SIZES:
            if isinstance(found[name], dict):
                inner = f"{where}, {name}"
                size = _fields(inner, found[name], ("size", "power", "multiple"))
                found[name] = _make(inner, Size, length=length, **size)
        fields["setting"] = _make(where, HeadSetting, **found)
    else:
        raise InputError(f"{place}: setting is {describe(setting)}; 'exact' or an object is wanted")
    return _make(place, HeadPlan, **fields)


def _make(place: str, kind: Callable[..., _T], **fields: Any) -> _T:
    """Return kind(**fields), its complaint beginning with the place in the file."""
    try:
        return kind(**fields)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _fields(place: str, entry: object, names: tuple[str, ...]) -> dict[str, Any]:
    """Return a copy of an object that has exactly these fields."""
    if not isinstance(entry, dict):
        raise InputError(f"{place} is {describe(entry)}; an object with {', '.join(names)} is wanted")
    missing = [name for name in names if name not in entry]
    unknown = [name for name in entry if name not in names]
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing)
        wrong += [f"has unknown {', '.join(map(repr, unknown))}"] * bool(unknown)
        raise InputError(f"{place} {' and '.join(wrong)}; wanted are {', '.join(names)}")
    return dict(entry)


def _list(place: str, entry: object) -> list[Any]:
    if not isinstance(entry, list):
        raise InputError(f"{place} is {describe(entry)}; a list is wanted")
    return entry
