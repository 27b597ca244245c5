"""Figures as PNG, drawn by matplotlib without any display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import MissingExtraError


class Triple(NamedTuple):
    """An attention matrix, what a conv basis makes of it, and the name of the pair."""

    title: str
    exact: Tensor
    approximate: Tensor


class Curve(NamedTuple):
    """One line of error against k."""

    label: str
    k: Sequence[int]
    error: Sequence[float]


class Series(NamedTuple):
    """Times of one method by sequence length."""

    label: str
    points: Sequence[tuple[int, float]]
    """Tokens and seconds, ascending."""
    extrapolated_from: int | None = None
    """The first length whose time was not measured; None if all were."""


def times_figure(series: Sequence[Series], title: str, path: Path) -> None:
    """Draw seconds against tokens, both in powers; what was extrapolated is dashed.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure((7.5, 5))
    axes = figure.add_subplot()
    for one in series:
        first = one.extrapolated_from
        measured = [point for point in one.points if first is None or point[0] < first]
        line = axes.loglog(*zip(*measured, strict=True), "o-", label=one.label)[0]
        rest = [point for point in one.points if first is not None and point[0] >= first]
        if rest:
            label = f"{one.label}, extrapolated by n²"
            axes.loglog(
                *zip(*measured[-1:], *rest, strict=True), "o--", color=line.get_color(), label=label
            )
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def loss_figure(curves: Mapping[str, Sequence[float]], path: Path, *, smooth: int = 20) -> None:
    """Draw training losses in nats per byte against steps, as running means of some steps.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure((7.5, 5))
    axes = figure.add_subplot()
    for name, losses in curves.items():
        means = [
            sum(losses[max(0, i - smooth + 1) : i + 1]) / min(smooth, i + 1) for i in range(len(losses))
        ]
        axes.plot(range(1, len(means) + 1), means, label=name)
    axes.set_xlabel("steps")
    axes.set_ylabel(f"training loss, nats per byte (mean of {smooth} steps)")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def attention_figure(triples: Sequence[Triple], curves: Sequence[Curve], path: Path) -> None:
    """Draw matrices (exact, approximation, difference) in rows and the curves beside them.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure((15, 4.2 * len(triples)))
    grid = figure.add_gridspec(len(triples), 5, width_ratios=[1, 1, 1, 0.04, 1.25])
    for row, triple in enumerate(triples):
        panels = {
            f"{triple.title}: exact": triple.exact,
            "conv basis": triple.approximate,
            "difference (absolute)": (triple.exact - triple.approximate).abs(),
        }
        image = None
        for column, (name, matrix) in enumerate(panels.items()):
            axes = figure.add_subplot(grid[row, column])
            shown = matrix.double().clamp(min=1e-6).log10().tolist()
            image = axes.imshow(shown, vmin=-4, vmax=0, cmap="magma", interpolation="nearest")
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("key")
            axes.set_ylabel("query")
        bar = figure.colorbar(image, cax=figure.add_subplot(grid[row, 3]))
        bar.set_label("log10 of the attention weight", fontsize=8)
    axes = figure.add_subplot(grid[:, 4])
    _error_axes(axes, curves)
    _save(figure, path)


def error_figure(panels: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Draw error against k, one panel for each named group of curves, on a shared scale.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure = _figure((6.5 * columns, 4.5 * rows))
    shared = None
    for index, (title, curves) in enumerate(panels.items()):
        shared = figure.add_subplot(rows, columns, index + 1, sharey=shared)
        _error_axes(shared, curves)
        shared.set_title(title)
    _save(figure, path)


def _error_axes(axes: Any, curves: Sequence[Curve]) -> None:
    for curve in curves:
        axes.plot(curve.k, [max(e, 1e-7) for e in curve.error], marker="o", label=curve.label)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("number of bases k")
    axes.set_ylabel("relative error of the output (1 = as large as the output)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def require_matplotlib() -> None:
    """Raise MissingExtraError now, rather than after long work, if matplotlib is not installed."""
    _figure((1, 1))


def pareto_figure(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, path: Path) -> None:
    """Draw KL against attention time, each line of one way to choose what heads compute.

    Args:
        lines: for each name its points: time over exact attention's, and KL in nats.
        title: of the figure.
        path: the PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure((7.5, 5))
    axes = figure.add_subplot()
    for name, points in lines.items():
        axes.semilogy(*zip(*points, strict=True), "o-", label=name)
    axes.axvline(1.0, color="grey", linestyle=":")
    axes.set_xlim(left=0.0)
    axes.set_xlabel("attention time / that of exact attention")
    axes.set_ylabel("KL(exact || approximate), nats")
    axes.set_title(title)
    axes.legend()
    _save(figure, path)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing figures", "report", error) from error
    return Figure(figsize=size, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=110)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
