"""One head of attention by partitioned convolution, from queries and first keys, block by block.

Neither the k kernels nor their spectra are ever held as a whole: a block of rows is a matrix product,
an exponential, a few transforms and a division.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..convolve import LogitWindows, Partition, partitioned_blocks, row_noise
from ..workspace import take


class Head(NamedTuple):
    """Attention of one head, before the rows that need care."""

    output: Tensor
    """``(n, d_v)``."""
    normaliser: Tensor
    """``(n,)`` float64, divided by exp(shift)."""
    shift: Tensor
    """``(n,)`` float64, in nats, or one 0 for all."""
    norms: Tensor
    """``(n,)`` float64, Euclidean norms of the numerators, divided by exp(shift)."""
    noise: Tensor
    """``(n, 2)`` float64, expected errors of numerators and normalisers, divided by exp(shift)."""


def attend_head(
    query: Tensor,
    first_keys: Tensor,
    value: Tensor,
    weights: Tensor,
    partition: Partition,
    *,
    result: torch.dtype,
    max_bytes: int,
    lag_bias: Tensor | None = None,
) -> Head:
    """Return softmax attention of one head.

    Args:
        query: ``(n, d)``, of any floating-point dtype.
        first_keys: ``(k, d)`` in the dtype to work in, already multiplied with the scale.
        value: ``(n, d_v)``, of any floating-point dtype, already multiplied with the weights.
        weights: ``(n,)``, of the keys in the normaliser: 0 for padding.
        partition: of the matrix.
        result: dtype of the output.
        max_bytes: bound on the memory of the spectra of value, in bytes.
        lag_bias: ``(n,)``, added to the logits by lag, in the dtype to work in; None for none.

    Complexity:
        O(k n d + n d_v log N + k n log N + p n d_v N / M) time with p pieces, blocks of M rows and
        transforms of N; memory O(n d_v) beside the inputs, within max_bytes.
    """
    n, width = value.shape
    work, device = first_keys.dtype, value.device
    output = torch.empty((n, width), dtype=result, device=device)
    normaliser = torch.empty(n, dtype=work, device=device)
    squares = torch.zeros(n, dtype=work, device=device)
    shifts: list[float] = []
    energies = []
    windows = LogitWindows(query, first_keys, partition, lag_bias)
    for block in partitioned_blocks(windows, partition, value, weights, max_bytes):
        rows, columns = slice(*block.rows), slice(*block.columns)
        blocks, count, height = block.values.shape
        total = normaliser[rows].view(blocks, 1, height)
        if block.weights is not None:
            total.copy_(block.weights[:, None])
            shifts.extend(block.shifts)
        target = output[rows, columns]
        in_place = result == work and target.is_contiguous()
        done = target if in_place else take("rows", tuple(target.shape), work, device)
        quotient = torch.div(block.values, total)
        if blocks == 1:
            done.copy_(quotient[0].t())
        else:
            done.view(blocks, height, count).copy_(quotient.mT)
        if count == width:
            torch.linalg.vector_norm(done, dim=-1, out=squares[rows])
            squares[rows].square_()
        else:
            squares[rows] += torch.linalg.vector_norm(done, dim=-1).square_()
        if not in_place:
            target.copy_(done)
        energies.append(block.energy)
    # Columns that were transformed one part after the other: their errors add up in squares.
    energy = energies[0] if len(energies) == 1 else torch.cat(energies)
    if len(energy) > partition.blocks:
        energy = energy.view(-1, partition.blocks, 2).sum(0)
    noise = row_noise(energy, partition.sizes.transform, work)
    shift = torch.tensor(shifts, dtype=torch.float64, device=device)
    height = partition.sizes.block
    total = normaliser.double()
    return Head(
        output,
        total,
        shift.repeat_interleave(height)[:n] if any(shifts) else shift.new_zeros(()),
        squares.double().sqrt_().mul_(total.abs()),
        noise.repeat_interleave(height, dim=0)[:n],
    )
