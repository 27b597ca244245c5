"""Which segments an attention call uses: given, uniform or recovered; and what padding does to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_positive_int, check_starts, describe
from ..errors import InputError
from ..recover import SearchOptions, find_starts, search_options


class SegmentRequest(NamedTuple):
    """The segment arguments of a call, checked: exactly one of the two is not None."""

    starts: Tensor | None  # (k,) or (B, H, k)
    recovery: SearchOptions | None


def check_segments(
    batch: int,
    heads: int,
    n: int,
    device: torch.device,
    *,
    num_bases: object,
    starts: object,
    segment_length: object,
    window: object,
    delta: object,
    epsilon: object,
    search: object,
    warn: bool = True,
) -> SegmentRequest:
    """Check that exactly one way to choose segments was asked for, and return it.

    With warn, options that are allowed but unwise cause a warning.
    """
    given = [
        name
        for name, value in (("starts", starts), ("segment_length", segment_length))
        if value is not None
    ]
    if len(given) == 2 or (segment_length is not None and num_bases is not None):
        names = [*given, *(["num_bases"] if num_bases is not None else [])]
        raise InputError(
            f"{' and '.join(names)} contradict each other; give starts, or segment_length, or "
            "num_bases alone to recover the segments"
        )
    if not given:
        if num_bases is None:
            raise InputError(
                "no segments were asked for: give num_bases (recovered), segment_length (uniform) or "
                "starts"
            )
        return SegmentRequest(None, search_options(n, num_bases, window, delta, epsilon, search, warn))
    defaults = {"window": 1, "delta": None, "epsilon": 0.0, "search": "linear"}
    options = {"window": window, "delta": delta, "epsilon": epsilon, "search": search}
    for name, value in options.items():
        if value != defaults[name]:
            raise InputError(
                f"{name}={describe(value)} applies to recovered segments only, but {given[0]} was "
                f"given; leave {name} out, or give num_bases alone"
            )
    if segment_length is not None:
        length = check_positive_int("segment_length", segment_length, "a number of tokens")
        return SegmentRequest(torch.arange(0, n, length, device=device), None)
    found = check_starts(starts, n, device, from_zero=True)
    if found.ndim == 1 and int(found[-1]) == n:
        raise InputError(
            f"starts end in {n}, past the last token {n - 1}; only (B, H, k) may be filled up with n"
        )
    if found.ndim != 1 and found.shape[:-1] != (batch, heads):
        raise InputError(
            f"starts has shape {tuple(found.shape)}; (k,) for all heads or (B, H, k) = "
            f"({batch}, {heads}, k) is wanted"
        )
    if num_bases is not None:
        count = check_positive_int("num_bases", num_bases, "the number of starts, or nothing")
        if count != found.shape[-1]:
            raise InputError(
                f"num_bases={count} contradicts the {found.shape[-1]} starts; leave it out"
            )
    return SegmentRequest(found, None)


def starts_tensor(starts: object, device: torch.device) -> Tensor | None:
    """Return starts, which `check_segments` has seen, as a tensor."""
    if starts is None:
        return None
    tensor = starts if isinstance(starts, Tensor) else torch.tensor(starts, dtype=torch.int64)
    return tensor.detach().to(device=device, dtype=torch.int64)


def resolve_starts(
    request: SegmentRequest, query: Tensor, key: Tensor, scale: float, real: Tensor | None
) -> Tensor:
    """Return the starts in use, ``(P, R, k)`` or ``(1, 1, k)``; they begin at real keys.

    Args:
        request: what was asked for.
        query: ``(P, R, n, d)``.
        key: ``(P, n, d)``.
        scale: factor of the logits.
        real: bool ``(P, n)`` or None.
    """
    problems, sets = query.shape[:2]
    if request.recovery is not None:
        starts = find_starts(query, key, scale, request.recovery, real)
    else:
        assert request.starts is not None
        shape = (1, 1) if request.starts.ndim == 1 else (problems, sets)
        starts = request.starts.reshape(*shape, -1)
    return starts if real is None else _to_real_keys(starts.expand(problems, sets, -1), real)


def same_for_all(starts: Tensor) -> Tensor:
    """Return starts ``(P, R, k)`` as ``(1, 1, k)`` where all heads have the same."""
    first = starts[:1, :1]
    return first if bool((starts == first).all()) else starts


def last_tokens(real: Tensor) -> Tensor:
    """Return one more than the position of the last real token, 0 where there is none, ``(P,)``."""
    tokens = torch.arange(1, real.shape[-1] + 1, device=real.device)
    return torch.where(real, tokens, 0).amax(-1)


def _to_real_keys(starts: Tensor, real: Tensor) -> Tensor:
    """Move every start to its segment's first real key; segments of padding alone become unused."""
    n = real.shape[-1]
    tokens = torch.arange(n, device=real.device)
    following = torch.where(real, tokens, n).flip(-1).cummin(-1).values.flip(-1)
    following = torch.nn.functional.pad(following, (0, 1), value=n)[:, None]
    moved = following.expand(*starts.shape[:2], n + 1).gather(-1, starts)
    # A segment without a real key arrives at the next segment's first one.
    empty = torch.zeros_like(moved, dtype=torch.bool)
    empty[..., :-1] = moved[..., :-1] == moved[..., 1:]
    return moved.masked_fill(empty, n).sort(dim=-1).values
