"""Queries, keys and values of a transformers model, as its attention sees them: after RoPE."""

from __future__ import annotations

import contextvars
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FileFormatError, InputError, MissingExtraError
from ..storage import load_tensors, save_tensors

_logger = logging.getLogger("convbasis")
_NAME = "convbasis_capture"
_FORMAT = "convbasis.captures"


class CapturedLayer(NamedTuple):
    """What one attention layer was given for one sequence."""

    query: Tensor
    """``(1, H, n, d)`` after rotary positions."""
    key: Tensor
    """``(1, H_kv, n, d)`` after rotary positions; heads are not repeated."""
    value: Tensor
    """``(1, H_kv, n, d_v)``."""
    scale: float
    """Factor of the logits."""


_observer: contextvars.ContextVar[Callable[[int, CapturedLayer], None] | None] = contextvars.ContextVar(
    "convbasis_observer", default=None
)


@torch.no_grad()
def observe_layers(
    model: Any,
    input_ids: Tensor,
    observe: Callable[[int, CapturedLayer], None],
    *,
    position_ids: Tensor | None = None,
) -> None:
    """Run a model on a sequence and show what each layer's attention is given, layer after layer.

    The model attends exactly as before (SDPA); its attention implementation is restored afterwards.

    Args:
        model: a transformers model whose attention goes through the attention interface.
        input_ids: ``(1, n)`` token ids.
        observe: called with the layer number and what it is given; a view, valid during the call.
        position_ids: ``(1, n)``; 0..n-1 by default.

    Raises:
        InputError: input_ids is not one sequence, or the model's attention is more than softmax, as
            with soft-capped logits.
        MissingExtraError: transformers is not installed.
    """
    from .exact import beyond_sdpa

    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise InputError(f"input_ids has shape {tuple(input_ids.shape)}; one sequence (1, n) is wanted")

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if (wanted := beyond_sdpa(module, options)) is not None:
            raise InputError(
                f"{type(module).__name__} asks for {wanted}; only plain softmax attention can be "
                "captured"
            )
        found = _observer.get()
        if found is not None:
            scaling = options.get("scaling")
            scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            found(module.layer_idx, CapturedLayer(query, key, value, scale))
        return exact_sdpa(module, query, key, value, mask, **options)

    token = _observer.set(observe)
    try:
        with attending(model, attention):
            # The mask of ones keeps equal positions from being read as packed documents.
            ones = torch.ones_like(input_ids)
            model.base_model(input_ids, attention_mask=ones, position_ids=position_ids, use_cache=False)
    finally:
        _observer.reset(token)


def exact_sdpa(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Return what a layer attends to with torch's own operator, as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*inputs, **options)


@contextmanager
def attending(model: Any, attention: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Let a model attend through a function of one's own, with SDPA's masks.

    Args:
        model: a transformers model whose attention goes through the attention interface.
        attention: what every layer calls.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise MissingExtraError("capturing attention", "hf", error) from error
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)


def capture_layers(
    model: Any,
    input_ids: Tensor,
    layers: Sequence[int],
    *,
    position_ids: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[int, CapturedLayer]:
    """Run a model on a sequence and return what the chosen layers' attention was given.

    Args:
        model: a transformers model whose attention goes through the attention interface.
        input_ids: ``(1, n)`` token ids.
        layers: layer numbers.
        position_ids: ``(1, n)``; 0..n-1 by default.
        progress: called with the layer number when each layer begins to attend.

    Returns:
        `CapturedLayer` by layer number, in float32 unless the model is float64.

    Raises:
        InputError: a layer does not exist, or input_ids is not one sequence.
        MissingExtraError: transformers is not installed.
    """
    count = model.config.num_hidden_layers
    if not layers or any(not 0 <= layer < count for layer in layers):
        raise InputError(f"layers={list(layers)}: choose one or more of 0..{count - 1}")
    captured: dict[int, CapturedLayer] = {}

    def keep(layer: int, given: CapturedLayer) -> None:
        if layer in layers:
            captured[layer] = given._replace(
                query=_own(given.query), key=_own(given.key), value=_own(given.value)
            )
        if progress is not None:
            progress(layer)

    observe_layers(model, input_ids, keep, position_ids=position_ids)
    if len(captured) < len(set(layers)):
        raise InputError(
            f"layers {sorted(set(layers) - set(captured))} of {type(model).__name__} do not attend "
            "through the attention interface of transformers"
        )
    return captured


def cached_layers(
    load: Callable[[], Any],
    model_name: str,
    input_ids: Tensor,
    layers: Sequence[int],
    *,
    position_ids: Tensor | None = None,
    folder: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[int, CapturedLayer]:
    """Return `capture_layers`, from a safetensors file where the same was captured before.

    Args:
        load: returns the model; called only when nothing is cached.
        model_name: identifies the model and its weights.
        input_ids: ``(1, n)``.
        layers: layer numbers.
        position_ids: as in `capture_layers`.
        folder: where captures are kept; `default_cache` by default.
        progress: as in `capture_layers`.

    Returns:
        `CapturedLayer` by layer number.
    """
    digest = hashlib.sha256(repr((model_name, sorted(layers))).encode())
    for ids in (input_ids, position_ids):
        digest.update(b"none" if ids is None else repr(ids.tolist()).encode())
    place = (default_cache() if folder is None else folder) / f"{digest.hexdigest()[:32]}.safetensors"
    if place.is_file():
        try:
            return _read(place, layers)
        except FileFormatError as error:
            _logger.warning("%s; capturing again", error)
    captured = capture_layers(load(), input_ids, layers, position_ids=position_ids, progress=progress)
    tensors = {
        f"{layer}.{field}": getattr(kept, field)
        for layer, kept in captured.items()
        for field in ("query", "key", "value")
    }
    scales = {f"{layer}.scale": repr(kept.scale) for layer, kept in captured.items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(place, tensors, {"format": _FORMAT, "model": model_name, **scales})
    return captured


def _own(tensor: Tensor) -> Tensor:
    """Return a copy: a model may hand over a view of a buffer that it writes to later."""
    work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(work, copy=True).contiguous()


def _read(place: Path, layers: Sequence[int]) -> dict[int, CapturedLayer]:
    names = [f"{layer}.{field}" for layer in layers for field in ("query", "key", "value")]
    tensors, metadata = load_tensors(place, _FORMAT, names)
    if any(f"{layer}.scale" not in metadata for layer in layers):
        raise FileFormatError(f"{str(place)!r} lacks the scale of a layer")
    return {
        layer: CapturedLayer(
            query=tensors[f"{layer}.query"],
            key=tensors[f"{layer}.key"],
            value=tensors[f"{layer}.value"],
            scale=float(metadata[f"{layer}.scale"]),
        )
        for layer in layers
    }


def default_cache() -> Path:
    """Return the folder of captures: $CONVBASIS_CACHE, or convbasis in the user's cache folder."""
    chosen = os.environ.get("CONVBASIS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convbasis"
