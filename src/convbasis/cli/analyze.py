"""`convbasis analyze`: for every head of a model, what it looks at and which approximation suits it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..checks import check_nonnegative
from ..integrations.models import load_model
from ..integrations.profile import (
    TILES,
    TOLERANCES,
    LayerProfile,
    lengths,
    profile_layers,
)
from ..integrations.texts import read_text, text_tokens
from ..integrations.views import best_settings, lag_bands
from ..plan import HeadSetting
from ..plan.choice import choose
from ..plan.ladder import Measured, default_ladder
from ..report.content import Cell, Chart, HeadMap, HeadView, Line, Provenance, Report, Table
from .head_views import head_views, with_errors
from .interruption import keeping
from .progress import one_bar
from .results import check_outputs, deliver, provenance, rounded, source
from .words import in_words, numbers

_NONE_GOOD_ENOUGH = "exact: none is good enough"
_NONE_FASTER = "exact: none is faster"
_LEAST = 1e-7  # a logarithmic axis has no 0


def run_analyze(
    model: str,
    text: Path | None,
    length: int,
    layers: str | None,
    tolerance: float,
    seed: int,
    json_output: Path | None,
    page: Path | None,
    console: Console,
) -> None:
    """Analyze, print the tables, and write what is asked for."""
    check_nonnegative("tolerance", tolerance)
    check_outputs(json_output, page=page, inputs=[model, text])
    title, content = read_text(text)
    loaded = load_model(model)
    count = loaded.model.config.get_text_config().num_hidden_layers
    chosen = list(range(count)) if layers is None else numbers("layers", layers, 0, count - 1)
    ids = text_tokens(loaded.model, loaded.tokenizer, title, content, length)
    near = sorted({chosen[0], chosen[len(chosen) // 2], chosen[-1]})
    ladder = default_ladder(length)
    with keeping(json_output, page) as checkpoint:
        with one_bar("profiling layers", len(chosen)) as step:
            profiles = profile_layers(
                loaded.model,
                ids,
                chosen,
                seen=near,
                ladder=ladder,
                checkpoint=checkpoint,
                progress=step,
                seed=seed,
            )
        where = provenance(model=loaded.name, sources=[source(title, ids)])
        report = analysis_report(profiles, ladder, count, length, tolerance, where)
        deliver(report, console, json_output, page)


def analysis_report(
    profiles: dict[int, LayerProfile],
    ladder: Sequence[HeadSetting],
    layers: int,
    n: int,
    tolerance: float,
    where: Provenance,
) -> Report:
    """Return what the profiles of some layers say.

    Args:
        profiles: by layer number.
        ladder: the settings that were measured.
        layers: number of layers of the model.
        n: tokens of the text.
        tolerance: the largest 95 % bound of a head's relative error.
        where: the figures come from.
    """
    suits = _suits(profiles, ladder, n, tolerance)
    words = [word for own in suits.values() for word in own]
    heads = len(words) // len(profiles)
    approximated = sum(not word.startswith("exact") for word in words)
    sizes = lengths(n)

    def each(title: str, unit: str, values: Callable[[LayerProfile], Sequence[Cell]]) -> HeadMap:
        return _head_map(title, unit, {n: values(own) for n, own in profiles.items()}, layers, heads)

    maps = [
        _head_map(f"What suits within {tolerance:g}", "", suits, layers, heads),
        each("Smallest error estimate", "relative error, 95 % bound", _best_bounds),
        each(f"Attention on the {sizes.near} latest keys", "share", lambda own: own.near),
        each(
            f"Attention on 4 first and {sizes.columns} other columns", "share", lambda own: own.columns
        ),
        *(
            each(
                f"k of the logits within {level:g} nats, first {sizes.decomposed} tokens",
                "segments",
                lambda own, index=index: own.ranks[index],  # type: ignore[misc]
            )
            for index, level in enumerate(TOLERANCES)
        ),
    ]
    summary = (
        ("tokens", n),
        ("heads looked at", len(words)),
        (f"heads with a faster setting within {tolerance:g}", approximated),
        ("heads for which none is good enough", words.count(_NONE_GOOD_ENOUGH)),
        ("heads for which none is faster", words.count(_NONE_FASTER)),
    )
    return Report(
        title=f"Heads of {where.model}",
        provenance=where,
        summary=summary,
        maps=tuple(maps),
        heads=tuple(_head_views(profiles, ladder, n)),
        charts=(_settings_chart(profiles, ladder, n, tolerance), _lag_chart(profiles, n)),
        tables=(_layer_table(profiles, suits), _settings_table(profiles, ladder, n, words)),
        notes=(
            "What suits is the cheapest setting whose 95 % error bound is within the tolerance and "
            "that takes less time than exact attention here; times are the least of three on a "
            "machine that others may use too, and settings pay on long texts only.",
            "Shares are means over sampled queries; columns are found in other rows than those that "
            "weigh them.",
        ),
    )


def _suits(
    profiles: dict[int, LayerProfile], ladder: Sequence[HeadSetting], n: int, tolerance: float
) -> dict[int, list[str]]:
    measured = [Measured(own.bounds, own.errors) for own in profiles.values()]
    costs = next(iter(profiles.values())).costs
    planned = choose([measured], costs, ladder, tolerance).heads
    found = {}
    for (layer, own), heads in zip(profiles.items(), planned, strict=True):
        found[layer] = [
            in_words(head.setting, n)
            if head.setting is not None
            else (_NONE_FASTER if best <= tolerance else _NONE_GOOD_ENOUGH)
            for head, best in zip(heads, _best_bounds(own), strict=True)
        ]
    return found


def _best_bounds(own: LayerProfile) -> list[float]:
    return [rounded(min(bounds)) for bounds in zip(*own.bounds, strict=True)]


def _head_map(title: str, unit: str, values: dict[int, Any], layers: int, heads: int) -> HeadMap:
    """Return a map of all layers, with nothing for those that were not looked at."""
    nothing: tuple[Cell, ...] = (None,) * heads
    return HeadMap(title, unit, tuple(tuple(values.get(layer, nothing)) for layer in range(layers)))


def _head_views(
    profiles: dict[int, LayerProfile], ladder: Sequence[HeadSetting], n: int
) -> list[HeadView]:
    views: list[HeadView] = []
    for layer, own in profiles.items():
        words = [
            with_errors(ladder[index], n, own.bounds[index][head], own.errors[index][head])
            for head, index in enumerate(best_settings(own.bounds))
        ]
        views += head_views(layer, own.lag_weights, own.seen, words, n, TILES)
    return views


def _settings_chart(
    profiles: dict[int, LayerProfile], ladder: Sequence[HeadSetting], n: int, tolerance: float
) -> Chart:
    places = _places(profiles, ladder)
    names = tuple(in_words(setting, n) for setting in ladder)
    costs = tuple(cost for cost, _ in places)
    errors = tuple(max(error, _LEAST) for _, error in places)
    return Chart(
        title="Every setting for all heads",
        x_title="time / time of exact attention",
        y_title="relative error, median over heads",
        lines=(Line("settings", costs, errors, names, joined=False),),
        x_log=True,
        y_log=True,
        level=(tolerance, "tolerance"),
    )


def _lag_chart(profiles: dict[int, LayerProfile], n: int) -> Chart:
    lags = tuple(lag_bands(n))
    # A logarithmic axis begins after lag 0. Of all layers there would be too many lines.
    return Chart(
        title="Attention by lag, median over a layer's heads",
        x_title="lag, tokens",
        y_title="mean attention weight at the lag",
        lines=tuple(
            Line(
                f"layer {layer}",
                tuple(float(lag) for lag in lags[1:]),
                tuple(
                    rounded(max(statistics.median(band), _LEAST))
                    for band in list(zip(*own.lag_weights, strict=True))[1:]
                ),
            )
            for layer, own in profiles.items()
            if own.seen
        ),
        x_log=True,
        y_log=True,
    )


def _places(
    profiles: dict[int, LayerProfile], ladder: Sequence[HeadSetting]
) -> list[tuple[float, float]]:
    """Return for each setting its cost and the median error of all heads."""
    return [
        (
            rounded(statistics.median(own.costs[index] for own in profiles.values())),
            rounded(statistics.median(e for own in profiles.values() for e in own.errors[index])),
        )
        for index in range(len(ladder))
    ]


def _layer_table(profiles: dict[int, LayerProfile], suits: dict[int, list[str]]) -> Table:
    ranks = [f"k, {level:g} nats" for level in TOLERANCES]
    return Table(
        title="Medians over the heads of a layer",
        columns=("layer", "near", "columns", *ranks, "best error", "heads with one"),
        rows=tuple(
            (
                layer,
                rounded(statistics.median(own.near), 3),
                rounded(statistics.median(own.columns), 3),
                *(statistics.median(row) for row in own.ranks),
                rounded(statistics.median(_best_bounds(own)), 3),
                sum(not word.startswith("exact") for word in suits[layer]),
            )
            for layer, own in profiles.items()
        ),
    )


def _settings_table(
    profiles: dict[int, LayerProfile], ladder: Sequence[HeadSetting], n: int, words: list[str]
) -> Table:
    return Table(
        title="Settings",
        columns=("setting", "time / exact", "median error", "heads it suits"),
        rows=tuple(
            (in_words(setting, n), *place, words.count(in_words(setting, n)))
            for setting, place in zip(ladder, _places(profiles, ladder), strict=True)
        ),
    )
