"""The drawings of the pages: segments, a partitioned product, near and far keys.

python docs/figures/draw_figures.py                 # writes the PNG files beside this script
python docs/figures/draw_figures.py --output FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, RED, GREY = "#4c78a8", "#f58518", "#54a24b", "#e45756", "#b8bcc4"


def segments(plt: Any, np: Any) -> Any:
    """Draw a matrix of three segments as the sum of three sub-convolution matrices."""
    n, starts = 24, [0, 8, 15]
    t = np.arange(n)
    kernels = [np.exp(-t / 7.0), 0.55 + 0.35 * np.cos(t / 2.0), 1.0 - t / 12.0]
    lag = t[:, None] - t
    owner = np.searchsorted(starts, t, side="right") - 1
    whole = np.array([[kernels[owner[j]][lag[i, j]] if i >= j else np.nan for j in t] for i in t])
    parts = []
    before = np.zeros(n)
    for start, kernel in zip(starts, kernels, strict=True):
        difference = kernel - before
        inside = (lag >= 0) & (t[None] >= start)
        parts.append(np.where(inside, difference[np.clip(lag, 0, n - 1)], np.nan))
        before = kernel
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.1), constrained_layout=True)
    titles = ["H: three segments", *(f"conv(b{r}, {n - start})" for r, start in enumerate(starts, 1))]
    for axis, matrix, title, sign in zip(
        axes, [whole, *parts], titles, ["", "=", "+", "+"], strict=True
    ):
        axis.imshow(matrix, cmap="RdBu_r", vmin=-1.2, vmax=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(starts)
        axis.set_yticks([])
        axis.text(-0.1, 0.5, sign, transform=axis.transAxes, fontsize=16, ha="center", va="center")
        for start in starts[1:] if matrix is whole else []:
            axis.plot([start - 0.5] * 2, [start - 0.5, n - 0.5], color="black", lw=1.2)
    axes[0].set_xlabel("key j", fontsize=9)
    axes[0].set_ylabel("query i", fontsize=9)
    return figure


def partition(plt: Any, np: Any) -> Any:
    """Draw pieces, blocks and one window of a partitioned product."""
    figure, (matrix, kernel) = plt.subplots(
        1, 2, figsize=(9, 3.6), width_ratios=[1, 1.15], constrained_layout=True
    )
    n, size, starts = 48, 8, [0, 20]
    pieces = [(0, 8), (8, 8), (16, 4), (20, 8), (28, 8), (36, 8), (44, 4)]
    for first, width in pieces:
        color = BLUE if first < starts[1] else ORANGE
        matrix.fill(
            [first, first + width, first + width, first],
            [first, first + width, n, n],
            color,
            alpha=0.35,
        )
        matrix.plot([first, first], [first, n], color="white", lw=1)
    for block in range(0, n, size):
        matrix.plot([0, n], [block, block], color=GREY, lw=0.8)
    matrix.add_patch(plt.Rectangle((8, 32), 8, 8, fill=False, ec="black", lw=2))
    matrix.annotate(
        "one block, one piece", (16, 36), (24, 10), fontsize=9, arrowprops={"arrowstyle": "->"}
    )
    matrix.set(xlim=(0, n), ylim=(n, 0), xticks=starts, aspect="equal")
    matrix.set_xticklabels(["start 1", "start 2"], fontsize=9)
    matrix.set_yticks(
        [size * (i + 0.5) for i in range(6)], [f"block {i}" for i in range(6)], fontsize=8
    )
    matrix.set_title("columns in pieces of S, rows in blocks of M", fontsize=10)
    t = np.linspace(0, n, 400)
    kernel.plot(t, np.exp(-t / 22) * (1.2 + 0.3 * np.sin(t / 2.5)), color=BLUE, lw=2)
    kernel.axvspan(16, 32, color=GREY, alpha=0.4)
    kernel.text(24, 1.35, "window of S + M entries", ha="center", fontsize=9)
    kernel.annotate("", (16, 0.12), (24, 0.12), arrowprops={"arrowstyle": "<->"})
    kernel.annotate("", (24, 0.12), (32, 0.12), arrowprops={"arrowstyle": "<->"})
    kernel.text(20, 0.17, "S", ha="center", fontsize=9)
    kernel.text(28, 0.17, "M", ha="center", fontsize=9)
    kernel.set(xlabel="lag", ylim=(0, 1.55), xlim=(0, n), yticks=[])
    kernel.set_title("what the marked block needs of the first kernel", fontsize=10)
    return figure


def near_far(plt: Any, np: Any) -> Any:
    """Draw which keys the parts of hybrid attention cover."""
    n, block = 96, 8
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    code = np.full((n, n), np.nan)
    code[i >= j] = 0
    segment = (j // 16) % 2
    code = np.where((i >= j) & (segment == 1), 0.5, code)
    generator = np.random.default_rng(4)
    for row in range(0, n, 2 * block):
        for _ in range(1 if row >= 3 * block else 0):
            column = block * generator.integers(1, max(2, row // block - 1))
            code[row : row + 2 * block, column : column + block] = 4
    for column in (19, 30, 31, 50):
        code[column + 1 :, column] = 3
    code[:, :3] = 2
    code[(i - j < 12)] = 1
    code[i < j] = np.nan
    names = {
        1: ("window: the latest", BLUE),
        2: ("sinks: the first", GREEN),
        3: ("columns: heavy for all", RED),
    }
    names |= {4: ("blocks: heavy for these queries", ORANGE), 0: ("far: means of segments", "#e3e5ea")}
    names |= {0.5: ("", "#d0d3db")}
    picture = np.ones((n, n, 3))
    for value, (_, color) in names.items():
        picture[code == value] = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    figure, axis = plt.subplots(figsize=(6.8, 3.6), constrained_layout=True)
    axis.imshow(picture)
    axis.set(xlabel="key", ylabel="query", xticks=[], yticks=[])
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for name, color in names.values() if name]
    labels = [name for name, _ in names.values() if name]
    axis.legend(
        handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9
    )
    return figure


def main(output: Path = HERE) -> list[Path]:
    """Draw all figures into a folder."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for draw in (segments, partition, near_far):
        figure = draw(plt, np)
        place = output / f"{draw.__name__.replace('_', '-')}.png"
        figure.savefig(place, dpi=130, metadata={"Software": None})
        plt.close(figure)
        written.append(place)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE)
    for path in main(parser.parse_args().output):
        print(path)
