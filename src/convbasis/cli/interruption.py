"""Long work that goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .results import STANDARD_OUTPUT


def checkpoint_of(output: Path) -> Path:
    """Return the file that keeps what is measured for an output so far: beside it."""
    return output.with_name(f"{output.name}.checkpoint")


@contextmanager
def keeping(*outputs: Path | None) -> Iterator[Path | None]:
    """Yield the checkpoint of the first output that is a file, None without one; remove it at the end.

    After Ctrl-C or a failure it stays, and the same command goes on there.
    """
    files = [output for output in outputs if output not in (None, STANDARD_OUTPUT)]
    checkpoint = checkpoint_of(files[0]) if files and files[0] is not None else None
    try:
        yield checkpoint
    except KeyboardInterrupt as stopped:
        if str(stopped) or checkpoint is None or not checkpoint.exists():
            raise
        raise KeyboardInterrupt(
            f"what was measured is kept in {str(checkpoint)!r}; the same command goes on there"
        ) from None
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
