"""Why a prompt of a planned layer is attended exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .exact import Mask, beyond_sdpa
from .masks import MaskSpec

# What models and users pass on to attention that does not change it, or that is looked at by name.
_KNOWN = {
    "cache_position", "dropout", "is_causal", "labels", "num_items_in_batch", "position_embeddings",
    "position_ids", "scaling", "sliding_window",
}  # fmt: skip


def why_exact(
    module: Any, query: Tensor, mask: Mask, options: dict[str, Any], heads: int
) -> str | None:
    """Return what makes a call more than plain causal attention with padding, or None.

    Args:
        module: the model's attention module.
        query: ``(B, H, n, d)`` of a whole prompt.
        mask: its mask.
        options: what else the model passes on.
        heads: query heads of a layer in the plan.
    """
    n = query.shape[2]
    if (wanted := beyond_sdpa(module, options)) is not None:
        return wanted
    if not isinstance(mask, MaskSpec):
        return "an explicit attention mask"
    if options.get("is_causal") is False:
        return "attention that is not causal"
    if not mask.is_plain:
        return "packed position_ids, or a mask of the model's own"
    stated = options.get("sliding_window")
    if (reason := why_not_local(mask.window, stated, n, mask.padding_is_outside)) is not None:
        return reason
    if options.get("dropout"):
        return "attention dropout"
    if query.shape[1] != heads:
        return "heads divided over devices"
    for name, option in options.items():
        if (
            name not in _KNOWN
            and option is not None
            and not isinstance(option, bool | int | float | str)
        ):
            return f"the option {name}, whose meaning is not known here"
    return None


def why_not_local(
    window: int | None, stated: int | None, n: int, padding_is_outside: Callable[[], bool]
) -> str | None:
    """Return why local attention of a prompt is computed as the model does it, or None.

    Args:
        window: latest keys that a query sees by the mask, None for all.
        stated: the sliding window that the model's attention is told, or None.
        n: tokens of the whole prompt.
        padding_is_outside: whether each sequence's real tokens follow each other.
    """
    windows = {width for width in (window, stated) if width is not None and width < n}
    # Chunked attention states a width too, but not as a sliding window.
    if windows and stated != window:
        return f"a prompt longer than its local attention of {min(windows)} tokens"
    if windows and not padding_is_outside():
        return "padding between tokens of a sliding window"
    return None
