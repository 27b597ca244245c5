"""The attention of a layer whose tokens are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distributed import conv_basis_attention, token_lengths
from ..distributed.handshake import refusals_told
from ..errors import InputError
from .cache import ConvBasisCache

if TYPE_CHECKING:
    from .attention import ConvBasisAttention


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_over_ranks(
    layer: ConvBasisAttention,
    hidden_states: Tensor,
    key_padding_mask: Tensor | None,
    document_lengths: Sequence[int] | None,
    cache: ConvBasisCache | None,
) -> Tensor:
    """Return the heads' outputs for this rank's tokens, ``(B, H, m, head_dim)``."""
    mesh, timeout = layer.mesh, layer.timeout
    with refusals_told(mesh, timeout):
        layer._check(hidden_states)
        if cache is not None:
            raise InputError("cache was given, but a layer with a mesh takes whole sequences alone")
    lengths = token_lengths(hidden_states.shape[1], mesh, timeout=timeout)
    n, first = sum(lengths), sum(lengths[: mesh.get_local_rank()])
    with refusals_told(mesh, timeout):
        query, key, value = layer._projected(hidden_states, first)
        key_bias = layer._key_bias(hidden_states)
        lag_bias = None if layer.lag_bias is None else layer.lag_bias(n)
        segments = layer._segments(n, document_lengths)
    output: Tensor = conv_basis_attention(
        query,
        key,
        value,
        mesh=mesh,
        enable_gqa=True,
        key_padding_mask=key_padding_mask,
        key_bias=key_bias,
        lag_bias=lag_bias,
        document_lengths=document_lengths,
        gradient=layer.gradient,
        backend=layer.backend,
        max_bytes=layer.max_bytes,
        timeout=timeout,
        **segments,
    )
    return output
