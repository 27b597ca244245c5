"""Documents packed into one sequence: cut out, evaluated by themselves, and put back in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import NamedTuple, overload

import torch
from torch import Tensor

from ..checks import check_starts, describe
from ..errors import InputError


class Document(NamedTuple):
    """Tokens start .. stop - 1."""

    start: int
    stop: int


def check_documents(lengths: object, n: int) -> list[int]:
    """Return the lengths of documents that fill n tokens."""
    given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InputError(f"document_lengths is {describe(lengths)}; give a list of numbers of tokens")
    for length in given:
        if isinstance(length, bool) or not isinstance(length, Integral) or length < 1:
            raise InputError(f"document_lengths holds {describe(length)}; each is at least 1 token")
    found = [int(length) for length in given]
    if sum(found) != n:
        raise InputError(
            f"document_lengths add up to {sum(found)} tokens, but the sequence has {n}; every token "
            "belongs to one document: give padding a document of its own, or a key_padding_mask"
        )
    return found


def grouped(lengths: list[int], *, apart: bool) -> list[list[Document]]:
    """Return documents of one length together, or each by itself; the longest last."""
    groups: dict[int, list[Document]] = {}
    start = 0
    for index, length in enumerate(lengths):
        groups.setdefault(index if apart else length, []).append(Document(start, start + length))
        start += length
    return sorted(groups.values(), key=lambda group: group[0].stop - group[0].start)


@overload
def cut(tensor: Tensor, documents: list[Document], dim: int) -> Tensor: ...
@overload
def cut(tensor: None, documents: list[Document], dim: int) -> None: ...
def cut(tensor: Tensor | None, documents: list[Document], dim: int) -> Tensor | None:
    """Return the documents of a dimension, one after the other in the batch."""
    if tensor is None:
        return None
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in documents]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def joined(results: Mapping[Document, tuple[Tensor, Tensor]], index: int) -> Tensor:
    """Return one of the results of all documents in the order of the sequence, ``(B, H, n, ...)``."""
    return torch.cat([results[document][index] for document in sorted(results)], dim=2)


def document_starts(
    starts: object, lengths: list[int], device: torch.device
) -> dict[Document, list[int]]:
    """Return the starts of each document, counted from its first token."""
    if isinstance(starts, list | tuple) and torch.compiler.is_compiling():
        all_starts = [int(start) for start in starts]  # the operator checks them, document by document
    else:
        found = check_starts(starts, sum(lengths), device, from_zero=True)
        if found.ndim != 1:
            raise InputError(
                f"starts has shape {tuple(found.shape)}; with document_lengths it must be (k,), the "
                "same for all heads"
            )
        all_starts = found.tolist()
    own: dict[Document, list[int]] = {}
    for (document,) in sorted(grouped(lengths, apart=True)):
        begin, end = document
        own[document] = [start - begin for start in all_starts if begin <= start < end]
        if not own[document] or own[document][0] != 0:
            raise InputError(
                f"a document begins at token {begin}, but starts do not hold {begin}: a segment cannot "
                "reach across the border"
            )
    return own
