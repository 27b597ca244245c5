"""HybridState: strictly causal hybrid attention for a prompt that comes in chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_finite, check_qkv, check_scale
from ..errors import InputError
from .heads import HybridStats, attend_heads
from .running import Running
from .settings import Settings, check_settings


class _Kind(NamedTuple):
    """What all chunks have in common."""

    sequences: int
    query_heads: int
    key_value_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._asdict().items())


class HybridState:
    """What `hybrid_attention` with strict=True knows of the tokens so far, for a prompt in chunks.

    Chunks of any sizes give the rows that one call for all tokens gives, up to rounding. A state is for
    one layer and one batch of sequences without padding. It holds one weight for each key and head, the
    last 511 queries at most, with key weights ``samples / 8`` of every 512, and for each head four
    numbers of each of the latest ``2 samples`` rows of estimates; not the keys and values, of which
    each chunk needs all. ``copy.copy`` gives a state that goes on by itself, from the same tokens.

    Args:
        window: see `hybrid_attention`, as all that follow.
        sinks: first tokens that every query sees.
        columns: heaviest single keys, for stretches of 512 queries.
        blocks: blocks of 64 keys for each block of 64 queries.
        far_field: ``"none"`` or ``"segments"``.
        num_segments: at most that many segments.
        key_weights: weigh the keys of a segment, and the segments, by what sampled rows of earlier
            stretches looked at.
        samples: an eighth of them are rows of exact attention for columns and weights, in each stretch.
            Estimates are made of the latest ``2 samples`` of other rows, one in 32 tokens, one in 8
            until there are so many, and are at least the mean error of the chunk's own rows.
        scale: factor of the logits; ``1/sqrt(d)`` by default.
        enable_gqa: allow H to be a multiple of H_kv.
        seed: of all samples.

    Raises:
        InputError: (a ValueError) options that do not fit.

    Complexity:
        For m tokens after n that of `hybrid_attention` for m queries, O((n + m) d) for checks,
        O((m / 512 + 1) (n + m) d) for segments, O(m (n + m) d / 32) for sampled rows, of the first
        tokens O(m (n + m) d / 8), and that of up to 63 queries more where a chunk does not begin at a
        multiple of 64.

    Source:
        "Choosing causally" of docs/mathematics.md.

    Example:
        >>> import torch, convbasis as cb
        >>> q, k, v = torch.randn(3, 1, 2, 900, 16).unbind()
        >>> state = cb.HybridState(window=64, columns=16, blocks=1)
        >>> chunks = [(0, 300), (300, 900)]
        >>> parts = [state.attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b]) for a, b in chunks]
        >>> whole = cb.hybrid_attention(q, k, v, window=64, columns=16, blocks=1, strict=True)
        >>> state.length, torch.allclose(torch.cat(parts, 2), whole, atol=1e-5)
        (900, True)
    """

    def __init__(
        self,
        *,
        window: int = 256,
        sinks: int = 4,
        columns: int = 64,
        blocks: int = 0,
        far_field: str = "none",
        num_segments: int = 128,
        key_weights: bool = False,
        samples: int = 64,
        scale: float | None = None,
        enable_gqa: bool = False,
        seed: int = 0,
    ) -> None:
        """Make the state before the first token."""
        self._settings = Settings(
            window, sinks, columns, blocks, far_field, num_segments, key_weights, samples, seed, True
        )
        check_settings(self._settings)
        check_scale(scale, 1)
        self._scale, self._enable_gqa = scale, enable_gqa
        self._kind: _Kind | None = None
        self._running: list[Running | None] | None = None
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self._length

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention of the next tokens.

        Args:
            query: ``(B, H, m, d)``, of the m tokens after those so far.
            key: ``(B, H_kv, length + m, d)``, of all tokens with these; the earlier ones as before.
            value: ``(B, H_kv, length + m, d_v)``, the same.

        Returns:
            ``(B, H, m, d_v)``. Differentiable with respect to query, key and value.

        Raises:
            InputError: (a ValueError) other shapes, heads, dtype or device than before, keys of other
                tokens than these and all before, NaN or Inf. The state stays what it was.
        """
        return self._attend(query, key, value, False).output

    def attend_stats(self, query: Tensor, key: Tensor, value: Tensor) -> HybridStats:
        """Return `attend` with its log-sum-exp, an estimate of the error, and what ran.

        The estimate is about these tokens, and about those before them where these have few sampled
        rows: the latest ``2 samples`` rows make it.
        """
        return self._attend(query, key, value, True)

    def numbers(self) -> int:
        """Return how many numbers the state holds."""
        return sum(own.numbers() for own in self._running or () if own is not None)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, estimated: bool) -> HybridStats:
        check_qkv(query, key, value, self._enable_gqa, past=self._length)
        kind = _Kind(
            query.shape[0],
            query.shape[1],
            key.shape[1],
            key.shape[-1],
            value.shape[-1],
            query.dtype,
            query.device,
        )
        if self._kind not in (None, kind):
            raise InputError(
                f"the state is of {self._kind}, but this chunk is of {kind}; give chunks of the same "
                "prompt, or begin with a new HybridState"
            )
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            check_finite(name, tensor)
        scale = check_scale(self._scale, query.shape[-1])
        stats, running = attend_heads(
            query, key, value, self._settings, scale, None, estimated, self._running
        )
        self._kind, self._running = kind, running
        self._length += query.shape[2]
        return stats

    def __repr__(self) -> str:
        """Return the settings, and how many tokens it knows."""
        own = self._settings
        return (
            f"HybridState(length={self._length}, window={own.window}, sinks={own.sinks}, "
            f"columns={own.columns}, blocks={own.blocks}, far_field={own.far_field!r})"
        )
