"""Plain shards and DTensors: which mesh the tokens are spread over, and results of the same kind."""

from __future__ import annotations

import sys
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
    tokens: int = 0
    """Of the whole sequence, where DTensors tell it."""

    def wrap(self, output: Tensor, heads: int) -> Tensor:
        """Return an output of this rank as the inputs are."""
        if self.whole is None:
            return output
        from torch.distributed.tensor import DTensor

        shape = [output.shape[0], output.shape[1], self.tokens, output.shape[3]]
        for placement, size in zip(self.placements, self.whole.shape, strict=True):
            if placement.is_shard(0):
                shape[0] *= size
        shape[1] = heads
        strides = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
        wrapped: Tensor = DTensor.from_local(
            output.contiguous(),
            self.whole,
            self.placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=strides,
        )
        return wrapped


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor; nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def unwrap(mesh: object, **tensors: Any) -> tuple[Kind, list[Any]]:
    """Return how tensors are spread, and this rank's parts.

    Args:
        mesh: that of the tokens; None for that of DTensors.
        tensors: by name; all DTensors with the same placements, or none.

    Raises:
        InputError: they are mixed, placed otherwise, or not spread over their tokens.
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
    own = whole
    if whole.ndim > 1:
        if whole.mesh_dim_names is None:
            raise InputError("the mesh of the DTensors has no names for its dimensions; give it some")
        own = whole[whole.mesh_dim_names[over_tokens[0]]]
    parts = [x.to_local() if name in given else x for name, x in tensors.items()]
    return Kind(own, whole, placements, tensor.shape[_TOKENS]), parts
