"""Before work: all ranks tell what they were given, and every rank raises the same error if it differs.

Numbers and JSON text alone are exchanged, as tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ConvBasisError, DistributedError
from .failure import name_of
from .ranks import Ranks, ends_recomputation, ranks_of

_T = TypeVar("_T")
_TIMEOUT = 300.0  # seconds, where no usable limit is known
_FIELDS = 4  # digest, bytes of text, whether this rank refused, a number of its own


def agree(
    ranks: Ranks, device: torch.device, check: Callable[[], tuple[Mapping[str, Any], int, _T]]
) -> tuple[list[int], _T]:
    """Check this rank's arguments, compare them with those of all, and return every rank's own number.

    Args:
        ranks: the processes.
        device: of the exchanged numbers.
        check: returns what must be the same in all ranks (values that JSON can hold), a number that
            may differ, and what it has made on the way. What it raises is raised here, and told to the
            other ranks.

    Raises:
        Exception: of check.
        DistributedError: another rank's check failed, or it was given something else; both are named.
    """
    refused: Exception | None = None
    made: _T | None = None
    number = 0
    try:
        same, number, made = check()
        text = json.dumps(same)
    except Exception as error:  # raised below, when the other ranks know
        refused = error
        kind = "" if isinstance(error, ConvBasisError) else f"{type(error).__name__}: "
        text = json.dumps({"error": f"{kind}{error}"})
    own = text.encode()
    digest = int.from_bytes(hashlib.sha256(own).digest()[:7], "big")
    row = torch.tensor([digest, len(own), refused is not None, number], device=device)
    try:
        rows = [got.tolist() for got in ranks.gather(row, [_FIELDS] * ranks.size, "handshake")]
    except DistributedError as error:
        if refused is not None:
            raise refused from error
        raise
    if any(got[2] for got in rows) or len({got[0] for got in rows}) > 1:
        letters = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
        texts = ranks.gather(letters, [got[1] for got in rows], "what ranks were given")
        told = [json.loads(bytes(part.tolist())) for part in texts]
        if refused is not None:
            raise refused
        raise DistributedError(_difference(ranks.group, told, [bool(got[2]) for got in rows]))
    assert made is not None
    return [got[3] for got in rows], made


@contextmanager
def refusals_told(mesh: Any, timeout: Any = _TIMEOUT) -> Iterator[None]:
    """Let an error within fail the handshake that the other ranks have come to, or come to next.

    For what a rank finds out alone before its own handshake; nothing within may be a collective. Where
    there is no such mesh, nobody can be told.
    """
    try:
        yield
    except Exception as error:
        if not ends_recomputation(error):
            known = isinstance(timeout, int | float) and 0 < timeout < math.inf
            with suppress(Exception):
                ranks = ranks_of(mesh, timeout if known else _TIMEOUT)
                agree(ranks, torch.device(mesh.device_type), partial(_refuse, error))
        raise


def _refuse(error: Exception) -> tuple[dict[str, Any], int, bool]:
    raise error


def ranks_for(mesh: Any, timeout: Any) -> Ranks:
    """Return the processes of a mesh, see `ranks_of`; a wrong timeout is told to all of them."""
    with refusals_told(mesh, timeout):
        return ranks_of(mesh, timeout)


def fingerprint(tensor: Tensor | None) -> str | None:
    """Return what tells tensors apart that must be the same in all ranks."""
    if tensor is None:
        return None
    digest = hashlib.sha256(json.dumps(tensor.tolist()).encode())
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest.hexdigest()[:16]}"


def _difference(group: Any, told: list[dict[str, Any]], refused: list[bool]) -> str:
    """Return which rank was given what, the first difference alone."""
    for rank, (content, no) in enumerate(zip(told, refused, strict=True)):
        if no:
            return f"{name_of(group, rank)} cannot go on: {content.get('error')}"
    names = list(dict.fromkeys(name for content in told for name in content))
    for name in names:
        values = [content.get(name) for content in told]
        # The odd one out is the rank that differs from what most have.
        texts = [json.dumps(value) for value in values]
        usual = max(texts, key=texts.count)
        odd = [rank for rank, text in enumerate(texts) if text != usual]
        if odd:
            other = texts.index(usual)
            return (
                f"{name} differs: {name_of(group, odd[0])} has {texts[odd[0]]}, but "
                f"{name_of(group, other)} has {usual}; give every rank the same"
            )
    return "the ranks were given different arguments"
