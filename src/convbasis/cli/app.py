"""The commands and what they have in common: options, error messages, exit codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from .. import __version__
from ..errors import ConvBasisError

app = typer.Typer(
    name="convbasis",
    help="Causal attention and lower-triangular matrices in the conv basis.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _one_line_errors(command: _Command) -> _Command:
    """Turn a convbasis error into one line on standard error and exit code 1."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except ConvBasisError as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from None

    return run  # type: ignore[return-value]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Causal attention and lower-triangular matrices in the conv basis."""


@app.command()
@_one_line_errors
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the picture and the figures.")] = Path(
        "demo"
    ),
    length: Annotated[int, typer.Option(min=64, max=8192, help="Tokens of real text.")] = 2048,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file instead of the standard library's prose.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Layers of the model, 0 to 29, separated by commas.")
    ] = "2,15,28",
    seed: Annotated[int, typer.Option(help="Of the planted input.")] = 0,
) -> None:
    """Decompose, recover and attend, on planted input and on real heads of SmolLM2-135M."""
    from .demo import run_demo

    run_demo(output, length, text, layers, seed, Console())


@app.command()
@_one_line_errors
def tune(
    output: Annotated[
        Path | None,
        typer.Option(help="File for the rates, instead of the one that choices are made from."),
    ] = None,
    device: Annotated[str, typer.Option(help="Device to measure on, such as cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to measure with; all by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each configuration.")] = 3,
    longest: Annotated[int, typer.Option(min=256, help="Longest sequence, in tokens.")] = 131072,
) -> None:
    """Measure this machine, and fit the model by which backend="auto" chooses to it."""
    from .tune import run_tune

    run_tune(output, device, threads, repeats, longest, Console())
