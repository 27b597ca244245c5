"""Exact attention as the model's own implementations compute it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..errors import InputError
from .masks import MaskSpec

try:  # some families do not tell their attention that its weights will be returned
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None

Mask = MaskSpec | Tensor | None


def exact_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Return exact attention ``(B, n, H, d_v)``, and its weights if the call asks for them.

    SDPA computes it, except for soft-capped logits, attention-sink parameters and returned weights,
    which it does not have: those go through the eager function of the model's family.

    Raises:
        InputError: the family has no eager function for what SDPA does not have.
    """
    wanted = beyond_sdpa(module, options)
    if wanted is None:
        dense = mask.for_sdpa(query.device) if isinstance(mask, MaskSpec) else mask
        return sdpa_attention_forward(module, query, key, value, dense, **options)
    family = sys.modules[type(module).__module__]
    eager = getattr(family, "eager_attention_forward", None)
    if eager is None:
        raise InputError(
            f"{type(module).__name__} asks for {wanted}, which scaled dot product attention does not "
            f"have, and {family.__name__} has no eager_attention_forward; load this model with its own "
            "attn_implementation"
        )
    return eager(module, query, key, value, _to_add(module, query, key, mask), **options)


def beyond_sdpa(module: Any, options: dict[str, Any]) -> str | None:
    """Return what a call asks for that scaled dot product attention does not have, or None."""
    if options.get("softcap") is not None:
        return "soft-capped logits"
    if options.get("s_aux") is not None:
        return "attention-sink parameters"
    if options.get("output_attentions") or _collects_weights():
        return "output_attentions"
    return None


def _collects_weights() -> bool:
    if _active_collector is None or torch.compiler.is_compiling():
        return False
    collected = _active_collector.get()
    return collected is not None and "attentions" in collected


def _to_add(module: Any, query: Tensor, key: Tensor, mask: Mask) -> Tensor | None:
    """Return a mask to add to the logits."""
    if isinstance(mask, MaskSpec):
        return mask.for_eager(query.device)
    if mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    hidden = torch.finfo(query.dtype).min
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, hidden)
