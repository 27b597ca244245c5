"""The oracle: dense float64 versions of everything, written to be read beside docs/mathematics.md.

Nothing here is fast, batched or clever, and nothing here is imported by the library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def dense_matrix(segment_kernels: Tensor, starts: Tensor) -> Tensor:
    """F2: entry (i, j) is c_r[i - j], r the last segment with start <= j; one matrix, ``(n, n)``."""
    k, n = segment_kernels.shape
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for j in range(n):
        owners = [r for r in range(k) if int(starts[r]) <= j]
        if owners:
            matrix[j:, j] = segment_kernels[owners[-1], : n - j].double()
    return matrix


def telescoped_matrix(kernels: Tensor, starts: Tensor) -> Tensor:
    """The definition: the sum over r of conv(b_r, n - s_r)."""
    k, n = kernels.shape
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for r in range(k):
        for j in range(int(starts[r]), n):
            matrix[j:, j] += kernels[r, : n - j].double()
    return matrix


def exact_logits(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """``(n, n)`` lower-triangular logits of one head."""
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return (query.double() @ key.double().T * factor).tril()


def conv_basis_logits(
    query: Tensor,
    key: Tensor,
    starts: Tensor,
    scale: float | None = None,
    lag_bias: Tensor | None = None,
) -> Tensor:
    """Logits of one head where segment r, beginning at s, holds ``scale · q[s + i - j]·k[s]``.

    A bias by lag is added to all of its kernels.
    """
    exact = exact_logits(query, key, scale)
    n = len(exact)
    kernels = torch.zeros(len(starts), n, dtype=torch.float64)
    for r, s in enumerate(starts.tolist()):
        if s < n:
            kernels[r, : n - s] = exact[s:, s]
            if lag_bias is not None:
                kernels[r, : n - s] += lag_bias[: n - s].double()
    return dense_matrix(kernels, starts)


def softmax_attention(
    logits: Tensor, value: Tensor, real: Tensor | None = None, key_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one head, from dense logits; rows that see no key give 0 and -inf."""
    if key_bias is not None:
        logits = logits + key_bias.double()
    n = len(logits)
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    if real is not None:
        visible &= real[None, :]
    masked = logits.double().masked_fill(~visible, -math.inf)
    lse = masked.logsumexp(-1)
    weights = (masked - lse.masked_fill(lse == -math.inf, 0.0)[:, None]).exp()
    return weights @ value.double(), lse


def conv_basis_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    scale: float | None = None,
    real: Tensor | None = None,
    key_bias: Tensor | None = None,
    lag_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Batched oracle: ``(B, H, n, ·)`` with H a multiple of the key-value heads; real ``(B, n)``.

    Biases are ``(B, H, n)``; starts is ``(k,)`` or ``(B, H, k)``. With padding, a segment begins at its
    first real key.
    """
    batch, heads, n, _ = query.shape
    group = heads // key.shape[1]
    outputs, sums = [], []
    for b in range(batch):
        for h in range(heads):
            own = starts if starts.ndim == 1 else starts[b, h]
            if real is not None:
                own = _first_real_keys(own, real[b])
            by_lag = None if lag_bias is None else lag_bias[b, h]
            by_key = None if key_bias is None else key_bias[b, h]
            logits = conv_basis_logits(query[b, h], key[b, h // group], own, scale, by_lag)
            mask = None if real is None else real[b]
            output, lse = softmax_attention(logits, value[b, h // group], mask, by_key)
            outputs.append(output)
            sums.append(lse)
    return (
        torch.stack(outputs).view(batch, heads, n, -1),
        torch.stack(sums).view(batch, heads, n),
    )


def attention_gradients(
    logits: Tensor, query: Tensor, key: Tensor, value: Tensor, incoming: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The attention gradient of one head: exact attention's, with the weights of these logits.

    Gradients of query, key and value, and of the logits ``(n, n)``; entries above the diagonal are 0.
    """
    weights = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf).softmax(-1)
    output = weights @ value.double()
    of_logits = weights * (incoming @ value.double().T - (incoming * output).sum(-1, keepdim=True))
    return (
        scale * of_logits @ key.double(),
        scale * of_logits.T @ query.double(),
        weights.T @ incoming,
        of_logits,
    )


def objective(
    A1: Tensor, A2: Tensor, A3: Tensor, X: Tensor, Y: Tensor, E: Tensor, starts: Tensor
) -> Tensor:
    """The paper's loss of one attention layer with conv-basis logits; differentiable."""
    output, _ = softmax_attention(conv_basis_logits(A1 @ X, A2, starts, 1.0), A3 @ Y)
    return 0.5 * (output - E).square().sum()


def exact_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Batched exact causal softmax attention in float64."""
    starts = torch.arange(query.shape[-2])
    return conv_basis_attention(query, key, value, starts, scale)[0]


BLOCK = 64


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    first: Tensor,
    columns: Sequence[int] = (),
    chosen: Sequence[Sequence[int]] = (),
    span: int | None = None,
    weights: Tensor | None = None,
    corrections: Tensor | None = None,
    factors: Tensor | None = None,
    size: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one head that sees a few keys exactly and the others as a far field.

    Row i sees the keys first[i]..i; before those the columns, and the blocks of 64 keys chosen for its
    block of `size` rows. Of the far keys, which are the others before first[i], it sees nothing; or,
    where span is given, the mean key and value of each segment of so many blocks, which count for its
    far keys; or each with the logit that factors ``(n, n)`` state.

    Weights ``(n,)`` are those of the means, which leave out the columns alone; corrections are added to
    the logits of whole segments. Blocks before first[i] that fill no segment count each for itself.
    """
    query, key, value = query.double(), key.double(), value.double()
    n = len(query)
    keys = torch.arange(n)
    before = keys < first[:, None]
    column = torch.zeros(n, dtype=torch.bool)
    column[list(columns)] = True
    picked = column.expand(n, n).clone()
    for block, own in enumerate(chosen):
        for other in own:
            picked[block * size : (block + 1) * size, other * BLOCK : (other + 1) * BLOCK] = True
    far = before & ~picked
    exact = torch.ones(n, n, dtype=torch.bool).tril() & ~far
    logits = (query @ key.T * scale).masked_fill(~exact, -math.inf)
    if factors is not None:
        logits = torch.where(far, factors.double(), logits)
    if span is None:
        return _weighted(logits, value)
    # The runs of keys that are seen as one, each with the rows that see it and what it is corrected by.
    blocks = -(-n // BLOCK)
    runs = []
    for segment in range(blocks // span):
        low, high = segment * span * BLOCK, (segment + 1) * span * BLOCK
        change = 0.0 if corrections is None else float(corrections[segment])
        runs.append((low, high, first >= high, change))
        for block in range(segment * span, (segment + 1) * span):
            end = (block + 1) * BLOCK
            runs.append((block * BLOCK, end, (first >= end) & (first < high), 0.0))
    for block in range(blocks // span * span, blocks):
        runs.append((block * BLOCK, (block + 1) * BLOCK, first >= (block + 1) * BLOCK, 0.0))
    every = torch.ones(n) if weights is None else weights
    every = every.double().masked_fill(column, 0.0)
    means = []
    for low, high, rows, change in runs:
        own = every[low:high] / every[low:high].sum().clamp(min=1e-300)
        number = far[:, low:high].sum(1).double()
        logit = query @ (own @ key[low:high]) * scale + number.log() + change
        logits = torch.cat([logits, logit.masked_fill(~rows, -math.inf)[:, None]], dim=1)
        means.append(own @ value[low:high])
    return _weighted(logits, torch.cat([value, torch.stack(means)]))


def segment_fit(
    query: Tensor,
    key: Tensor,
    scale: float,
    first: Tensor,
    columns: Sequence[int],
    span: int,
    rows: Tensor,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of keys and corrections of segments of one head, from exact attention in a few rows.

    A key weighs what those rows look at it before their windows, and a tenth of the mean over `length`
    keys, by default n in whole blocks; with no rows all the same. A correction makes the weight of a
    segment right in the mean over the rows, of which each sees the keys before its window.
    """
    query, key = query.double(), key.double()
    n = len(key)
    keys = torch.arange(n)
    column = torch.zeros(n, dtype=torch.bool)
    column[list(columns)] = True
    weights, lse = softmax_attention(exact_logits(query, key, scale), torch.eye(n))
    mass = torch.where(keys < first[rows, None], weights[rows], 0.0).sum(0).masked_fill(column, 0.0)
    every = mass + 0.1 * mass.sum() / (-(-n // BLOCK) * BLOCK if length is None else length) + 1e-290
    every = every.masked_fill(column, 0.0)
    corrections = []
    for segment in range(-(-n // BLOCK) // span):
        part = slice(segment * span * BLOCK, (segment + 1) * span * BLOCK)
        own = every[part] / every[part].sum().clamp(min=1e-300)
        numbers = (~column[part] & (keys[part] < first[rows, None])).sum(1)
        logit = query[rows] @ (own @ key[part]) * scale + numbers.double().log()
        ours = (logit - lse[rows]).exp().sum()
        exact = mass[part].sum()
        none = not bool(numbers.any()) or not bool(exact > 0)
        corrections.append(torch.zeros(()) if none else (exact / ours).log().clamp(-10.0, 10.0))
    return every, torch.stack(corrections) if corrections else torch.zeros(0)


def _weighted(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    lse = logits.logsumexp(-1)
    return (logits - lse[:, None]).exp() @ value, lse


def _first_real_keys(starts: Tensor, real: Tensor) -> Tensor:
    n = len(real)
    bounds = [*starts.tolist(), n]
    found = []
    for r in range(len(starts)):
        inside = [j for j in range(bounds[r], min(bounds[r + 1], n)) if bool(real[j])]
        if inside:
            found.append(inside[0])
    return torch.tensor(found, dtype=torch.int64)
