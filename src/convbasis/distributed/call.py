"""What every call over several ranks begins with: checks, the handshake, and what all tokens share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_finite, check_mask, check_qkv, describe
from ..errors import InputError
from .handshake import agree, fingerprint, refusals_told
from .ranks import Ranks, ranks_of
from .tensors import Kind, known_mesh, unwrap


def told(value: object) -> Any:
    """Return what other ranks are told of an argument, as what JSON can hold."""
    if isinstance(value, Tensor):
        return fingerprint(value)
    if isinstance(value, list | tuple):
        return [told(entry) for entry in value]
    return value if isinstance(value, int | float | str | None) else describe(value)


def opened(mesh: Any, timeout: Any, **tensors: Any) -> tuple[Kind, list[Any], Ranks]:
    """Return how tensors are spread, this rank's parts, and the processes, who are told of errors.

    Args:
        mesh: that of the tokens; None for that of DTensors.
        timeout: seconds.
        tensors: by name.
    """
    with refusals_told(known_mesh(mesh, tensors), timeout):
        kind, parts = unwrap(mesh, **tensors)
        return kind, parts, ranks_of(kind.mesh, timeout)


class Tokens(NamedTuple):
    """The tokens of a call."""

    ranks: Ranks
    lengths: list[int]
    """Of each rank."""

    @property
    def n(self) -> int:
        """Of all ranks."""
        return sum(self.lengths)

    @property
    def first(self) -> int:
        """Position of this rank's first token."""
        return sum(self.lengths[: self.ranks.rank])

    def gather_mask(self, mask: Tensor | None) -> Tensor | None:
        """Return a mask ``(B, m)`` of this rank's tokens for those of all ranks."""
        if mask is None:
            return None
        batch = mask.shape[0]
        parts = self.ranks.gather(
            mask.to(torch.uint8), [batch * length for length in self.lengths], "padding masks"
        )
        return torch.cat([part.view(batch, -1) for part in parts], dim=1).bool()


def begin(
    ranks: Ranks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    enable_gqa: bool,
    same: Callable[[], Mapping[str, Any]],
) -> Tokens:
    """Check this rank's tensors, and that those of all ranks and their arguments fit together.

    Args:
        ranks: the processes.
        query: ``(B, H, m, d)``, of this rank's m tokens, which may be none.
        key: ``(B, H_kv, m, d)``.
        value: ``(B, H_kv, m, d_v)``.
        mask: ``(B, m)`` or None.
        enable_gqa: whether H may be a multiple of H_kv.
        same: checks what else this rank was given, and returns what must be the same in all ranks, as
            what JSON can hold.

    Raises:
        InputError: this rank's tensors cannot be used.
        DistributedError: another rank's cannot, or they differ.
    """

    def check() -> tuple[dict[str, Any], int, bool]:
        tensors = [query, key, value]
        if all(isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == 0 for x in tensors):
            # A rank may have no tokens: what is left is checked with one.
            tensors = [x.new_zeros((*x.shape[:2], 1, x.shape[3])) for x in tensors]
        check_qkv(tensors[0], tensors[1], tensors[2], enable_gqa)
        check_mask(mask, query.shape[0], query.shape[2], query.device)
        real = None if mask is None else mask[:, None, :, None]
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            check_finite(name, tensor, real)
        graded = [torch.is_grad_enabled() and x.requires_grad for x in (query, key, value)]
        shapes = {
            "batch size": query.shape[0],
            "number of query heads": query.shape[1],
            "number of key-value heads": key.shape[1],
            "head dimension": query.shape[3],
            "value dimension": value.shape[3],
            "dtype": str(query.dtype),
            "key_padding_mask": mask is not None,
            "requires_grad of query, key, value": graded,
        }
        return {**shapes, **same()}, query.shape[2], True

    device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    lengths, _ = agree(ranks, device, check)
    if not any(lengths):
        raise InputError(
            f"query has shape {tuple(query.shape)}: none of the {ranks.size} ranks has tokens"
        )
    return Tokens(ranks, lengths)


@contextmanager
def graph_of_its_own() -> Iterator[None]:
    """Keep what backward needs as it is, whatever hooks there are around the call.

    A checkpoint's would compute it again within the backward pass of one rank and not of another, and
    the exchanges with it.
    """
    with torch.autograd.graph.saved_tensors_hooks(_packed, _unpacked):
        yield


def _packed(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _unpacked(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that backward needs has been modified by an "
            f"inplace operation: it is at version {tensor._version}, expected version {version}"
        )
    return tensor
