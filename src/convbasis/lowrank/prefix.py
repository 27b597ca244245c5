"""The causal product: states of chunks, summed up as the sequence goes on."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 128  # tokens whose pairs are multiplied out
_ENTRIES = 1 << 21  # numbers held at a time beside inputs and output


def prefix_product(left: Tensor, right: Tensor, x: Tensor, reverse: bool) -> Tensor:
    """Return rows ``left_i · Σ right_j x_j^T`` over j <= i, or over j >= i with reverse.

    The sum over earlier chunks is a state ``(r, c)``; pairs within a chunk are multiplied out. Chunks
    are taken some at a time, so that states take bounded memory, never n r c numbers.

    Args:
        left: ``(P, n, r)``.
        right: ``(P, n, r)``.
        x: ``(P, n, c)``.
        reverse: sum over later tokens.

    Complexity: O(n c r + n 128 (r + c)) time for each of the P problems.
    """
    problems, n, r = left.shape
    c = x.shape[-1]
    held = problems * (CHUNK * (CHUNK + r + c) + 2 * r * c)
    stretch = max(1, _ENTRIES // held) * CHUNK
    whole = n // CHUNK * CHUNK
    spans = [(low, min(whole, low + stretch), CHUNK) for low in range(0, whole, stretch)]
    if whole < n:
        spans.append((whole, n, n - whole))
    output = x.new_empty((problems, n, c))
    carry = x.new_zeros((problems, 1, r, c))
    for low, high, length in reversed(spans) if reverse else spans:
        own_left, own_right, values = (
            tensor[:, low:high].unflatten(1, (-1, length)) for tensor in (left, right, x)
        )
        states = own_right.mT @ values
        sums = _summed(states, carry, reverse)
        pairs = own_left @ own_right.mT
        pairs = pairs.triu_() if reverse else pairs.tril_()
        rows = pairs @ values
        rows += own_left @ sums[:, :-1] if not reverse else own_left @ sums[:, 1:]
        output[:, low:high] = rows.flatten(1, 2)
        carry = (sums[:, :1] if reverse else sums[:, -1:]).clone()
    return output


def _summed(states: Tensor, carry: Tensor, reverse: bool) -> Tensor:
    """Return the sums before each chunk and behind the last, ``(P, chunks + 1, r, c)``.

    With reverse those from each chunk on, and behind the last.
    """
    if reverse:
        return torch.cat([states, carry], dim=1).flip(1).cumsum(1).flip(1)
    return torch.cat([carry, states], dim=1).cumsum(1)
