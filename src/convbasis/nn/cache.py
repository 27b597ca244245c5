"""What decoding remembers: values, one key for each segment, and the last queries."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError


class Past(NamedTuple):
    """What the last tokens attend to."""

    queries: Tensor
    """``(B, H, m, d)`` of the last m tokens: theirs, and as many before as the longest segment has."""
    first_keys: Tensor
    """``(B, H_kv, k, d)``."""
    values: Tensor
    """``(B, H_kv, n, d_v)``."""
    key_bias: Tensor
    """``(B, H, n)``."""


class ConvBasisCache:
    """The past of one `ConvBasisAttention` layer.

    It holds all values and their key biases, but of the keys only the first of each segment, and of the
    queries those of the last longest segment: ``n (d_v + 1) + (n / L + L) d`` numbers for each head
    with segments of L tokens, where a cache of exact attention holds ``n (d + d_v)``.

    A cache belongs to the first layer that uses it.

    Example:
        >>> import torch, convbasis as cb
        >>> layer = cb.nn.ConvBasisAttention(32, 2, segment_length=8).eval()
        >>> cache, x = cb.nn.ConvBasisCache(), torch.randn(1, 20, 32)
        >>> with torch.no_grad():
        ...     parts = [layer(x[:, i : i + 5], cache=cache) for i in range(0, 20, 5)]
        ...     whole = layer(x)
        >>> cache.length, torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
        (20, True)
    """

    def __init__(self) -> None:
        """Make an empty cache."""
        self.length = 0
        """Tokens that it knows."""
        self._owner: weakref.ref[nn.Module] | None = None
        self._values: Tensor | None = None  # (B, H_kv, capacity, d_v)
        self._biases: Tensor | None = None  # (B, H, capacity)
        self.first_keys: Tensor | None = None
        """``(B, H_kv, k, d)``, the first key of each segment."""
        self.queries: Tensor | None = None
        """``(B, H, m, d)``, the queries of the last m tokens."""

    @property
    def values(self) -> Tensor | None:
        """``(B, H_kv, length, d_v)``; None while the cache is empty."""
        return None if self._values is None else self._values[:, :, : self.length]

    @property
    def key_bias(self) -> Tensor | None:
        """``(B, H, length)``, in nats; None while the cache is empty."""
        return None if self._biases is None else self._biases[:, :, : self.length]

    def numbers(self) -> int:
        """Return how many numbers the tokens take, without what is reserved for later ones."""
        kept = (self.values, self.key_bias, self.first_keys, self.queries)
        return sum(tensor.numel() for tensor in kept if tensor is not None)

    def check(self, owner: nn.Module, query: Tensor) -> None:
        """Check that a chunk of queries of a layer can follow, and belong to the layer.

        Raises:
            InputError: the cache is another layer's, or another batch's.
        """
        if self.length and self._owner is not None and self._owner() is not owner:
            raise InputError(
                "the cache belongs to another layer; give each ConvBasisAttention a ConvBasisCache of "
                "its own, and start with new ones for another model"
            )
        self._owner = weakref.ref(owner)
        known = self.queries
        if known is None:
            return
        if known.shape[0] != query.shape[0]:
            raise InputError(
                f"the cache holds a batch of {known.shape[0]} sequences, but {query.shape[0]} were "
                "given"
            )
        if known.dtype != query.dtype or known.device != query.device:
            raise InputError(
                f"the cache holds {known.dtype} on {known.device}, but {query.dtype} on {query.device} "
                "was given; begin with a new cache after moving or converting a model"
            )

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, starts: list[int]
    ) -> Past | None:
        """Take in the next tokens, detached.

        Args:
            query: ``(B, H, m, d)``.
            key: ``(B, H_kv, m, d)``.
            value: ``(B, H_kv, m, d_v)``.
            key_bias: ``(B, H, m)``.
            starts: of all segments up to the last of these tokens.

        Returns:
            what these tokens attend to, themselves included and not detached; None if they are the
            first.
        """
        first, count = self.length, query.shape[2]
        stops = [*starts[1:], first + count]
        longest = max(stop - start for start, stop in zip(starts, stops, strict=True))
        begun = key[:, :, [start - first for start in starts if start >= first]]
        before = self.queries, self.first_keys, self.values, self.key_bias
        own = query, begun, value, key_bias
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in own)
        # What is recorded for a backward pass must not change when later tokens come: all is joined
        # then.
        joined = [
            new if old is None else torch.cat([old, new], dim=2)
            for old, new in list(zip(before, own, strict=True))[: 4 if recorded else 2]
        ]
        self._values = _appended(self._values, value.detach(), first)
        self._biases = _appended(self._biases, key_bias.detach(), first)
        self.first_keys = joined[1].detach()
        self.queries = joined[0].detach()[:, :, max(0, joined[0].shape[2] - longest) :].clone()
        self.length += count
        if not first:
            return None
        if recorded:
            return Past(*joined)
        assert self.values is not None
        assert self.key_bias is not None
        return Past(joined[0], joined[1], self.values, self.key_bias)


def _appended(memory: Tensor | None, part: Tensor, length: int) -> Tensor:
    """Return memory with a part written at a length, in new memory of twice the size if it is full."""
    needed = length + part.shape[2]
    if memory is None or memory.shape[2] < needed:
        grown = part.new_zeros((*part.shape[:2], max(needed, 2 * length), *part.shape[3:]))
        if memory is not None:
            grown[:, :, :length] = memory[:, :, :length]
        memory = grown
    memory[:, :, length:needed] = part
    return memory
