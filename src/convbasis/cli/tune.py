"""`convbasis tune`: progress while it measures, then what was fitted and how well."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from ..convolve.rates import Rates
from ..errors import InputError
from ..report.content import Report, Table
from ..tune import LENGTHS, tune
from .progress import one_bar
from .results import check_outputs, deliver, provenance, rounded


def run_tune(
    output: Path | None,
    device: str,
    threads: int | None,
    repeats: int,
    longest: int,
    json_output: Path | None,
    console: Console,
) -> None:
    """Measure, fit, write the file and print a table."""
    check_outputs(json_output, output)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    before = torch.get_num_threads()
    lengths = tuple(n for n in LENGTHS if n <= longest)
    try:
        torch.set_num_threads(threads or before)
        with one_bar("measuring", 100) as step:
            done = tune(
                device=device,
                path=output,
                lengths=lengths,
                repeats=repeats,
                progress=lambda part: step(round(100 * part), 100),
            )
        where = provenance()
    finally:
        torch.set_num_threads(before)
    rows = zip(Rates._fields, (f"{rate:.2e}" for rate in done.rates), strict=True)
    report = Report(
        title="Rates of this machine",
        provenance=where,
        summary=(
            ("measurements", len(done.measurements)),
            ("typical error of the model", f"{done.typical_error:.0%}"),
            ("time of its choices over the best, geometric mean", rounded(done.loss)),
            ("the same, worst", rounded(done.worst_loss)),
        ),
        tables=(Table("Rates", ("amount", "seconds per unit"), tuple(rows)),),
        notes=(f"written to {done.path}",),
    )
    deliver(report, console, json_output, None)
