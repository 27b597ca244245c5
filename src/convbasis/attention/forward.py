"""Attention under a conv basis: backends, product, normaliser, and the rows that need care."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..convolve import Partition, Sizes, evaluate_safely, fft_product, lost_rows, reached_rows
from ..convolve.choice import Choice, Work, choose
from ..convolve.direct import direct_product
from ..convolve.reference import softmax_rows
from ..convolve.segments import segment_stops
from ..convolve.sums import row_sums
from ..dispatch import Dispatch
from ..logits import segment_logits
from .heads import Head, attend_head

# The largest relative error of an output row that a transform may leave. What a later token can do to
# an earlier row is of that size, and causality is promised to 1e-12 and 1e-5.
_TOLERANCE = {torch.float32: 1.5e-5, torch.float64: 2e-12}


class Inputs(NamedTuple):
    """What attention is computed from: P problems of R query heads; entries at padding are not used."""

    query: Tensor
    """``(P, R, n, d)``."""
    key: Tensor
    """``(P, n, d)``."""
    value: Tensor
    """``(P, n, d_v)``."""
    starts: Tensor
    """``(P, R, k)`` or ``(1, 1, k)``."""
    real: Tensor | None
    """bool ``(P, n)``, False for padding; None where there is none."""
    scale: float
    work: torch.dtype
    """float32 or float64, to compute in."""
    key_bias: Tensor | None = None
    """``(P, R, n)``, added to the logits by key; None for none."""
    lag_bias: Tensor | None = None
    """``(P, R, n)``, added to the logits by lag; None for none."""
    stop: Tensor | None = None
    """``(P,)``, one more than the last real token of the whole sequence; None where real is."""

    def of(self, head: int, tokens: int) -> Inputs:
        """Return the first tokens of one head, of P·R, as one problem: views."""
        sets = self.query.shape[1]
        p, r = divmod(head, sets)
        shared = self.starts.shape[:2] == (1, 1)
        starts = self.starts[0, 0] if shared else self.starts[p, r]
        starts = starts[starts < tokens][None, None]
        return Inputs(
            self.query[p, r, :tokens][None, None],
            self.key[p, :tokens][None],
            self.value[p, :tokens][None],
            starts,
            None if self.real is None else self.real[p, :tokens][None],
            self.scale,
            self.work,
            None if self.key_bias is None else self.key_bias[p, r, :tokens][None, None],
            None if self.lag_bias is None else self.lag_bias[p, r, :tokens][None, None],
            None if self.stop is None else self.stop[p].clamp(max=tokens)[None],
        )

    def cleaned(self) -> Inputs:
        """Return the inputs in the dtype of work, with zeros at padding."""
        tensors = [self.query, self.key, self.value]
        tensors = [tensor.to(self.work) for tensor in tensors]
        if self.real is not None:
            unreal = ~self.real[..., None]
            masks = (unreal[:, None], unreal, unreal)
            tensors = [t.masked_fill(mask, 0.0) for t, mask in zip(tensors, masks, strict=True)]
        query, key, value = tensors
        key_bias, lag_bias = (
            None if bias is None else bias.to(self.work) for bias in (self.key_bias, self.lag_bias)
        )
        if key_bias is not None and self.real is not None:
            key_bias = key_bias.masked_fill(~self.real[:, None], 0.0)
        return self._replace(query=query, key=key, value=value, key_bias=key_bias, lag_bias=lag_bias)

    def logits(self) -> Tensor:
        """Return the segments' kernels of logits, ``(P, R, k, n)``, of cleaned inputs."""
        stop = None if self.stop is None else self.stop[:, None, None]
        return segment_logits(self.query, self.key, self.starts, self.scale, stop, self.lag_bias)

    def by_key(self) -> Tensor | None:
        """Return what is added to the logits by key, ``(P, R, n)`` or ``(P, 1, n)``, of cleaned inputs.

        It is the bias, and -inf at padding; None for neither.
        """
        if self.real is None:
            return self.key_bias
        bias = self.query.new_zeros((len(self.real), 1, 1)) if self.key_bias is None else self.key_bias
        return bias.masked_fill(~self.real[:, None], -torch.inf)

    def key_weights(self) -> tuple[Tensor, Tensor] | None:
        """Return the weights of the keys, at most 1, ``(P, R, n)`` or ``(P, 1, n)``, and the logarithm
        of what they were divided by, ``(P, R, 1)`` or ``(P, 1, 1)``, of cleaned inputs; None where all
        are 1."""
        bias = self.by_key()
        if bias is None:
            return None
        peak = bias.amax(-1, keepdim=True)
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        return (bias - peak).exp(), peak


class Forward(NamedTuple):
    """Result of `conv_basis_fwd`."""

    output: Tensor  # (P, R, n, d_v)
    lse: Tensor  # (P, R, n)
    dispatch: Dispatch


def choose_for(inputs: Inputs, backend: str) -> Choice:
    """Return what computes attention of these inputs; see `choose`."""
    problems, sets, n, d = inputs.query.shape
    longest = int((segment_stops(inputs.starts, n) - inputs.starts).max())
    k, columns = inputs.starts.shape[-1], inputs.value.shape[-1] + 1
    device = inputs.query.device.type
    return choose(backend, Work(n, k, columns, d, longest, problems * sets, inputs.work, device))


def conv_basis_fwd(inputs: Inputs, choice: Choice, *, result: torch.dtype, max_bytes: int) -> Forward:
    """Return softmax attention under a conv basis.

    Args:
        inputs: see `Inputs`.
        choice: the backend and its sizes.
        result: dtype of the output.
        max_bytes: bound on the working memory of the transforms, in bytes.
    """
    problems, sets, n, _ = inputs.query.shape
    width = inputs.value.shape[-1]
    rescue = (0, 0, 0)
    if choice.backend == "partitioned":
        assert choice.sizes is not None
        (output, lse), rescue = _by_heads(inputs, result, choice.sizes, max_bytes)
    elif choice.backend == "direct":
        (output, lse), rescue = _by_matrices(inputs)
    elif choice.backend == "reference":
        everything = torch.arange(problems * sets, device=inputs.query.device)
        rows = torch.arange(n, device=inputs.query.device).expand(problems * sets, n)
        output, lse = _exact_rows(inputs, everything, rows)
    else:
        (output, lse), rescue = _by_logits(inputs.cleaned(), max_bytes)
    dispatch = Dispatch(choice.backend, choice.reason, *rescue)
    dispatch.warn_if_direct(problems * sets)
    output = output.to(result).view(problems, sets, n, width)
    lse = lse.view(problems, sets, n)
    if inputs.real is not None:
        hidden = ~_visible_rows(inputs.real)[:, None]
        output = output.masked_fill(hidden[..., None], 0.0)
        lse = lse.masked_fill(hidden, -torch.inf)
    return Forward(output, lse, dispatch)


def _visible_rows(real: Tensor) -> Tensor:
    """Return the rows from the first to the last real token, bool ``(P, n)``."""
    return real.cummax(-1).values & real.flip(-1).cummax(-1).values.flip(-1)


def _exact_rows(inputs: Inputs, heads: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows ``(g, m)`` of heads ``(g,)``, evaluated directly: output and lse.

    Nothing after the last of the rows is looked at.
    """
    width = inputs.value.shape[-1]
    parts = []
    for head, own in zip(heads.tolist(), rows, strict=True):
        clean = inputs.of(head, int(own.max()) + 1).cleaned()
        if not clean.starts.numel():  # no key before these rows
            zero = clean.value.new_zeros((1, len(own), width))
            parts.append((zero, zero.new_full(zero.shape[:2], -torch.inf)))
            continue
        bias = clean.by_key()
        bias = None if bias is None else bias[:, 0]
        parts.append(
            softmax_rows(clean.logits()[:, 0], clean.starts[:, 0], clean.value, own[None], bias)
        )
    outputs, sums = (torch.cat(column) for column in zip(*parts, strict=True))
    return outputs, sums


def _by_heads(
    inputs: Inputs, result: torch.dtype, sizes: Sizes, max_bytes: int
) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    """Evaluate by partitioned convolution, head by head."""
    problems, sets, n, _ = inputs.query.shape
    starts = inputs.starts.flatten(0, 1).tolist()
    partitions = {tuple(own): Partition(own, n, sizes) for own in starts}

    def transform(chosen: Tensor | None, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        heads = range(problems * sets) if chosen is None else chosen.tolist()
        parts = []
        for head in heads:
            partition = partitions[tuple(starts[head if len(starts) > 1 else 0])]
            parts.append(_one_head(inputs, head, partition, result, dtype, max_bytes))
        outputs, sums, lost = (
            column[0][None] if len(column) == 1 else torch.stack(column)
            for column in zip(*parts, strict=True)
        )
        return (outputs, sums), lost

    return evaluate_safely(transform, lambda heads, rows: _exact_rows(inputs, heads, rows), inputs.work)


def _one_head(
    inputs: Inputs,
    head: int,
    partition: Partition,
    result: torch.dtype,
    dtype: torch.dtype,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, lse and which rows are lost in rounding, for one of P·R heads."""
    sets = inputs.query.shape[1]
    problem = head // sets
    query, value = inputs.query[problem, head % sets], inputs.value[problem]
    real = None if inputs.real is None else inputs.real[problem]
    if not partition.pieces:  # padding alone
        zero = torch.zeros(value.shape, dtype=result, device=value.device)
        sums = torch.full((len(value),), -torch.inf, dtype=inputs.work, device=value.device)
        return zero, sums, torch.zeros(len(value), dtype=torch.bool, device=value.device)
    first = torch.tensor(partition.starts, device=query.device)
    keys = inputs.key[problem].index_select(0, first).to(dtype) * inputs.scale
    n = len(query)
    weights = torch.ones(n, dtype=dtype, device=query.device) if real is None else real.to(dtype)
    offset = 0.0
    if real is not None:
        query, value = (t.masked_fill(~real[:, None], 0.0) for t in (query, value))
    if inputs.key_bias is not None:
        bias = inputs.key_bias[problem, head % sets].to(dtype)
        offset = float(bias.amax() if real is None else bias[real].amax())
        weights = weights * (bias - offset).clamp_(max=0.0).exp_()
        value = value.to(dtype) * weights[:, None]
    by_lag = None if inputs.lag_bias is None else inputs.lag_bias[problem, head % sets].to(dtype)
    if query.dtype != dtype and query.numel() * dtype.itemsize <= max_bytes:
        query, value = query.to(dtype), value.to(dtype)

    def attend(value: Tensor, weights: Tensor) -> Head:
        return attend_head(
            query,
            keys,
            value,
            weights,
            partition,
            result=result,
            max_bytes=max_bytes,
            lag_bias=by_lag,
        )

    done = attend(value, weights)

    def magnitude() -> Tensor:
        norms = torch.linalg.vector_norm(value.to(dtype), dim=-1)
        of_norms = attend(value[:, :0], norms)
        return of_norms.normaliser * (of_norms.shift - done.shift).exp()

    tolerance = _TOLERANCE[inputs.work]
    least = torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    total, output = done.normaliser, done.output
    allowed = torch.stack([done.norms, total], dim=-1).mul_(tolerance)
    good = (done.noise <= allowed).all(-1).logical_and_(total >= least)
    lse = total.log() + done.shift + offset
    if bool(good.all()):
        return output, lse.to(inputs.work), torch.zeros_like(good)
    reached = torch.ones_like(good)
    if not bool(value[0].any()):
        reached = reached_rows(first.new_zeros(1, 1, 1), value[None, None])[0, 0]
        # A row that sees only zero values is zero, whatever the transform says.
        output.masked_fill_(~reached[:, None], 0.0)
    lost = lost_rows(
        done.norms, done.noise[:, 0], reached, magnitude, worked=dtype, tolerance=tolerance
    )
    lost |= ~((done.noise[:, 1] <= allowed[:, 1]) & (total >= least) & total.isfinite())
    if real is not None:
        lost &= _visible_rows(real[None])[0]
    return output, lse.to(inputs.work), lost


def _by_matrices(inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    """Evaluate with the matrices laid out; only what leaves the range of numbers can be lost."""
    n = inputs.query.shape[2]

    def transform(chosen: Tensor | None, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        wide = inputs._replace(work=dtype)
        if chosen is None:
            return _laid_out(wide.cleaned(), inputs.work)
        parts = [_laid_out(wide.of(head, n).cleaned(), inputs.work) for head in chosen.tolist()]
        outputs = torch.cat([results[0] for results, _ in parts])
        sums = torch.cat([results[1] for results, _ in parts])
        return (outputs, sums), torch.cat([lost for _, lost in parts])

    return evaluate_safely(transform, lambda heads, rows: _exact_rows(inputs, heads, rows), inputs.work)


def _laid_out(clean: Inputs, result: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return output and lse of all heads, and which rows are lost."""
    problems, sets, n, _ = clean.query.shape
    logits = clean.logits().flatten(0, 1)
    peak = logits.amax((-1, -2), keepdim=True)
    peak.masked_fill_(peak == -torch.inf, 0.0)
    matrices = (logits.sub_(peak).exp_(), clean.starts.flatten(0, 1))
    weighted = clean.key_weights()
    peak = peak[..., 0].view(problems, sets, 1)
    if weighted is None:
        total = logits.new_zeros((problems * sets, n))
        output = direct_product(*matrices, _by_set(clean.value[:, None], sets), row_sums=total)
    else:
        weights, offset = weighted
        peak = peak + offset
        columns = torch.cat([clean.value[:, None] * weights[..., None], weights[..., None]], dim=-1)
        output, total = direct_product(*matrices, _by_set(columns, sets)).tensor_split([-1], dim=-1)
        total = total[..., 0]
    least = torch.finfo(clean.work).tiny / torch.finfo(clean.work).eps
    lost = total < least
    if clean.real is not None:
        lost &= _visible_rows(clean.real).repeat_interleave(sets, dim=0)
        total = torch.where(total > 0, total, 1.0)
    lse = total.log() + peak.flatten(0, 1)
    return (output.div_(total[..., None]).to(result), lse.to(result)), lost


def _by_set(columns: Tensor, sets: int) -> Tensor:
    """Return columns ``(P, 1 or R, n, c)`` for each of the query heads, ``(P·R, n, c)``."""
    return columns.expand(-1, sets, -1, -1).flatten(0, 1)


def _by_logits(clean: Inputs, max_bytes: int) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    """Evaluate by the paper's scheme, one transform of full length per segment."""
    problems, sets, n, _ = clean.query.shape
    groups = problems * sets
    logits = clean.logits()
    flat_logits = logits.reshape(groups, -1, n)
    flat_starts = clean.starts.expand(problems, sets, -1).reshape(groups, -1)
    weighted = clean.key_weights()
    weights = offset = None
    value = clean.value[:, None]
    if weighted is not None:
        weights, offset = weighted
        value = value * weights[..., None]

    def flat(tensor: Tensor, chosen: Tensor) -> Tensor:
        """Return the part of some heads of a tensor that all heads of a problem may share."""
        own = chosen // sets, chosen % sets if tensor.shape[1] > 1 else 0
        return tensor[own][:, None]

    def transform(chosen: Tensor | None, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        parts, mask, more = (logits, clean.starts, value), clean.real, weights
        if chosen is not None:
            parts = (flat_logits[chosen, None], flat_starts[chosen, None], flat(value, chosen))
            mask = None if clean.real is None else clean.real[chosen // sets]
            more = None if weights is None else flat(weights, chosen)
        if clean.key_bias is None:
            more = None  # whether a key counts is all that there is to say
        output, lse, lost = _transform(
            parts[0].to(dtype), parts[1], parts[2].to(dtype), mask, more, clean.work, max_bytes
        )
        if offset is not None:
            lse = lse + (offset if chosen is None else flat(offset, chosen))
        return (output.flatten(0, 1), lse.flatten(0, 1)), lost.reshape(-1, n)

    return evaluate_safely(transform, lambda heads, rows: _exact_rows(clean, heads, rows), clean.work)


def _transform(
    logits: Tensor,
    starts: Tensor,
    value: Tensor,
    real: Tensor | None,
    weights: Tensor | None,
    result: torch.dtype,
    max_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, lse and which rows are lost in rounding, worked in the dtype of logits."""
    peak = logits.amax((-1, -2), keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    kernels = (logits - peak).exp()
    numerator, noise = fft_product(kernels, starts, value, max_bytes)
    normaliser, doubtful = _normaliser(kernels, starts, real, weights, max_bytes)

    def magnitude() -> Tensor:
        norms = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
        return fft_product(kernels, starts, norms, max_bytes)[0][..., 0]

    visible = torch.ones_like(normaliser, dtype=torch.bool)
    if real is not None:
        visible = _visible_rows(real)[:, None].expand(normaliser.shape)
    reached = reached_rows(starts, value)
    lost = lost_rows(
        torch.linalg.vector_norm(numerator, dim=-1, dtype=torch.float64),
        noise,
        reached,
        magnitude,
        worked=numerator.dtype,
        tolerance=_TOLERANCE[result],
    )
    lost = (lost | doubtful) & visible
    # A row that sees only zero values is zero, whatever the transform says.
    usable = visible & ~lost
    divisor = torch.where(usable, normaliser, 1.0)
    output = (numerator / divisor[..., None].to(numerator.dtype)).masked_fill(
        ~(usable & reached)[..., None], 0.0
    )
    lse = torch.where(visible, divisor.log() + peak[..., 0].double(), -torch.inf)
    return output, lse.to(logits.dtype), lost


def _normaliser(
    kernels: Tensor,
    starts: Tensor,
    real: Tensor | None,
    weights: Tensor | None,
    max_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Return the row sums over real keys, float64 ``(P, R, n)``, and which of them are doubtful."""
    n = kernels.shape[-1]
    stops = segment_stops(starts, n)
    # Below this, entries of a row have left the range of normal numbers.
    least = torch.finfo(kernels.dtype).tiny / torch.finfo(kernels.dtype).eps
    if weights is not None:
        return _weighted_sums(kernels, starts, weights, least, max_bytes)
    if real is None:
        sums = row_sums(kernels, starts, stops)
        return sums, sums < least
    problems, sets, k, _ = kernels.shape
    starts, stops = (t.expand(problems, sets, k) for t in (starts, stops))
    before = torch.nn.functional.pad(real.cumsum(-1), (1, 0))[:, None].expand(-1, sets, -1)
    count = before.gather(-1, stops) - before.gather(-1, starts)
    # Segments begin at a real key: without holes their real keys are starts .. starts + count - 1.
    ends = starts + count
    if bool((before.gather(-1, ends) - before.gather(-1, starts) == count).all()):
        sums = row_sums(kernels, starts, ends)
        return sums, sums < least
    return _weighted_sums(kernels, starts, real[:, None], least, max_bytes)


def _weighted_sums(
    kernels: Tensor, starts: Tensor, weights: Tensor, least: float, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """Return row sums with weights ``(P, R or 1, n)``, float64, and which of them are doubtful."""
    columns = weights[..., None].double()
    sums, noise = fft_product(kernels.double(), starts, columns, max_bytes)
    sums = sums[..., 0]
    good = noise <= sums * 1e-12
    return sums, ~(good & (sums >= least))
