"""How large the error of a head's output is, from exact attention in sampled rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Standard errors above the mean of the squared errors that make the bound, of so many rows and more;
# fewer rows need more, 9 for 64. Errors of rows are heavy in the tails: with the 1.64 of a normal
# distribution it would hold for three heads of four.
_STANDARD_ERRORS, _ROWS = 7.0, 128
_GROWTH = 0.36
# A head of which more than this share of rows is off by more than this part of their norms is told so,
# however small the error of the whole: a few rows that look for something far away may be all that a
# prompt is about.
_SHARE, _PART = 0.05, 0.5


class Judged(NamedTuple):
    """What estimates want to know of the outputs of R heads: norms, in float64."""

    errors: Tensor
    """``(R, s)``, of the errors of the sampled rows."""
    exact: Tensor
    """``(R, s)``, of exact attention of these rows."""
    own: Tensor
    """``(R, s)``, of our own."""
    near: Tensor
    """``(R,)``, the square of the norm of the rows that are exact."""
    far: Tensor
    """``(R,)``, the same of all others."""
    rows: Tensor
    """``(R,)``, how many others there are."""

    @classmethod
    def joined(cls, parts: Sequence[Judged]) -> Judged:
        """Return several as one, of heads with equally many sampled rows."""
        return cls(*(torch.cat(each) for each in zip(*parts, strict=True)))


def judged(
    output: Tensor,
    exact: Tensor,
    rows: Tensor,
    begin: int,
    offset: int = 0,
    squares: Tensor | None = None,
) -> Judged:
    """Return what `bound_of` wants to know of outputs.

    Args:
        output: ``(R, m, d_v)``, of the last m rows.
        exact: ``(R, s, d_v)``, of sampled rows that took no part in any fit.
        rows: ``(s,)`` their positions, begin or later.
        begin: rows before this one are exact.
        offset: the first row of the output.
        squares: ``(R,)`` float64, those of the norms of all rows, where they are known.
    """
    near = max(0, begin - offset)  # exact rows
    before = _square(output[:, :near])
    far = _square(output[:, near:]) if squares is None else (squares - before).clamp(min=0.0)
    others = far.new_full((len(far),), output.shape[1] - near)
    own = output[:, rows - offset]
    return Judged(_norms(own - exact), _norms(exact), _norms(own), before, far, others)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)


def _square(output: Tensor) -> Tensor:
    # By rows, which may lie apart: all at once takes many times as long then.
    return torch.linalg.vector_norm(output, dim=-1).double().square().sum(-1)


def bound_of(found: Judged) -> tuple[Tensor, Tensor]:
    """Return an estimate of the relative error of each head's output in the Euclidean norm, and its
    upper bound at 95 % confidence, ``(R,)`` each; where a twentieth of the rows may be off by more than
    half, the bound is at least that.
    """
    error = found.errors.square()
    count = error.shape[-1]
    # How large the exact output is: our own, as much larger as the sampled rows tell, and no more than
    # they tell by themselves, lest rows in which ours is next to nothing hide the error.
    large = found.exact.square().sum(-1)
    far = found.rows
    grown = found.far * (large / found.own.square().sum(-1).clamp(min=1e-300))
    size = found.near + torch.fmin(grown, large * (far / count))
    size = size.masked_fill(size == torch.inf, torch.nan)  # too large for its dtype: nothing is known
    mean = error.mean(-1)
    deviation = error.std(-1) if count > 1 else mean
    scale = far / size.clamp(min=1e-300)
    width = _STANDARD_ERRORS * max(1.0, _ROWS / count) ** _GROWTH
    bound = mean + width * deviation / count**0.5
    bound = (bound * scale).sqrt()
    of_rows = _exceeded_by_few(found.errors, found.exact)
    return (mean * scale).sqrt(), torch.where(of_rows > _PART, bound.fmax(of_rows), bound)


def _exceeded_by_few(errors: Tensor, norms: Tensor) -> Tensor:
    """Return the relative error that a twentieth of all rows exceeds at most, at 95 % confidence.

    It is the k-th largest of the sampled ones ``(R, s)``, for the largest k that fewer than k of them
    would exceed in one of twenty samples only. Rows smaller than the mean count as the mean: what
    little they hold may be next to nothing. 1, as large as the row, is the most.
    """
    relative = errors / norms.fmax(norms.mean(-1, keepdim=True)).clamp(min=1e-300)
    count = errors.shape[-1]
    expected = _SHARE * count
    k = math.ceil(expected - 1.645 * (expected * (1 - _SHARE)) ** 0.5)
    return relative.topk(max(1, k), dim=-1).values[:, -1].clamp(max=1.0)
