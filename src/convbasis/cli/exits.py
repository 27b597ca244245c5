"""How the program ends: its exit codes, and every failure as one line on standard error."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from enum import IntEnum
from functools import wraps
from typing import Any, TextIO, TypeVar

import typer

from ..errors import ConvBasisError

_Command = TypeVar("_Command", bound=Callable[..., Any])

debug: ContextVar[bool] = ContextVar("convbasis_debug", default=False)
"""Whether failures show their traceback."""


class Exit(IntEnum):
    """The exit codes; the shell knows no others from this program."""

    DONE = 0
    INPUT = 1
    USAGE = 2
    SYSTEM = 3
    UNEXPECTED = 4
    INTERRUPTED = 130


EXIT_CODES = (
    "Exit codes: 0 done; 1 input that cannot be used, or a missing extra; 2 wrong options; 3 a file "
    "that cannot be read or written; 4 an unexpected error; 130 interrupted, finished work is kept."
)


def one_line_errors(command: _Command) -> _Command:
    """Turn failures of a command into one line on standard error and their exit code; warnings too."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return command(*args, **options)
        except KeyboardInterrupt as stopped:
            _say(f"interrupted{f'; {stopped}' if str(stopped) else ''}", "yellow")
            raise typer.Exit(Exit.INTERRUPTED) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            code, message = _describe(error)
            if debug.get():
                traceback.print_exc()
                raise typer.Exit(code) from None
            _say(f"error: {message}", "red")
            raise typer.Exit(code) from None

    return run  # type: ignore[return-value]


def _describe(error: Exception) -> tuple[Exit, str]:
    if isinstance(error, ConvBasisError):
        return Exit.INPUT, str(error)
    if isinstance(error, OSError):
        where = f": {str(error.filename)!r}" if error.filename is not None else ""
        return Exit.SYSTEM, f"{error.strerror or error}{where}"
    kind = type(error).__name__
    return Exit.UNEXPECTED, f"unexpected {kind}: {error} (convbasis --debug ... shows where)"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as the warnings module would, without its place in the code."""
    _say(f"warning: {message}", "yellow")


def _say(message: str, color: str) -> None:
    # Text from files and file names must neither break the line nor steer the terminal.
    line = "".join(c if c.isprintable() else " " for c in " ".join(message.split()))
    typer.secho(line, fg=color, err=True)
