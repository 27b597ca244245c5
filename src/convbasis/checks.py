"""Checks of arguments: each raises one sentence that says what was given and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from .errors import InputError
from .transforms import plain

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """Return a short description of a value, for error messages."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{value!r}" if isinstance(value, Real | str | bool | None) else f"a {type(value).__name__}"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that work is done in: half types have no FFT, so float32 for them."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float_tensor(name: str, value: object) -> Tensor:
    """Return value if it is a floating-point tensor of a supported dtype."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is {describe(value)}; a torch.Tensor is wanted")
    if value.dtype not in FLOATS:
        raise InputError(
            f"{name} has dtype {value.dtype}; wanted float64, float32, bfloat16 or float16: "
            f"convert it with .float()"
        )
    return value


def check_alike(**tensors: Tensor) -> None:
    """Check that tensors share a dtype and a device."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise InputError(
                f"{name} has dtype {tensor.dtype} but {first} has {reference.dtype}; "
                "convert them to one dtype"
            )
        if tensor.device != reference.device:
            raise InputError(
                f"{name} is on {tensor.device} but {first} is on {reference.device}; "
                "move them to one device"
            )


def check_finite(name: str, value: Tensor, relevant: Tensor | None = None) -> float:
    """Check that a tensor holds neither NaN nor Inf, where relevant (broadcast to it) is True.

    Returns:
        the largest absolute entry, 0 for none.
    """
    if value.device.type == "meta" or value.numel() == 0:
        return 0.0
    entries = value.detach()
    if relevant is not None:
        entries = entries.masked_fill(~relevant, 0.0)
    entries, _ = plain(entries)
    low, high = (float(end) for end in entries.aminmax())  # one pass; both are NaN if any entry is
    if not (math.isfinite(low) and math.isfinite(high)):
        where = (~entries.isfinite()).nonzero()
        first = tuple(where[0].tolist())
        raise InputError(
            f"{name} holds {len(where)} NaN or Inf, the first at {list(first)} "
            f"({float(entries[first])}); every entry must be finite: look for what made it so"
        )
    return max(-low, high)


def check_positive_int(name: str, value: object, what: str) -> int:
    """Return value if it is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name}={describe(value)} is not a positive integer; give {what}")
    return int(value)


def check_nonnegative_int(name: str, value: object) -> int:
    """Return value if it is an integer >= 0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise InputError(f"{name}={describe(value)} is not an integer >= 0")
    return int(value)


def check_nonnegative(name: str, value: object) -> float:
    """Return value if it is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise InputError(f"{name}={describe(value)} is not a finite number >= 0")
    return float(value)


def check_gradient(gradient: object) -> None:
    """Check the meaning of a gradient."""
    if gradient not in ("forward", "attention"):
        raise InputError(
            f"gradient={describe(gradient)} is not known; use 'forward' (of what is computed) or "
            "'attention' (of exact attention)"
        )


def check_scale(scale: object, head_dim: int) -> float:
    """Return the factor of the logits, 1/sqrt(d) by default."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise InputError(f"scale={describe(scale)} is not a finite number")
    return float(scale)


def check_starts(starts: object, n: int, device: torch.device, *, from_zero: bool) -> Tensor:
    """Return starts as an int64 tensor ``(..., k)`` after checking that they describe segments.

    They must increase strictly within 0..n-1; at the end any number of them may be n, which fills up
    a batch of unequal k. With from_zero the first one must be 0.
    """
    if isinstance(starts, Sequence) and not isinstance(starts, str):
        try:
            starts = torch.tensor(starts, dtype=None if len(starts) else torch.int64)
        except (TypeError, ValueError) as error:
            raise InputError(f"starts cannot be read as integers: {error}") from None
    if not isinstance(starts, Tensor):
        raise InputError(f"starts is {describe(starts)}; give a tensor or list of integers")
    if starts.dtype.is_floating_point or starts.dtype.is_complex or starts.dtype == torch.bool:
        raise InputError(f"starts has dtype {starts.dtype}; integers (token positions) are wanted")
    if starts.ndim == 0:
        raise InputError("starts has no dimension; its shape must be (k,) or (..., k)")
    found = starts.detach().to(device=device, dtype=torch.int64)
    if found.numel() == 0:
        if from_zero:
            raise InputError("starts is empty; give at least the start 0")
        return found
    if bool(((found < 0) | (found > n)).any()):
        raise InputError(
            f"starts range from {int(found.min())} to {int(found.max())}; "
            f"they must lie in 0..{n - 1} for a sequence of {n} (n itself only fills up a batch)"
        )
    steps = found[..., 1:] - found[..., :-1]
    if bool(((steps <= 0) & (found[..., 1:] < n)).any()):
        raise InputError(f"starts must increase strictly; given {_shorten(found)}")
    if from_zero and bool((found[..., 0] != 0).any()):
        raise InputError(
            f"starts must begin at 0, given {_shorten(found)}: columns before the first start would "
            "count with weight 1 instead of their logit"
        )
    return found


def _shorten(starts: Tensor) -> str:
    rows = starts.reshape(-1, starts.shape[-1])
    listed = rows[0, :8].tolist()
    return f"{listed}{'...' if rows.numel() > len(listed) else ''}"


def check_qkv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    enable_gqa: bool,
    past: int | None = None,
    names: tuple[str, str, str] = ("query", "key", "value"),
) -> None:
    """Check types, shapes, heads, dtypes and devices of the inputs of attention.

    With past, keys and values are of that many tokens before those of the query, and of these. Errors
    call the three by their names.
    """
    q, k, v = names
    for name, tensor in zip(names, (query, key, value), strict=True):
        check_float_tensor(name, tensor)
        if tensor.ndim != 4:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}; four dimensions (batch, heads, tokens, "
                "features) are wanted: add the missing ones with [None]"
            )
        if tensor.numel() == 0:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; it holds nothing")
    check_alike(**{q: query, k: key, v: value})
    (batch, heads, n, d), (_, kv_heads, _, _) = query.shape, key.shape
    tokens = n + (past or 0)
    if key.shape[0] != batch or key.shape[2:] != (tokens, d):
        whose = "queries and keys of the same tokens"
        if past is not None:
            whose = f"keys of the {past} tokens before and of the {n} of the query"
        raise InputError(
            f"{k} has shape {tuple(key.shape)}; with {q} {tuple(query.shape)} it must be "
            f"({batch}, heads, {tokens}, {d}): {whose}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise InputError(
            f"{v} has shape {tuple(value.shape)}; with {k} {tuple(key.shape)} it must be "
            f"({batch}, {kv_heads}, {tokens}, d_v)"
        )
    if not enable_gqa and heads != kv_heads:
        raise InputError(
            f"{k} has {kv_heads} heads but {q} has {heads}; give enable_gqa=True if each "
            "key-value head serves several query heads"
        )
    if heads % kv_heads:
        raise InputError(
            f"{q} has {heads} heads, which is no multiple of the {kv_heads} heads of {k} and {v}"
        )


def check_mask(mask: object, batch: int, n: int, device: torch.device) -> None:
    """Check a mask of real tokens ``(B, n)``, or None."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (batch, n):
        raise InputError(
            f"key_padding_mask is {describe(mask)}; a bool tensor of shape ({batch}, {n}), True for "
            "real tokens, is wanted"
        )
    if mask.device != device:
        raise InputError(f"key_padding_mask is on {mask.device} but query is on {device}")
