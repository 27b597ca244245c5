"""What an approximated head computes, with sizes that grow with the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..checks import check_nonnegative, check_nonnegative_int, check_positive_int, describe
from ..errors import InputError
from ..hybrid import FAR_FIELDS
from ..hybrid.window import BLOCK

_LARGEST, _LARGEST_POWER = 1 << 40, 4.0  # of what a file may ask for


class ConcreteSetting(NamedTuple):
    """The sizes of a `HeadSetting` for one prompt length: arguments of hybrid attention."""

    window: int
    """Latest keys that every query sees, in tokens."""
    sinks: int
    """First tokens that every query sees."""
    columns: int
    """Heaviest single keys."""
    blocks: int
    """Heaviest key blocks of each query block."""
    far_field: str
    """What stands for all other keys: ``"none"``, ``"segments"``, ``"conv"`` or
            ``"lowrank"``."""
    key_weights: bool
    """Whether the keys of a segment are weighed by what sampled rows look at."""
    correction: bool = False
    """Whether exact rows correct the others."""


@dataclass(frozen=True)
class Size:
    """A size that grows with the prompt.

    At a prompt of n tokens it is ``size * (n / length) ** power``, rounded up to a whole multiple of
    `multiple`; at the calibrated length it is thus `size` itself, rounded up.

    Attributes:
        size: tokens (or blocks) at the calibrated length, >= 0.
        length: the calibrated length, in tokens.
        power: of the prompt length: 0 stays as it is, 1 keeps its share of the prompt.
        multiple: what to round up to.

    Example:
        >>> window = Size(256, length=4096, power=0.5, multiple=64)
        >>> window.at(4096), window.at(16384), window.at(5000)
        (256, 512, 320)
    """

    size: int
    length: int
    power: float = 0.0
    multiple: int = 1

    def __post_init__(self) -> None:
        """Check every field."""
        check_nonnegative_int("size", self.size)
        check_positive_int("length", self.length, "the calibrated length in tokens")
        if check_nonnegative("power", self.power) > _LARGEST_POWER:
            raise InputError(f"power={self.power} is more than {_LARGEST_POWER}, growth beyond any use")
        check_positive_int("multiple", self.multiple, "what the size is rounded up to")
        for name in ("size", "length", "multiple"):
            if getattr(self, name) > _LARGEST:
                raise InputError(f"{name}={getattr(self, name)} is more than {_LARGEST}")

    def at(self, n: int) -> int:
        """Return the size for a prompt of n tokens."""
        grown = self.size * (n / self.length) ** self.power
        # Rounding of the power must not carry a whole number to the next multiple.
        return math.ceil(grown / self.multiple - 1e-9) * self.multiple


@dataclass(frozen=True)
class HeadSetting:
    """What one approximated head computes; sizes are whole numbers or grow with the prompt (`Size`).

    Attributes:
        window: latest keys that every query sees, in tokens, >= 1.
        sinks: first tokens that every query sees.
        columns: heaviest single keys, found by sampled rows.
        blocks: heaviest key blocks of each query block.
        far_field: what stands for all other keys: ``"none"`` (nothing), ``"segments"``, ``"conv"`` or
            ``"lowrank"``.
        key_weights: weigh the keys of a segment by what sampled rows look at.
        correction: correct every row by the mean difference in exact rows near it.

    Example:
        >>> setting = HeadSetting(window=Size(256, length=4096, power=0.5, multiple=64), columns=32)
        >>> setting.at(16384)
        ConcreteSetting(window=512, sinks=4, columns=32, blocks=0, far_field='none', key_weights=False,
                        correction=False)
    """

    window: int | Size = 256
    sinks: int | Size = 4
    columns: int | Size = 64
    blocks: int | Size = 0
    far_field: str = "none"
    key_weights: bool = False
    correction: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("window", "sinks", "columns", "blocks"):
            value = getattr(self, name)
            if not isinstance(value, Size) and check_nonnegative_int(name, value) > _LARGEST:
                raise InputError(f"{name}={value} is more than {_LARGEST}")
        if self.window == 0 or (isinstance(self.window, Size) and self.window.size == 0):
            raise InputError("window=0 leaves a query without its own key; give at least 1 token")
        if self.far_field not in FAR_FIELDS:
            raise InputError(
                f"far_field={describe(self.far_field)} is not known; "
                f"use one of {', '.join(map(repr, FAR_FIELDS))}"
            )
        for name in ("key_weights", "correction"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={describe(getattr(self, name))} is not True or False")
        if self.far_field == "conv" and self.blocks != 0:
            raise InputError(
                f"far_field='conv' with blocks={self.blocks}: a convolution cannot leave out what "
                "blocks see; give blocks=0"
            )
        if self.far_field == "lowrank" and self.blocks != 0:
            raise InputError(
                f"far_field='lowrank' with blocks={self.blocks}: low rank cannot leave out what blocks "
                "see; give blocks=0"
            )

    def at(self, n: int) -> ConcreteSetting:
        """Return the sizes for a prompt of n tokens; those counted in keys are at most n."""
        return ConcreteSetting(
            window=max(1, min(_at(self.window, n), n)),
            sinks=min(_at(self.sinks, n), n),
            columns=min(_at(self.columns, n), n),
            blocks=min(_at(self.blocks, n), -(-n // BLOCK)),
            far_field=self.far_field,
            key_weights=self.key_weights,
            correction=self.correction,
        )


def _at(size: int | Size, n: int) -> int:
    return size.at(n) if isinstance(size, Size) else size
