"""Heads from near for a page: which ones, how fine, and their captions."""

from __future__ import annotations

from collections.abc import Sequence

from ..integrations.views import SeenHead, lag_bands, tile_size
from ..plan import HeadSetting
from ..report.content import HeadView
from .words import in_words

_FINE, _COARSE = 64, 32
_FINE_HEADS, _COARSE_HEADS = 72, 288
"""So many heads of 64 or of 32 tiles take about 2 MB of a page, whatever the model's size."""


def near_layers(layers: int, heads: int) -> tuple[list[int], int]:
    """Return which layers' heads a page shows from near, first and last among them, and the tiles.

    Args:
        layers: of the model.
        heads: of a layer.
    """
    fits = max(1, _COARSE_HEADS // heads)
    tiles = _FINE if layers * heads <= _FINE_HEADS else _COARSE
    if fits >= layers:
        return list(range(layers)), tiles
    return sorted({round(i * (layers - 1) / max(1, fits - 1)) for i in range(fits)}), tiles


def head_views(
    layer: int,
    lag_weights: Sequence[Sequence[float]],
    seen: Sequence[SeenHead],
    settings: Sequence[str],
    n: int,
    tiles: int,
) -> list[HeadView]:
    """Return the views of a layer's heads; of heads that are not seen from near the kernel alone.

    Args:
        layer: its number.
        lag_weights: of every head.
        seen: every head, or none.
        settings: for each head in words what stands for it, with its error.
        n: tokens of the text.
        tiles: of the pictures, across and down, at most.
    """
    tile = tile_size(n, tiles)
    lags = tuple(lag_bands(n))
    pictures: Sequence[SeenHead | None] = seen or [None] * len(lag_weights)
    return [
        HeadView(
            layer=layer,
            head=head,
            caption=(
                f"No picture of this layer; approximation: {words}"
                if picture is None
                else f"Share of a query's attention that goes to each tile of {tile} keys, mean over "
                f"tiles of {tile} queries; approximation: {words}"
            ),
            exact=None if picture is None else tuple(map(tuple, picture.exact)),
            approximate=(
                None
                if picture is None or picture.approximate is None
                else tuple(map(tuple, picture.approximate))
            ),
            lags=lags,
            lag_weights=tuple(weights),
            tile=tile,
        )
        for head, (weights, picture, words) in enumerate(
            zip(lag_weights, pictures, settings, strict=True)
        )
    ]


def with_errors(setting: HeadSetting | None, n: int, estimated: float, true: float | None) -> str:
    """Return a setting in words, with its errors where it is one."""
    if setting is None:
        return "none, this head attends exactly"
    measured = "" if true is None else f", true error {true:.2g}"
    return f"{in_words(setting, n)}, estimated error {estimated:.2g}{measured}"
