"""`convbasis tune`: progress while it measures, then what was fitted and how well."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ..convolve.rates import Rates
from ..errors import InputError
from ..tune import LENGTHS, tune


def run_tune(
    output: Path | None,
    device: str,
    threads: int | None,
    repeats: int,
    longest: int,
    console: Console,
) -> None:
    """Measure, fit, write the file and print a table."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    before = torch.get_num_threads()
    lengths = tuple(n for n in LENGTHS if n <= longest)
    try:
        torch.set_num_threads(threads or before)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=1.0)
            done = tune(
                device=device,
                path=output,
                lengths=lengths,
                repeats=repeats,
                progress=lambda part: progress.update(task, completed=part),
            )
    finally:
        torch.set_num_threads(before)
    table = Table("amount", "seconds per unit", title=f"{len(done.measurements)} measurements")
    for name, rate in zip(Rates._fields, done.rates, strict=True):
        table.add_row(name, f"{rate:.2e}")
    console.print(table)
    console.print(
        f"typical error of the model {done.typical_error:.0%}; its choices take "
        f"{done.loss - 1:.1%} longer than the best (geometric mean; worst {done.worst_loss - 1:.0%})"
    )
    console.print(f"written to {escape(str(done.path))}")
