"""Progress bars with the time left, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Step = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


def bars() -> Progress:
    """Return a display of several bars; a context manager."""
    return Progress(
        TextColumn("{task.description:<34}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@contextmanager
def one_bar(name: str, total: int = 1) -> Iterator[Step]:
    """Show one bar, and yield what moves it."""
    with bars() as display:
        task = display.add_task(name, total=total)
        yield lambda done, of: display.update(task, completed=done, total=of)
