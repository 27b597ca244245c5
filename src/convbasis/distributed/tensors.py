"""Plain shards and DTensors: which mesh the tokens are spread over, and results of the same kind."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError

_TOKENS = 2  # the dimension of tokens in (B, H, n, d)


class Kind(NamedTuple):
    """How the inputs are spread."""

    mesh: Any
    """Of one dimension: that of the tokens."""
    whole: Any
    """The mesh of DTensors; None for plain shards."""
    placements: tuple[Any, ...] = ()
    shape: tuple[int, ...] = ()
    """``(B, H, n)`` of whole DTensors."""

    def wrap(self, output: Tensor) -> Tensor:
        """Return an output of this rank as the inputs are."""
        if self.whole is None:
            return output
        from torch.distributed.tensor import DTensor

        batch, heads, n, width = (*self.shape, output.shape[3])
        wrapped: Tensor = DTensor.from_local(
            output.contiguous(),
            self.whole,
            self.placements,
            run_check=False,
            shape=torch.Size((batch, heads, n, width)),
            stride=(heads * n * width, n * width, width, 1),
        )
        return wrapped


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor; nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def known_mesh(mesh: Any, tensors: Mapping[str, Any]) -> Any:
    """Return the mesh of the tokens as far as it is known before tensors are looked at closely."""
    for tensor in tensors.values():
        if mesh is None and is_dtensor(tensor):
            whole, over = tensor.device_mesh, [p.is_shard(_TOKENS) for p in tensor.placements]
            if whole.ndim == 1:
                return whole
            if sum(over) == 1 and whole.mesh_dim_names is not None:
                return whole[whole.mesh_dim_names[over.index(True)]]
    return mesh


def unwrap(mesh: object, **tensors: Any) -> tuple[Kind, list[Any]]:
    """Return how tensors are spread, and this rank's parts.

    Args:
        mesh: that of the tokens; None for that of DTensors.
        tensors: by name; all DTensors with the same placements, or none.

    Raises:
        InputError: they are mixed, placed otherwise, not spread over their tokens, or spread over heads
            so that a rank's queries have other keys than the whole has.
    """
    given = {name: tensor for name, tensor in tensors.items() if is_dtensor(tensor)}
    if not given:
        return Kind(mesh, None), list(tensors.values())
    (first, tensor), *others = given.items()
    plain = [name for name, x in tensors.items() if isinstance(x, Tensor) and name not in given]
    if plain:
        raise InputError(f"{first} is a DTensor but {plain[0]} is none; give all or none as DTensors")
    for name, other in others:
        if other.placements != tensor.placements or other.device_mesh != tensor.device_mesh:
            raise InputError(
                f"{name} is placed as {other.placements} but {first} as {tensor.placements}; "
                "redistribute one of them"
            )
    whole, placements = tensor.device_mesh, tuple(tensor.placements)
    over_tokens = [i for i, placement in enumerate(placements) if placement.is_shard(_TOKENS)]
    others_fit = all(
        p.is_shard(0) or p.is_shard(1) or p.is_shard(_TOKENS) or p.is_replicate() for p in placements
    )
    if len(over_tokens) != 1 or not others_fit:
        raise InputError(
            f"{first} is placed as {placements}; Shard(2), over the tokens, is wanted in one dimension "
            "of the mesh, and Shard(0), Shard(1) or Replicate() in the others"
        )
    for placement, size in zip(placements, whole.shape, strict=True):
        for name, other in given.items():
            if placement.is_shard(1) and other.shape[1] % size:
                raise InputError(
                    f"{name} has {other.shape[1]} heads, spread over {size} ranks by Shard(1); the "
                    "ranks must divide all numbers of heads, or some have queries of other heads than "
                    "keys: use a smaller mesh"
                )
    own = whole
    if whole.ndim > 1:
        if whole.mesh_dim_names is None:
            raise InputError("the mesh of the DTensors has no names for its dimensions; give it some")
        own = whole[whole.mesh_dim_names[over_tokens[0]]]
    parts = [x.to_local() if name in given else x for name, x in tensors.items()]
    return Kind(own, whole, placements, tuple(tensor.shape[:3])), parts
