"""The settings of hybrid attention, and what fits together."""

from __future__ import annotations

from typing import NamedTuple

from ..checks import check_nonnegative_int, check_positive_int, describe
from ..errors import InputError
from .window import BLOCK, QUERIES

FAR_FIELDS = ("none", "segments", "conv", "lowrank")
_SEEDS = 1 << 62  # what a generator takes, twice


class Settings(NamedTuple):
    """What a call computes; see `hybrid_attention`."""

    window: int
    sinks: int
    columns: int
    blocks: int
    far_field: str
    num_segments: int
    key_weights: bool
    samples: int
    seed: int
    strict: bool = False
    correction: bool = False

    @property
    def shared(self) -> int:
        """Queries whose windows begin at the same key, at the edge of a block; 1 for each its own."""
        if self.far_field == "conv":
            return 1
        if not self.blocks and not self.columns and self.far_field == "none":
            return 1
        # Strictly, blocks are chosen by the queries before: the fewer share, the nearer those are.
        return QUERIES if self.blocks and not self.strict else BLOCK

    @property
    def weighs_keys(self) -> bool:
        """Whether keys of segments have weights."""
        return self.key_weights and self.far_field == "segments"


def check_settings(settings: Settings) -> None:
    """Check each setting, and that they can be computed together."""
    for name, what in (
        ("window", "a number of tokens"),
        ("num_segments", "a number of segments"),
        ("samples", "a number of rows"),
    ):
        check_positive_int(name, getattr(settings, name), what)
    for name in ("sinks", "columns", "blocks", "seed"):
        check_nonnegative_int(name, getattr(settings, name))
    if settings.seed >= _SEEDS:
        raise InputError(f"seed={settings.seed} is too large; give one below 2^62")
    for name in ("key_weights", "strict", "correction"):
        given = getattr(settings, name)
        if not isinstance(given, bool):
            raise InputError(f"{name}={describe(given)} is neither True nor False")
    if settings.far_field not in FAR_FIELDS:
        raise InputError(
            f"far_field={describe(settings.far_field)} is not known; use one of "
            f"{', '.join(map(repr, FAR_FIELDS))}"
        )
    if settings.far_field == "conv" and settings.blocks:
        raise InputError(
            f"blocks={settings.blocks} with far_field='conv': a convolution cannot leave out keys that "
            "a block of queries has chosen; use blocks=0 or far_field='segments'"
        )
    if settings.strict and settings.far_field == "conv":
        raise InputError(
            "far_field='conv' with strict=True: its factors are fitted to rows of the whole prompt, "
            "and its transforms mix them; use far_field='segments' or 'none'"
        )
    if settings.far_field == "lowrank" and (settings.blocks or settings.strict):
        raise InputError(
            f"far_field='lowrank' with blocks={settings.blocks} and strict={settings.strict}: it "
            "cannot leave out keys that a block of queries has chosen, and its factors are fitted to "
            "rows of the whole prompt; use far_field='segments', or blocks=0 and strict=False"
        )
    if settings.strict and settings.correction:
        raise InputError(
            "correction=True with strict=True: the rows that correct a block of rows are its own, "
            "later ones among them; use correction=False"
        )
