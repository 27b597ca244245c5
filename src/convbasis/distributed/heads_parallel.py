"""Tensor parallelism of the attention layer: each rank has the parameters of some heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checks import describe
from ..errors import InputError


def parallelize_heads(layer: nn.Module, mesh: Any) -> nn.Module:
    """Spread the heads of a `convbasis.nn.ConvBasisAttention` over ranks, and return it.

    Every rank of the mesh then takes the same hidden states and returns the same output. It goes
    together with tokens over another dimension of the mesh (the layer's own `mesh`).

    Args:
        layer: the layer, equal in all ranks.
        mesh: DeviceMesh of one dimension, whose size divides the numbers of heads.

    Raises:
        InputError: (a ValueError) it does not, this is another layer, or it has dropout, which every
            rank would draw for itself.
    """
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    heads, kv_heads = getattr(layer, "num_heads", None), getattr(layer, "num_kv_heads", None)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise InputError(f"layer is {describe(layer)}; a ConvBasisAttention is wanted")
    dropout = getattr(getattr(layer, "dropout", None), "p", 0.0)
    if dropout:
        raise InputError(
            f"the layer has dropout={dropout:g}, which every rank would draw for itself; use 0 in the "
            "layer, and drop out what follows it"
        )
    size = mesh.size()
    if heads % size or kv_heads % size:
        raise InputError(
            f"{heads} heads and {kv_heads} key-value heads cannot be divided over {size} ranks; "
            "use a mesh whose size divides both"
        )
    styles: dict[str, Any] = {"o_proj": RowwiseParallel()}
    for name in ("q_proj", "k_proj", "v_proj", "key_gate", "output_gate"):
        if getattr(layer, name, None) is not None:
            styles[name] = ColwiseParallel()
    parallelize_module(layer, mesh, styles)
    bias = getattr(layer, "lag_bias", None)
    if bias is not None:
        spread = distribute_tensor(bias.table.detach(), mesh, [Shard(0)])
        bias.table = nn.Parameter(spread, requires_grad=bias.table.requires_grad)
    return layer
