"""``attn_implementation="conv_basis"`` for transformers models; importing this module registers it.

Without a plan a model attends exactly, as with ``"sdpa"``. `apply_plan` makes it attend to long prompts
by a plan.
"""

from __future__ import annotations

import logging
import math
import weakref
from typing import Any

import torch
from torch import Tensor

from ..checks import check_finite
from ..errors import MissingExtraError
from .planned import (
    NAME,
    AppliedPlan,
    PlanReport,
    applied_to,
    apply_plan,
    load_plan,
    plan_report,
    remove_plan,
    save_plan,
)

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise MissingExtraError(f"attn_implementation={NAME!r}", "hf", error) from error

from .chunks import ChunkedLayer
from .exact import Mask, exact_attention
from .masks import MaskSpec, describe_mask
from .prefill import Prefill, planned_prefill, sliding_prefill
from .reasons import why_exact

__all__ = ["PlanReport", "apply_plan", "load_plan", "plan_report", "remove_plan", "save_plan"]

_logger = logging.getLogger("convbasis")
_told: weakref.WeakSet[Any] = weakref.WeakSet()


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend for one layer of a transformers model: exactly, or by the plan that is applied to it.

    Args:
        module: the model's attention module.
        query: ``(B, H, n_queries, d)``.
        key: ``(B, H_kv, n_keys, d)``, with what the cache holds.
        value: ``(B, H_kv, n_keys, d_v)``.
        attention_mask: from `describe_mask`, or the user's own.
        options: scaling, dropout and what else the model passes on.

    Returns:
        output ``(B, n_queries, H, d_v)`` and, where the call asks for them, the weights.

    Raises:
        InputError: NaN or Inf in a planned layer.
    """
    applied = applied_to(module)
    if applied is not None:
        return _attend_by_plan(applied, module, query, key, value, attention_mask, **options)
    if not torch.compiler.is_compiling():
        _tell_how_to_plan(module)
    return exact_attention(module, query, key, value, attention_mask, **options)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_plan(
    applied: AppliedPlan,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    layer, n = module.layer_idx, query.shape[2]
    if applied.mesh is not None:
        from .over_ranks import prefill_over_ranks

        tensors = (query, key, value)
        done = prefill_over_ranks(applied, module, *tensors, mask, applied.layer(layer), options)
        return _counted(applied, layer, done)
    begins = mask.begins if isinstance(mask, MaskSpec) else n == key.shape[2]
    if not begins and not (applied.chunked and n > 1):
        return _exact_and_finite(module, query, key, value, mask, **options)
    heads = applied.layer(layer)
    planned = any(head.setting is not None for head in heads)
    if not applied.chunked:
        # Padding needs no dense mask: each prompt of the batch is attended to by itself.
        planned = n > applied.min_length and (
            planned or (isinstance(mask, MaskSpec) and mask.hides_padding())
        )
    if planned and module.training and not applied.training:
        planned = False
        applied.tell_once("the model is in training mode; training=True approximates", logging.INFO)
    elif planned:
        reason = why_exact(module, query, mask, options, len(heads))
        if reason is None and applied.chunked:
            reason = _why_no_chunk(applied, module, key, mask)
        if reason is not None:
            planned = False
            applied.tell_once(reason)
    if not planned or not isinstance(mask, MaskSpec):
        applied.count(layer, len(query))
        return _exact_and_finite(module, query, key, value, mask, **options)
    end = mask.offset + n
    key, value = key[:, :, :end], value[:, :, :end]  # a static cache is longer than the prompt
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary positions leave queries and keys in float32
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    _check_layer(layer, query=query, key=key, value=value)
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if applied.chunked:
        if begins:
            applied.chunks[layer] = ChunkedLayer(heads, applied.plan.calibrated_length, scale)
        chunk = applied.chunks[layer].attend(query, key, value, applied.tolerance(end))
        if not module.training:
            _check_layer(layer, output=chunk.output)
        return _counted(applied, layer, chunk)
    tensors, padding = (query, key, value), mask.padding(query.device)
    if mask.window is not None and mask.window < n:
        applied.count(layer, len(query))
        output = sliding_prefill(*tensors, window=mask.window, scale=scale, padding=padding)
        if not module.training:
            _check_layer(layer, output=output)
        return output.transpose(1, 2).contiguous(), None
    longest = n if padding is None else int(padding.sum(1).max())
    done = planned_prefill(
        *tensors,
        heads,
        scale=scale,
        padding=padding,
        tolerance=applied.tolerance(longest),
        min_length=applied.min_length,
        last_rows=applied.last_rows,
    )
    if not module.training:  # logits of finite queries and keys may be infinite
        known = done.estimated
        looked_at = done.output if known is None else done.output[~known.to(done.output.device)]
        _check_layer(layer, output=looked_at)
    return _counted(applied, layer, done)


def _why_no_chunk(applied: AppliedPlan, module: Any, key: Tensor, mask: Mask) -> str | None:
    """Return why a chunk of a prompt cannot be approximated, or None."""
    if not isinstance(mask, MaskSpec):
        return "an explicit attention mask"
    if mask.hides_padding():
        applied.chunks.pop(module.layer_idx, None)
        return "padding in a prompt that comes in chunks"
    if mask.window is not None:
        return "a sliding window in a prompt that comes in chunks"
    known = applied.chunks.get(module.layer_idx)
    if not mask.begins and (known is None or not known.goes_on(key, mask.offset)):
        return "a chunk after tokens that were not attended to as chunks, or of another prompt"
    return None


def _counted(applied: AppliedPlan, layer: int, done: Prefill) -> tuple[Tensor, None]:
    """Return what the model wants of a planned prompt, and count and log its heads."""
    again, approximated = int(done.fallen_back.sum()), int(done.approximated.sum())
    applied.count(
        layer, len(done.output), approximated=approximated - again, fallen_back=done.fallen_back
    )
    if again:
        _logger.info(
            "layer %d: the estimated error of %d of %d approximated heads exceeds %g; they are exact",
            layer,
            again,
            approximated,
            applied.plan.tolerance,
        )
    return done.output.transpose(1, 2).contiguous(), None


def _exact_and_finite(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Mask, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend exactly to what is finite.

    Of a decoded token the result is checked, which costs less than its keys. Training is not checked:
    gradient scalers meet overflows there and skip them.
    """
    if query.shape[2] > 1 and not module.training:
        _check_layer(module.layer_idx, query=query, key=key, value=value)
    output, weights = exact_attention(module, query, key, value, mask, **options)
    if query.shape[2] == 1 and not module.training:
        _check_layer(module.layer_idx, output=output)
    return output, weights


def _check_layer(layer: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        # The sum of what is not finite is not finite, and takes a part of the time of a closer look.
        if not math.isfinite(float(tensor.detach().sum())):
            check_finite(f"the {name} of layer {layer}", tensor)


def _tell_how_to_plan(module: Any) -> None:
    """Log once for each model that it has no plan, and how to make one."""
    if getattr(module, "layer_idx", 0) == 0 and module not in _told:
        _told.add(module)
        _logger.warning(
            "attn_implementation=%r without a plan attends exactly, as 'sdpa' does; make one with "
            "convbasis.calibrate or read one with convbasis.Plan.load, and give it to the model with "
            "convbasis.apply_plan",
            NAME,
        )


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, describe_mask)
