"""The mask of a model's call, described in O(B n) numbers; the dense one is made where it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import eager_mask, sdpa_mask


def stands_together(real: Tensor) -> bool:
    """Whether the real tokens of each row of a bool ``(B, n)`` follow each other."""
    return bool((real.diff(dim=1).sum(1) + real[:, 0] <= 2).all())


class MaskSpec:
    """Which keys each query of one call may see: what transformers' mask functions are told.

    It stands where transformers expects a tensor ``(B, 1, n_queries, n_keys)``.
    """

    ndim = 4

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Keep the arguments of a mask function."""
        self._arguments = arguments
        self._made: dict[str, Tensor | None] = {}

    def contiguous(self) -> MaskSpec:
        """Return itself: generation asks this of every mask that it prepares."""
        return self

    @property
    def begins(self) -> bool:
        """Whether the cache was empty before this call."""
        return self.offset == 0

    @property
    def offset(self) -> int:
        """Tokens in the cache before this call."""
        return int(self._arguments["q_offset"])

    @property
    def is_plain(self) -> bool:
        """Whether causality, a window and padding alone hide keys: packed documents are not plain."""
        return bool(self._arguments["allow_is_causal_skip"])

    @property
    def window(self) -> int | None:
        """Latest keys that a query sees, its own included; None for all."""
        return self._arguments.get("local_size")

    def padding(self, device: torch.device) -> Tensor | None:
        """Return the real tokens among a prompt's, bool ``(B, n)``, or None if all are."""
        return self._on(device, "padding", self._padding)

    def padding_is_outside(self) -> bool:
        """Whether each prompt's real tokens stand together."""
        padding = self._padding()
        return padding is None or stands_together(padding)

    def hides_padding(self) -> bool:
        """Whether any key, of the cache or of this call, is padding."""
        given = self._arguments["attention_mask"]
        return given is not None and not bool(
            given[:, : self.offset + self._arguments["q_length"]].all()
        )

    def for_sdpa(self, device: torch.device) -> Tensor | None:
        """Return the mask of scaled dot product attention, bool; None where it is plain."""
        return self._on(device, "sdpa", lambda: sdpa_mask(**self._arguments))

    def for_eager(self, device: torch.device) -> Tensor | None:
        """Return the mask to add to the logits."""
        return self._on(device, "eager", lambda: eager_mask(**self._arguments))

    def _padding(self) -> Tensor | None:
        given = self._arguments["attention_mask"]
        if given is not None:
            given = given[:, : self._arguments["q_length"]]
        return None if given is None or bool(given.all()) else given

    def _on(self, device: torch.device, name: str, make: Callable[[], Tensor | None]) -> Tensor | None:
        """Return what is made once for all layers, on a layer's device."""
        if name not in self._made:
            self._made[name] = make()
        made = self._made[name]
        if made is not None and made.device != device:
            made = self._made[name] = made.to(device)
        return made


def describe_mask(**arguments: Any) -> MaskSpec:
    """Return the description of a mask: the mask function of ``attn_implementation="conv_basis"``."""
    given = arguments["attention_mask"]
    if isinstance(given, MaskSpec):
        return given
    for name in ("q_offset", "kv_offset"):
        if isinstance(arguments[name], Tensor):
            # A static cache advances this very tensor before the attention of the same call runs.
            arguments[name] = torch.clone(arguments[name])
    return MaskSpec(arguments)
