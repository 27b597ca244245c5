"""ConvBasisAttention: an attention layer for models that are trained with a conv basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import conv_basis_attention
from ..attention.documents import check_documents
from ..checks import check_finite, check_gradient, check_nonnegative, check_positive_int, describe
from ..dispatch import check_backend
from ..errors import InputError
from .cache import ConvBasisCache
from .decode import attend_to_cache
from .lag_bias import LagBias
from .rotary import rotate
from .segments import segment_starts


class ConvBasisAttention(nn.Module):
    """Causal self-attention whose logits are a conv basis, for training from scratch.

    Segments are uniform and each is represented by its first key, so that output i depends on tokens
    0 .. i alone. To the logit ``q[s + i - j]·k[s] / sqrt(head_dim)`` of query i and key j in the
    segment that begins at s are added a bias for key j, which a linear layer reads from its token (the
    key gate), and a learned bias for the lag i - j.

    Args:
        embed_dim: width of the model.
        num_heads: query heads.
        num_kv_heads: key-value heads, each for num_heads / num_kv_heads query heads; num_heads by
            default.
        head_dim: of queries, keys and values; embed_dim / num_heads by default.
        segment_length: tokens of a segment.
        segment_growth: lets segments grow with their position, see `segment_starts`: with 0, the
            default, all have segment_length tokens.
        key_gate: learn the bias by key.
        lag_bias: learn the bias by lag.
        output_gate: multiply the heads' outputs with a sigmoid of a linear layer of the token.
        rotary_base: of rotary position embedding; None for none.
        dropout: probability with which entries of the output are zeroed in training.
        bias: give the projections biases.
        gradient: see `conv_basis_attention`; ``"forward"`` is right for training from scratch.
        backend: see `conv_basis_attention`.
        max_bytes: see `conv_basis_attention`.
        mesh: a DeviceMesh of one dimension over whose ranks the tokens of each sequence are spread, see
            `convbasis.distributed.conv_basis_attention`: hidden states are then those of this rank's
            tokens, and n counts the tokens of all ranks.
        timeout: seconds in which each exchange between ranks is over, or an error names the rank that
            is missing.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: (a ValueError) sizes that do not fit.

    Complexity:
        With segments of L tokens, forward and backward take O(n d log L + n^2 d / L) time and O(n d)
        memory for each head: a fixed L leaves a quadratic term, L times smaller than that of exact
        attention. With segment_growth g it is O(n^1.5 d / g).

    Source:
        F5 (given starts), B2 (bias by key) and "Gradients" of docs/mathematics.md; the biases, the gate
        and growing segments are ours, beyond the paper.

    Example:
        >>> import torch, convbasis as cb
        >>> layer = cb.nn.ConvBasisAttention(64, 4, num_kv_heads=2, segment_length=16)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        segment_length: int = 64,
        segment_growth: float = 0.0,
        key_gate: bool = True,
        lag_bias: bool = True,
        output_gate: bool = False,
        rotary_base: float | None = 10_000.0,
        dropout: float = 0.0,
        bias: bool = False,
        gradient: str = "forward",
        backend: str = "auto",
        max_bytes: int | None = None,
        mesh: Any = None,
        timeout: float = 300.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer."""
        super().__init__()
        self.embed_dim = check_positive_int("embed_dim", embed_dim, "the width of the model")
        self.num_heads = check_positive_int("num_heads", num_heads, "a number of heads")
        if num_kv_heads is None:
            num_kv_heads = num_heads
        self.num_kv_heads = check_positive_int("num_kv_heads", num_kv_heads, "a number of heads")
        if num_heads % num_kv_heads:
            raise InputError(f"num_heads={num_heads} is no multiple of num_kv_heads={num_kv_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise InputError(
                    f"embed_dim={embed_dim} is no multiple of num_heads={num_heads}; give head_dim"
                )
            head_dim = embed_dim // num_heads
        self.head_dim = check_positive_int("head_dim", head_dim, "a number of entries")
        if rotary_base is not None and self.head_dim % 2:
            raise InputError(
                f"head_dim={self.head_dim} is odd, but rotary positions turn pairs; make it even "
                "or give rotary_base=None"
            )
        if rotary_base is not None and check_nonnegative("rotary_base", rotary_base) <= 1.0:
            raise InputError(f"rotary_base={describe(rotary_base)} is not above 1")
        if max_bytes is not None:
            check_positive_int("max_bytes", max_bytes, "a number of bytes")
        self.segment_length = check_positive_int("segment_length", segment_length, "a number of tokens")
        self.segment_growth = check_nonnegative("segment_growth", segment_growth)
        self.rotary_base = rotary_base
        if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise InputError(f"dropout={describe(dropout)} is not a probability below 1")
        check_gradient(gradient)
        check_backend(backend)
        self.gradient, self.backend, self.max_bytes = gradient, backend, max_bytes
        self.mesh, self.timeout = mesh, timeout
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, kv_inner = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, inner, bias=bias, **made)
        self.k_proj = nn.Linear(embed_dim, kv_inner, bias=bias, **made)
        self.v_proj = nn.Linear(embed_dim, kv_inner, bias=bias, **made)
        self.o_proj = nn.Linear(inner, embed_dim, bias=bias, **made)
        self.key_gate = nn.Linear(embed_dim, num_heads, **made) if key_gate else None
        self.lag_bias = LagBias(num_heads).to(device=device, dtype=dtype) if lag_bias else None
        self.output_gate = nn.Linear(embed_dim, inner, bias=bias, **made) if output_gate else None
        self.dropout = nn.Dropout(dropout)
        if self.key_gate is not None:  # no gate at first
            nn.init.zeros_(self.key_gate.weight)
            nn.init.zeros_(self.key_gate.bias)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        document_lengths: Sequence[int] | None = None,
        cache: ConvBasisCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: ``(B, n, embed_dim)``.
            key_padding_mask: bool ``(B, n)``, True for a real token.
            document_lengths: tokens of packed documents, see `conv_basis_attention`; with a mesh those
                of the whole sequence, whereas key_padding_mask is of this rank's tokens.
            cache: the tokens before these; these are added to it. Chunks of any size give what one call
                for all tokens gives. What it holds is detached: gradients stay within the chunk.

        Returns:
            ``(B, n, embed_dim)``.

        Raises:
            InputError: (a ValueError) a wrong shape, dtype or device, NaN, a cache of another layer or
                batch, or a cache together with padding, documents or a mesh.
            DistributedError: with a mesh, ranks that do not fit together, or one that is missing.
        """
        if self.mesh is not None:
            from .over_ranks import attend_over_ranks

            mixed = attend_over_ranks(self, hidden_states, key_padding_mask, document_lengths, cache)
            return self._output(mixed, hidden_states)
        self._check(hidden_states)
        first = 0 if cache is None else cache.length
        query, key, value = self._projected(hidden_states, first)
        n = first + hidden_states.shape[1]
        key_bias = self._key_bias(hidden_states)
        lag_bias = None if self.lag_bias is None else self.lag_bias(n)
        if cache is not None:
            if key_padding_mask is not None or document_lengths is not None:
                raise InputError(
                    "cache was given together with key_padding_mask or document_lengths; a cache holds "
                    "whole sequences of one length: decode such sequences one by one"
                )
            cache.check(self, query)
        if hidden_states.shape[1] == 0:
            return self.o_proj(query.transpose(1, 2).flatten(2))
        if first == 0:
            mixed = conv_basis_attention(
                query,
                key,
                value,
                enable_gqa=True,
                key_padding_mask=key_padding_mask,
                key_bias=key_bias,
                lag_bias=lag_bias,
                document_lengths=document_lengths,
                gradient=self.gradient,
                backend=self.backend,
                max_bytes=self.max_bytes,
                **self._segments(n, document_lengths),
            )
        if cache is not None:
            starts = segment_starts(n, self.segment_length, self.segment_growth)
            biases = key_bias if key_bias is not None else query.new_zeros(query.shape[:3])
            if first:
                for name, tensor in (("query", query), ("key", key), ("value", value)):
                    check_finite(name, tensor)
                check_finite("key_bias", biases)
            past = cache.extend(query, key, value, biases, starts)
            if past is not None:
                zero = query.new_zeros((query.shape[1], n))
                mixed = attend_to_cache(
                    past,
                    zero if lag_bias is None else lag_bias,
                    starts,
                    hidden_states.shape[1],
                    self.head_dim**-0.5,
                )
        return self._output(mixed, hidden_states)

    def _output(self, mixed: Tensor, hidden_states: Tensor) -> Tensor:
        """Return what the layer makes of the heads' outputs ``(B, H, n, head_dim)``."""
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.output_gate is not None:
            mixed = mixed * torch.sigmoid(self.output_gate(hidden_states))
        return self.dropout(self.o_proj(mixed))

    def _check(self, hidden_states: Tensor) -> None:
        if not isinstance(hidden_states, Tensor):
            raise InputError(f"hidden_states is {describe(hidden_states)}; a tensor is wanted")
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.embed_dim:
            raise InputError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; "
                f"(batch, tokens, {self.embed_dim}) is wanted"
            )

        weight = self.q_proj.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        if hidden_states.dtype != weight.dtype and (
            not autocast or torch.float64 in (hidden_states.dtype, weight.dtype)
        ):
            raise InputError(
                f"hidden_states are {hidden_states.dtype} but the layer's parameters are "
                f"{weight.dtype}; convert one of them, or use torch.autocast"
            )
        if hidden_states.device != weight.device:
            raise InputError(
                f"hidden_states are on {hidden_states.device} but the layer is on {weight.device}"
            )

    def _projected(self, hidden_states: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``(B, H, n, d)``, keys and values ``(B, H_kv, n, d)``."""
        query, key, value = (
            # As many heads as there are: a rank may have some of them.
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotary_base is None:
            return query, key, value
        turned = (rotate(tensor, first, self.rotary_base) for tensor in (query, key))
        return next(turned), next(turned), value

    def _key_bias(self, hidden_states: Tensor) -> Tensor | None:
        """Return ``(B, H, n)``."""
        return None if self.key_gate is None else self.key_gate(hidden_states).transpose(1, 2)

    def _segments(self, n: int, document_lengths: Sequence[int] | None) -> dict[str, Any]:
        if self.segment_growth == 0.0:
            return {"segment_length": self.segment_length}
        lengths = [n] if document_lengths is None else check_documents(document_lengths, n)
        starts, begin = [], 0
        for length in lengths:
            own = segment_starts(length, self.segment_length, self.segment_growth)
            starts += [begin + start for start in own]
            begin += length
        return {"starts": starts}

    def extra_repr(self) -> str:
        """Return the sizes, as they were given."""
        parts = [
            f"embed_dim={self.embed_dim}",
            f"num_heads={self.num_heads}",
            f"num_kv_heads={self.num_kv_heads}",
            f"head_dim={self.head_dim}",
            f"segment_length={self.segment_length}",
        ]
        if self.segment_growth:
            parts.append(f"segment_growth={self.segment_growth:g}")
        parts.append(f"rotary_base={self.rotary_base}")
        if self.gradient != "forward":
            parts.append(f"gradient={self.gradient!r}")
        return ", ".join(parts)
