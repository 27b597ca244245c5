"""The command line program `convbasis`."""

from __future__ import annotations

import sys

from ..errors import MissingExtraError


def main() -> None:
    """Run the program; a missing extra ends it with one line that names it."""
    try:
        from .app import app
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        print(MissingExtraError("the command line", "cli", error), file=sys.stderr)
        sys.exit(2)
    app()
