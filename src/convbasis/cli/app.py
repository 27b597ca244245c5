"""The commands: their arguments and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from .exits import EXIT_CODES, debug, one_line_errors
from .results import screen

EXAMPLE = "Example: convbasis calibrate smollm2 --length 8192 -o plan.json"

# Plain help: boxes would leave no room for it in 80 columns.
app = typer.Typer(
    name="convbasis",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=f"{EXAMPLE}\n\n{EXIT_CODES}",
)

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a GGUF file, smollm2, or owner/name on the hub."),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="The result as JSON; - for stdout.")
]
Page = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="The result as an HTML page.")
]
Text = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="UTF-8 text; by default the library's prose."),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="FILE", help="UTF-8 text, repeatable; default: prose."),
]
PlanFile = Annotated[Path, typer.Option("--plan", metavar="FILE", help="The plan.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Of everything sampled.")]
MinLength = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Exact up to so many tokens; default: the plan's."),
]


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
    with_debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Causal attention and lower-triangular matrices in the conv basis."""
    debug.set(with_debug)


@app.command(epilog="Example: convbasis demo --length 1024 --output demo")
@one_line_errors
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
    json_output: Json = None,
) -> None:
    """Show the whole system, on planted input and real heads."""
    from .demo import run_demo

    run_demo(output, length, text, layers, seed, json_output, screen(json_output))


@app.command(epilog="Example: convbasis tune --threads 2")
@one_line_errors
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
    json_output: Json = None,
) -> None:
    """Fit the choices of backend="auto" to this machine."""
    from .tune import run_tune

    run_tune(output, device, threads, repeats, longest, json_output, screen(json_output))


@app.command(epilog="Example: convbasis doctor")
@one_line_errors
def doctor(
    device: Annotated[str, typer.Option(help="Device to run shapes on, as cpu or cuda.")] = "cpu",
    json_output: Json = None,
) -> None:
    """Tell what is installed here, and what would be chosen."""
    from .doctor import run_doctor

    run_doctor(device, json_output, screen(json_output))


@app.command(epilog="Example: convbasis analyze smollm2 --layers 0-3,15 --report heads.html")
@one_line_errors
def analyze(
    model: Model,
    text: Text = None,
    length: Annotated[int, typer.Option(min=64, metavar="N", help="Tokens of the text.")] = 2048,
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="As 0-3,15; all by default.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(metavar="E", help="Largest relative error of a head that suits.")
    ] = 0.1,
    seed: Seed = 0,
    json_output: Json = None,
    page: Page = None,
) -> None:
    """Tell what every head looks at, and what suits it.

    With --json FILE or --report FILE a stopped run goes on where it was.
    """
    from .analyze import run_analyze

    run_analyze(model, text, length, layers, tolerance, seed, json_output, page, screen(json_output))


@app.command(epilog="Example: convbasis calibrate smollm2 --length 8192 -o plan.json")
@one_line_errors
def calibrate(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The plan.", show_default=False)
    ],
    text: Texts = None,
    length: Annotated[int, typer.Option(min=64, metavar="N", help="Tokens of each text.")] = 4096,
    tolerance: Annotated[
        float, typer.Option(metavar="E", help="Largest relative error of a head.")
    ] = 0.4,
    margin: Annotated[
        float, typer.Option(metavar="P", help="Part of it that these texts may use.")
    ] = 0.6,
    budget: Annotated[
        float, typer.Option(metavar="KL", help="Nats that all heads may add up to; inf for any.")
    ] = 0.001,
    seed: Seed = 0,
    json_output: Json = None,
    page: Page = None,
) -> None:
    """Measure a model, and write a plan for long prompts.

    A stopped run goes on where it was: FILE.checkpoint keeps what is measured.
    """
    from .calibrate import run_calibrate

    run_calibrate(
        model, text or [], output, length, tolerance, margin, budget, seed, json_output, page,
        screen(json_output),
    )  # fmt: skip


@app.command(epilog="Example: convbasis compare smollm2 --plan plan.json --length 8192")
@one_line_errors
def compare(
    model: Model,
    plan: PlanFile,
    text: Texts = None,
    length: Annotated[int, typer.Option(min=64, metavar="N", help="Tokens: prompt and scored.")] = 4096,
    scored: Annotated[int, typer.Option(min=2, metavar="N", help="Last tokens, scored.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Timed runs.")] = 1,
    min_length: MinLength = None,
    fallback: Annotated[bool, typer.Option(help="Heads beyond the tolerance are exact again.")] = True,
    json_output: Json = None,
    page: Page = None,
) -> None:
    """Compare a plan with exact attention: loss, KL and time."""
    from .compare import run_compare

    run_compare(
        model, plan, text or [], length, scored, repeats, min_length, fallback, json_output, page,
        screen(json_output),
    )  # fmt: skip


@app.command(epilog="Example: convbasis generate smollm2 --plan plan.json --prompt-file book.txt")
@one_line_errors
def generate(
    model: Model,
    prompt_file: Annotated[
        Path, typer.Option(metavar="FILE", help="UTF-8 text to go on with.", show_default=False)
    ],
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="The plan, unless --exact.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to add.")] = 64,
    exact: Annotated[bool, typer.Option("--exact", help="Without a plan.")] = False,
    against_exact: Annotated[bool, typer.Option("--against-exact", help="Both, and compare.")] = False,
    min_length: MinLength = None,
    json_output: Json = None,
) -> None:
    """Continue a prompt greedily, attended to by a plan.

    The text goes to stdout, times and what the plan did to stderr.
    """
    from rich.console import Console

    from .generate import run_generate

    run_generate(
        model, plan, prompt_file, max_new_tokens, exact, against_exact, min_length, json_output,
        Console(stderr=True),
    )  # fmt: skip


@app.command(epilog="Example: convbasis bench --lengths 1024,4096,16384 --bases 4,64")
@one_line_errors
def bench(
    lengths: Annotated[str, typer.Option(metavar="LIST", help="Tokens.")] = "1024,4096,16384",
    bases: Annotated[str, typer.Option(metavar="LIST", help="Numbers of segments.")] = "1,16,64",
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Heads of each call.")] = 1,
    head_dim: Annotated[int, typer.Option(min=1, metavar="N", help="Entries of a query.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Timed runs.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Default: all.", show_default=False)
    ] = None,
    json_output: Json = None,
    page: Page = None,
) -> None:
    """Time attention beside SDPA on this machine."""
    from .bench import run_bench

    run_bench(lengths, bases, heads, head_dim, repeats, threads, json_output, page, screen(json_output))


@app.command(epilog="Example: convbasis decompose logits.npy --tol 0.5 -o basis.safetensors")
@one_line_errors
def decompose(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="A matrix: .npy, .npz or .safetensors.")
    ],
    tol: Annotated[float, typer.Option(min=0.0, metavar="E", help="Largest error of an entry.")] = 0.0,
    key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which array, where a file has several.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The basis, as safetensors."),
    ] = None,
    json_output: Json = None,
    page: Page = None,
) -> None:
    """Find the conv basis of a lower-triangular matrix."""
    from .decompose import run_decompose

    run_decompose(source, output, tol, key, json_output, page, screen(json_output))


@app.command(epilog="Example: convbasis report heads.json -o heads.html")
@one_line_errors
def report(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="What a command wrote with --json.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page.", show_default=False)
    ],
    json_output: Json = None,
) -> None:
    """Make an HTML page of a result kept as JSON."""
    from .report import run_report

    run_report(source, output, json_output, screen(json_output))
