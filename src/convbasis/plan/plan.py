"""The plan of a model, as Python sees it and as a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..checks import check_nonnegative, check_nonnegative_int, check_positive_int, describe
from ..errors import InputError
from ..storage import save_text
from .model import ModelShape
from .settings import HeadSetting, Size


@dataclass(frozen=True)
class HeadPlan:
    """What was decided for one head, and what calibration measured.

    Attributes:
        setting: what the head computes; None for exact attention.
        error: the estimated relative L2 error of its output (95 % bound); 0 for exact attention.
        cost: its measured time relative to exact attention's at the calibrated length.
    """

    setting: HeadSetting | None
    error: float = 0.0
    cost: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        if self.setting is not None and not isinstance(self.setting, HeadSetting):
            raise InputError(f"setting is {describe(self.setting)}; a HeadSetting or None is wanted")
        check_nonnegative("error", self.error)
        check_nonnegative("cost", self.cost)


@dataclass(frozen=True, repr=False)
class Plan:
    """For every head of a model, what its attention computes over a long prompt.

    Attributes:
        model: the model's kind and sizes.
        texts_sha256: fingerprint of the token ids of the calibration texts, 64 hexadecimal digits.
        tolerance: the largest estimated relative L2 error (95 % bound) of an approximated head's
            output; 0.1 is 10 %.
        calibrated_length: tokens of the calibration prompts.
        min_length: prompts of at most so many tokens are attended exactly: the measured crossover.
        heads: for each layer, one `HeadPlan` for each query head.
        predicted_kl: what the heads' errors in the calibration texts add up to: KL(exact || planned) of
            the distribution of a token after them, in nats; None if it was not predicted.
        weights_sha256: fingerprint of the model's weights, 64 hexadecimal digits; None if it was not
            taken.

    Example:
        >>> shape = ModelShape("tiny", "llama", layers=1, heads=2, kv_heads=1, head_dim=8)
        >>> heads = ((HeadPlan(HeadSetting(window=64), error=0.02, cost=0.3), HeadPlan(None)),)
        >>> plan = Plan(shape, "0" * 64, 0.1, calibrated_length=4096, min_length=1024, heads=heads)
        >>> plan
        <Plan for 'tiny': 1 of 2 heads approximated, tolerance 0.1, calibrated at 4096 tokens>
    """

    model: ModelShape
    texts_sha256: str
    tolerance: float
    calibrated_length: int
    min_length: int
    heads: tuple[tuple[HeadPlan, ...], ...]
    predicted_kl: float | None = None
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        """Check every field, and that they agree."""
        for name in ("texts_sha256", "weights_sha256"):
            given = getattr(self, name)
            if given is None and name == "weights_sha256":
                continue
            if not isinstance(given, str) or not re.fullmatch("[0-9a-f]{64}", given):
                raise InputError(
                    f"{name}={describe(given)} is not a fingerprint; 64 hexadecimal digits are wanted"
                )
        if check_nonnegative("tolerance", self.tolerance) == 0:
            raise InputError("tolerance=0 allows no approximation; give a positive relative error")
        check_positive_int("calibrated_length", self.calibrated_length, "a number of tokens")
        check_nonnegative_int("min_length", self.min_length)
        if self.predicted_kl is not None:
            check_nonnegative("predicted_kl", self.predicted_kl)
        object.__setattr__(self, "heads", tuple(map(tuple, self.heads)))
        if len(self.heads) != self.model.layers:
            raise InputError(f"heads has {len(self.heads)} layers; the model has {self.model.layers}")
        for layer, heads in enumerate(self.heads):
            if len(heads) != self.model.heads:
                raise InputError(
                    f"heads of layer {layer} are {len(heads)}; the model has {self.model.heads} a layer"
                )
            for head, planned in enumerate(heads):
                self._check_length(layer, head, planned)

    def _check_length(self, layer: int, head: int, planned: HeadPlan) -> None:
        if planned.setting is None:
            return
        for name in ("window", "sinks", "columns", "blocks"):
            size = getattr(planned.setting, name)
            if isinstance(size, Size) and size.length != self.calibrated_length:
                raise InputError(
                    f"{name} of layer {layer}, head {head} is stated for {size.length} tokens; "
                    f"the plan is calibrated at {self.calibrated_length}"
                )

    @property
    def approximated(self) -> int:
        """Number of heads that are not exact."""
        return sum(planned.setting is not None for heads in self.heads for planned in heads)

    def __repr__(self) -> str:
        """Return one line: the model, how many heads, the tolerance and the length."""
        return (
            f"<Plan for {self.model.name!r}: {self.approximated} of "
            f"{self.model.layers * self.model.heads} heads approximated, tolerance {self.tolerance:g}, "
            f"calibrated at {self.calibrated_length} tokens>"
        )

    def check_model(self, model: Any) -> None:
        """Check that a transformers model is the one that this plan is for.

        Args:
            model: a transformers model.

        Raises:
            InputError: its type, layers, heads, key-value heads or head dimension differ.
        """
        self.model.check(model)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON, one head a line; an interruption leaves an older file as it was.

        Raises:
            MissingPathError: there is no such folder.
            InputError: the path is a folder.
        """
        from .file import dumps

        save_text(Path(path), dumps(self))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            FileFormatError: the file is truncated, of another version, or holds what a plan cannot;
                the message names the place.
            MissingPathError: there is no such file.
        """
        from .file import load

        return load(Path(path))
