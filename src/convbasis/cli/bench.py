"""`convbasis bench`: attention of this library beside SDPA on this machine, over the length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention import conv_basis_attention
from ..hybrid import hybrid_attention
from ..report.content import Cell, Chart, Line, Provenance, Report, Table
from ..timing import interleaved_medians
from .progress import one_bar
from .results import check_outputs, deliver, provenance, rounded
from .words import numbers

_SDPA = "SDPA"
_HYBRID = "hybrid"


class Timed(NamedTuple):
    """Median seconds of every method at one length."""

    n: int
    seconds: dict[str, float]


def run_bench(
    lengths: str,
    bases: str,
    heads: int,
    head_dim: int,
    repeats: int,
    threads: int | None,
    json_output: Path | None,
    page: Path | None,
    console: Console,
) -> None:
    """Measure length by length, print the ratios, and write what is asked for.

    After Ctrl-C the lengths that are done are printed and written.
    """
    check_outputs(json_output, page=page)
    sizes = numbers("lengths", lengths, 64)
    counts = numbers("bases", bases, 1)
    before = torch.get_num_threads()
    found: list[Timed] = []
    stopped = False
    try:
        torch.set_num_threads(threads or before)
        with one_bar("lengths", len(sizes)) as step:
            for index, n in enumerate(sizes):
                found.append(_time(n, counts, heads, head_dim, repeats))
                step(index + 1, len(sizes))
    except KeyboardInterrupt:
        stopped = True
    finally:
        where = provenance()
        torch.set_num_threads(before)
    if stopped and not found:
        raise KeyboardInterrupt("no length was done")
    deliver(bench_report(found, heads, head_dim, where), console, json_output, page)
    if stopped:
        raise KeyboardInterrupt(f"{len(found)} of {len(sizes)} lengths are in the result")


@torch.no_grad()
def _time(n: int, bases: Sequence[int], heads: int, head_dim: int, repeats: int) -> Timed:
    generator = torch.Generator().manual_seed(n)
    query, key, value = torch.randn(3, 1, heads, n, head_dim, generator=generator).unbind()

    def ours(k: int) -> Callable[[], Tensor]:
        return lambda: conv_basis_attention(query, key, value, segment_length=-(-n // k))

    methods: dict[str, Callable[[], Tensor]] = {
        _SDPA: lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
        **{f"conv basis, k = {k}": ours(k) for k in bases if k <= n},
        _HYBRID: lambda: hybrid_attention(query, key, value),
    }
    return Timed(n, interleaved_medians(methods, repeats=repeats))


def crossover(points: Sequence[tuple[int, float]]) -> float | None:
    """Return the length from which on a method is faster, between measured ones; None if never.

    Args:
        points: lengths, ascending, with SDPA's time over the method's.
    """
    slower = [index for index, (_, ratio) in enumerate(points) if ratio < 1]
    if not slower:
        return float(points[0][0])
    last = slower[-1]
    if last == len(points) - 1:
        return None
    (n, low), (m, high) = points[last], points[last + 1]
    part = -math.log(low) / (math.log(high) - math.log(low))
    return float(n * (m / n) ** part)


def bench_report(found: Sequence[Timed], heads: int, head_dim: int, where: Provenance) -> Report:
    """Return times, ratios and crossovers.

    Args:
        found: in order of length.
        heads: of each call.
        head_dim: entries of a query.
        where: the figures come from.
    """
    names = list(dict.fromkeys(name for one in found for name in one.seconds if name != _SDPA))
    ratios = {
        name: [(one.n, one.seconds[_SDPA] / one.seconds[name]) for one in found if name in one.seconds]
        for name in names
    }
    return Report(
        title="Attention on this machine, beside SDPA",
        provenance=where,
        summary=(
            ("shape", f"{heads} heads of {head_dim}, float32, {where.threads} threads"),
            *((f"{name}: faster from", _from(points)) for name, points in ratios.items()),
        ),
        charts=(
            Chart(
                title="Speed against SDPA",
                x_title="tokens",
                y_title="time of SDPA / time of the method",
                lines=tuple(
                    Line(name, tuple(float(n) for n, _ in points), tuple(rounded(r) for _, r in points))
                    for name, points in ratios.items()
                ),
                x_log=True,
                y_log=True,
                level=(1.0, "as fast as SDPA"),
                crossings=_crossings(ratios),
            ),
        ),
        tables=(
            Table(
                "Time of SDPA / time of the method; below 1 the method loses",
                ("tokens", *names),
                tuple((one.n, *(_ratio(one, name) for name in names)) for one in found),
            ),
            Table(
                "Milliseconds",
                ("tokens", _SDPA, *names),
                tuple(
                    (one.n, *(_milliseconds(one, name) for name in (_SDPA, *names))) for one in found
                ),
            ),
        ),
        notes=(
            "Medians of interleaved runs on random input, everything included. Segments are uniform: "
            "searching for them takes time of its own. The conv basis is exact only where the logits "
            "have that structure, hybrid attention with its usual sizes only where few keys matter.",
        ),
    )


def _crossings(ratios: dict[str, list[tuple[int, float]]]) -> tuple[tuple[float, float, str], ...]:
    """Return where methods begin to be faster, between measured lengths, in order of length."""
    found = {name: crossover(points) for name, points in ratios.items()}
    inside = [
        (rounded(where, 2), 1.0, f"{name}: {rounded(where, 2):,.0f}")
        for name, where in found.items()
        if where is not None and where > ratios[name][0][0]
    ]
    return tuple(sorted(inside))


def _from(points: Sequence[tuple[int, float]]) -> str:
    where = crossover(points)
    if where is None:
        return "not among these lengths"
    first = points[0][0]
    return f"{first:,} tokens or fewer" if where == first else f"about {rounded(where, 2):,.0f} tokens"


def _ratio(one: Timed, name: str) -> Cell:
    return rounded(one.seconds[_SDPA] / one.seconds[name], 3) if name in one.seconds else None


def _milliseconds(one: Timed, name: str) -> Cell:
    return rounded(1000 * one.seconds[name], 4) if name in one.seconds else None
