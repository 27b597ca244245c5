"""The command line program `convbasis`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..errors import MissingExtraError


def load() -> Callable[[], None]:
    """Return the program; a missing extra ends everything with one line that names it."""
    try:
        from .app import app
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        print(MissingExtraError("the command line", "cli", error), file=sys.stderr)
        sys.exit(1)
    return app


def main() -> None:
    """Load the program and run it."""
    load()()
