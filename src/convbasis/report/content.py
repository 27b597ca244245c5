"""What a command found, as plain data: the same for its --json and for a report."""

from __future__ import annotations

from dataclasses import dataclass, field

Cell = str | float | int | None


@dataclass(frozen=True)
class Source:
    """A text that was looked at."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """Where the figures come from."""

    command: str
    """As typed, without the program's folder."""
    created: str
    """ISO 8601, UTC."""
    versions: dict[str, str]
    """Of convbasis, torch, python and what else took part."""
    threads: int
    machine: str
    model: str | None = None
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class HeadMap:
    """One figure or word for each head: layers down, heads across."""

    title: str
    unit: str
    """As ``"relative error"``; empty for words."""
    values: tuple[tuple[Cell, ...], ...]
    """For each layer, for each head; numbers all, or words all; None for nothing."""


@dataclass(frozen=True)
class HeadView:
    """One head from near: its attention, what stands for it, and its kernel by lag."""

    layer: int
    head: int
    caption: str
    exact: tuple[tuple[float, ...], ...] | None
    """Square and lower-triangular, of a stretch or of means over tiles; None for a kernel alone."""
    approximate: tuple[tuple[float, ...], ...] | None
    """The same shape; None where the head attends exactly, or there is no picture."""
    lags: tuple[int, ...]
    lag_weights: tuple[float, ...]
    """Mean attention weight at each lag."""
    first: int = 0
    """Position of the first token shown."""
    tile: int = 1
    """Tokens of one row or column of the matrices: 1 for single tokens, more for means over tiles."""


@dataclass(frozen=True)
class Line:
    """Points of one method."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    labels: tuple[str, ...] = ()
    """One for each point, or none."""
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes."""

    title: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    x_log: bool = False
    y_log: bool = False
    marked: tuple[float, float, str] | None = None
    """A point that stands out, as the plan's, with its name."""
    level: tuple[float, str] | None = None
    """A value of y that means something, as 1 for "no faster", with its name."""
    crossings: tuple[tuple[float, float, str], ...] = ()
    """Points where lines cross the level, with their names."""


@dataclass(frozen=True)
class Table:
    """Rows for people."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Report:
    """Everything that a command found."""

    title: str
    provenance: Provenance
    summary: tuple[tuple[str, Cell], ...] = ()
    """What a reader wants first: names and values."""
    maps: tuple[HeadMap, ...] = ()
    heads: tuple[HeadView, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = field(default=())
    """Sentences: limits of what was measured, warnings."""
