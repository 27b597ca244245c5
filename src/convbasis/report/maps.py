"""Maps of layers by heads as tables of coloured cells, which are also the controls."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Set
from html import escape

from .content import Cell, HeadMap
from .scale import Scale, scale_of
from .tables import details, table_html
from .words import cell_text, number_text

_STEPS = 4
_CATEGORY_COLOURS = 8
_MANY_LAYERS = 40
Places = Set[tuple[int, int]]
_Paint = Callable[[Cell], tuple[str, str]]
"""From a cell to the attributes and the content of its element."""


def map_html(one: HeadMap, index: int, viewed: Places) -> str:
    """Return a map with its legend and its figures; heads of `viewed` are marked.

    Args:
        one: the map.
        index: its number on the page, from which names of elements are made.
        viewed: layer and head of every head that has a view.
    """
    words = [cell for row in one.values for cell in row if isinstance(cell, str)]
    numbers = [cell for row in one.values for cell in row if isinstance(cell, int | float)]
    if words:
        letters = _letters(words)
        legend = _words_legend(letters, Counter(words))
        rows = _rows(one, viewed, lambda cell: _word_paint(letters, cell))
    else:
        scale = scale_of([float(number) for number in numbers])
        legend = _scale_legend(scale, one.unit) if numbers else '<p class="muted">nothing</p>'
        rows = _rows(one, viewed, lambda cell: _number_paint(scale, cell))
    heads = range(len(one.values[0]))
    labels = "".join(f'<th scope="col">{_every(head, len(heads))}</th>' for head in heads)
    name = f"map-{index}"
    size = "wide" if len(heads) > 16 else "narrow"
    tall = ' class="tall"' if len(one.values) > _MANY_LAYERS else ""
    figures = table_html(
        f"{one.title}: figures",
        ("layer", *(f"head {head}" for head in heads)),
        tuple((str(layer), *row) for layer, row in enumerate(one.values)),
    )
    return (
        f'<figure class="map {size}"><figcaption id="{name}">{escape(one.title)}</figcaption>'
        f'<div class="scroll"><table role="grid"{tall} aria-labelledby="{name}" data-map="{index}">'
        f'<thead><tr><td class="corner">layer\\head</td>{labels}</tr></thead><tbody>{rows}</tbody>'
        f"</table></div>{legend}{details(figures)}</figure>"
    )


def _rows(one: HeadMap, viewed: Places, paint: _Paint) -> str:
    parts = []
    for layer, row in enumerate(one.values):
        cells = []
        for head, cell in enumerate(row):
            attributes, text = paint(cell)
            unit = f" ({one.unit})" if one.unit and cell is not None else ""
            label = escape(f"Layer {layer}, head {head}: {cell_text(cell)}{unit}")
            mark = ' data-viewed=""' if (layer, head) in viewed else ""
            cells.append(
                '<td role="gridcell" tabindex="-1" aria-selected="false" '
                f'aria-label="{label}" title="{label}" '
                f'data-layer="{layer}" data-head="{head}"{mark} {attributes}>{text}</td>'
            )
        head_cell = f'<th scope="row">{_every(layer, len(one.values))}</th>'
        parts.append(f"<tr>{head_cell}{''.join(cells)}</tr>")
    return "".join(parts)


def _every(number: int, count: int) -> str:
    """Return the number, or nothing where numbers would stand too close."""
    return str(number) if count <= 16 or number % (2 if count <= 40 else 8) == 0 else ""


def _number_paint(scale: Scale, cell: Cell) -> tuple[str, str]:
    if not isinstance(cell, int | float):
        return 'class="none"', ""
    place = min(max(scale.position(float(cell)), 0.0), 1.0) * _STEPS
    step = min(int(place), _STEPS - 1)
    part = round(100 * (place - step))
    return f'style="background:color-mix(in srgb,var(--s{step + 1}) {part}%,var(--s{step}))"', ""


def _word_paint(letters: dict[str, str], cell: Cell) -> tuple[str, str]:
    if not isinstance(cell, str):
        return 'class="none"', ""
    return f'class="word" style="background:{_colour(letters, cell)}"', letters[cell]


def _colour(letters: dict[str, str], word: str) -> str:
    return f"var(--w{list(letters).index(word) % _CATEGORY_COLOURS})"


def _letters(words: list[str]) -> dict[str, str]:
    """Return a letter for each word, the most frequent word first."""
    alphabet = string.ascii_uppercase
    names = [*alphabet, *(first + second for first in alphabet for second in alphabet)]
    return {
        word: names[index % len(names)] for index, (word, _) in enumerate(Counter(words).most_common())
    }


def _words_legend(letters: dict[str, str], counts: Counter[str]) -> str:
    entries = "".join(
        f'<li><span class="word" style="background:{_colour(letters, word)}">{letter}</span>'
        f'<span>{escape(word)} <span class="muted">({counts[word]:,})</span></span></li>'
        for word, letter in letters.items()
    )
    return f'<ul class="legend words">{entries}</ul>'


def _scale_legend(scale: Scale, unit: str) -> str:
    if scale.high == scale.low:
        ticks = f"<span>all {number_text(scale.low)}</span>"
    else:
        at = (0.0, 0.5, 1.0)
        ticks = "".join(f"<span>{number_text(float(f'{scale.value(t):.2g}'))}</span>" for t in at)
    kind = ", ".join([unit] * bool(unit) + ["logarithmic"] * scale.log)
    return (
        '<div class="legend"><div class="ramp" aria-hidden="true"></div>'
        f'<div class="ticks">{ticks}</div><p class="muted">{escape(kind)}</p></div>'
    )
