"""The gradients with the matrix laid out, a tile at a time: O(n^2) time and O(k n) memory.

It is the way for short sequences, and for the queries and keys of ``gradient="attention"``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..convolve.direct import KernelSums, Place, laid_out_rows
from ..workspace import take
from .forward import Inputs
from .gradients import Gradients, Incoming, Wanted

# Nats from a row's normaliser to the largest weight that any row of the head could have. Up to so many,
# what rounds to zero relative to the largest is less than 1e-20 of a row.
_SPREAD = 40.0
_APART = 16  # entries


def tiled_gradients(clean: Inputs, incoming: Incoming, wanted: Wanted) -> Gradients:
    """Return the gradients of all heads.

    Args:
        clean: cleaned inputs.
        incoming: of all heads.
        wanted: which gradients.
    """
    problems, sets, n, _ = clean.query.shape
    groups, width = problems * sets, clean.value.shape[-1]
    logits, starts = clean.logits().flatten(0, 1), clean.starts.flatten(0, 1)
    key, value = (
        tensor[:, None].expand(-1, sets, -1, -1).flatten(0, 1) for tensor in (clean.key, clean.value)
    )
    rows, shared, lse = (tensor.flatten(0, 1) for tensor in incoming)
    matrices = _Weights(clean, logits, starts, lse)
    # As tiles have them: the last row first; with what rows are scaled by, and one more column for what
    # the entries of a row share.
    up = matrices.scaled(torch.cat([rows, shared[..., None]], dim=-1)).flip(1)
    value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    query = clean.query.flatten(0, 1).flip(1)
    # By column of the values and keys, not by token: the faster way to add up products.
    # Rows a little apart from powers of two: at those they would share few lines of a cache.
    of_value, of_key = (
        value.new_zeros((groups, columns, n + _APART))[..., :n] for columns in (width, key.shape[-1])
    )
    of_bias, of_query = value.new_zeros((groups, n)), torch.zeros_like(query)
    forward = wanted.gradient == "forward"
    by_value = not (wanted.queries_alone or wanted.keys_and_queries_alone)
    by_key = clean.key_bias is not None and not wanted.keys_and_queries_alone
    by_lag = wanted.lag_bias and not wanted.keys_and_queries_alone
    sums = KernelSums(logits) if forward or by_lag else None
    for place, weights in matrices.laid_out():
        part, columns = place.matrices, place.columns
        own = slice(n - place.rows.stop, n - place.rows.start)
        of_rows = up[part, own]
        if by_value:
            of_value[part, :, columns].baddbmm_(of_rows[..., :width].mT, weights)
        change = take("laid out changes", tuple(weights.shape), weights.dtype, weights.device)
        torch.bmm(of_rows, value[part, columns].mT, out=change)
        change.mul_(weights)
        if by_key:
            of_bias[part, columns] += change.sum(1)
        if sums is not None:
            sums.add(place, change)
        if not forward:
            of_query[part, own].baddbmm_(change, key[part, columns])
        if not forward and not wanted.queries_alone:
            of_key[part, :, columns].baddbmm_(query[part, own].mT, change)
    of_kernels = None if sums is None else sums.kernels().unflatten(0, (problems, sets))
    if forward:
        assert of_kernels is not None
        through_query, through_key = _through_logits(clean, of_kernels)
    else:
        through_query = of_query.flip(1).unflatten(0, (problems, sets)) * clean.scale
        through_key = of_key.unflatten(0, (problems, sets)).sum(1).mT * clean.scale
    return Gradients(
        through_query,
        through_key,
        of_value.unflatten(0, (problems, sets)).sum(1).mT,
        of_bias.view(problems, sets, n) if clean.key_bias is not None else None,
        of_kernels.sum(2) if of_kernels is not None and wanted.lag_bias else None,
    )


class _Weights:
    """The attention weights, a tile at a time; rows may be divided by factors, which are then known."""

    def __init__(self, clean: Inputs, logits: Tensor, starts: Tensor, lse: Tensor) -> None:
        sets = clean.query.shape[1]
        bias = clean.by_key()
        self._bias = None if bias is None else bias.expand(-1, sets, -1).flatten(0, 1)
        self._logits, self._starts, self._lse = logits, starts, lse
        least = torch.finfo(logits.dtype).min
        self._peak = logits.amax((-1, -2)).clamp(min=least)[:, None]
        self._most = lse.new_zeros((len(lse), 1))  # of the biases by key
        if self._bias is not None:
            self._most = self._bias.amax(-1, keepdim=True).clamp(min=least)
        self._above = self._peak + self._most - lse
        self._narrow = float(self._above.amax()) <= _SPREAD

    def scaled(self, rows: Tensor) -> Tensor:
        """Multiply rows ``(G, n, ·)`` with the factors that the weights are divided by."""
        return rows * self._above.exp()[..., None] if self._narrow else rows

    def laid_out(self) -> Iterator[tuple[Place, Tensor]]:
        """Yield places and weights ``(g, rows, columns)``, the last row first."""
        if not self._narrow:
            yield from self._one_by_one()
            return
        # The k kernels are exponentiated, not their n^2 places.
        kernels = (self._logits - self._peak[..., None]).exp()
        by_key = None if self._bias is None else (self._bias - self._most).exp()
        for place, entries in laid_out_rows(kernels, self._starts, 0.0):
            if by_key is not None:
                entries.mul_(by_key[place.matrices, None, place.columns])
            yield place, entries

    def _one_by_one(self) -> Iterator[tuple[Place, Tensor]]:
        """The same for logits of any range, with factors of 1."""
        for place, entries in laid_out_rows(self._logits, self._starts, -torch.inf):
            part = place.matrices
            entries.sub_(self._lse[part, place.rows].flip(1)[..., None])
            if self._bias is not None:
                entries.add_(self._bias[part, None, place.columns])
            yield place, entries.exp_()


def _through_logits(clean: Inputs, of_kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and key from that of the kernels ``(P, R, k, n)``."""
    problems, sets, k, n = of_kernels.shape
    d = clean.query.shape[-1]
    starts = clean.starts.expand(problems, sets, k)
    # By query position instead of lag: entry s + t of column s.
    lag = torch.arange(n, device=starts.device) - starts[..., None]
    columns = of_kernels.gather(-1, lag.clamp(min=0)).masked_fill(lag < 0, 0.0) * clean.scale
    position = starts.clamp(max=n - 1).reshape(problems, sets * k)
    keys = clean.key.gather(1, position[..., None].expand(-1, -1, d)).view(problems, sets, k, d)
    of_query = columns.mT @ keys
    of_first = (columns @ clean.query).view(problems, sets * k, d)
    of_key = torch.zeros_like(clean.key)
    return of_query, of_key.scatter_add_(1, position[..., None].expand(-1, -1, d), of_first)
