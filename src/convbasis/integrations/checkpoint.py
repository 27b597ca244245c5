"""What long work has measured so far, in memory and in a file, so that a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from ..storage import remove_parts, save_text


class Checkpoint:
    """Measurements by name; each is in the file as soon as it is added."""

    def __init__(self, path: Path | None, kind: str, identity: dict[str, Any], differ: str) -> None:
        """Begin, or go on with what the file holds.

        Args:
            path: the file; None to keep measurements in memory alone.
            kind: of work, as ``"calibration"``.
            identity: what a file must agree with to be of the same work.
            differ: what may be different if it does not agree, for the message.

        Raises:
            FileFormatError: the file is damaged, or of other work.
        """
        self._path = path
        # As a file has it: tuples are lists there.
        self._identity = json.loads(json.dumps({"format": f"convbasis.{kind}", **identity}))
        self._measured: dict[str, Any] = {}
        if path is not None:
            remove_parts(path)
        if path is not None and path.exists():
            self._read(path, kind, differ)

    def _read(self, path: Path, kind: str, differ: str) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            measured = dict(content.pop("measured"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileFormatError(f"{str(path)!r} is no {kind} checkpoint: {error}") from error
        if content != self._identity:
            raise FileFormatError(
                f"{str(path)!r} is of another {kind}: {differ} differ; name another file, or remove "
                "this one"
            )
        self._measured = measured

    def __len__(self) -> int:
        """Return the number of measurements."""
        return len(self._measured)

    def __contains__(self, name: str) -> bool:
        """Return whether something is measured."""
        return name in self._measured

    def __getitem__(self, name: str) -> Any:
        """Return a measurement, as JSON has it."""
        return self._measured[name]

    def add(self, name: str, measured: Any) -> None:
        """Keep a measurement."""
        self._measured[name] = measured
        if self._path is not None:
            save_text(self._path, json.dumps({**self._identity, "measured": self._measured}) + "\n")
