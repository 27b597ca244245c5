"""What a convolution can do for the far keys of a pretrained model's heads, and for which heads.

    python benchmarks/far_fields.py [--lengths 4096 8192] [--layers 0 3 6 ... 27] [--heads-per-layer 3]
        [--texts prose code] [--windows 128 384]

Relative error (L2, against exact attention) of single heads of SmolLM2-135M, by dense emulation: what
is asked is how good a fit can be, not how fast. Every far field stands beside the same near keys: a
window that reaches back to the edge of a block as that of segments does, the first 4 tokens, and the 60
heaviest columns of 64 sampled rows. *Sampled* fits know those 64 rows, some a sixteenth of all rows;
*oracle* fits know the sums of the true weights over every row, key and lag, which no sampling can
better. Only what the output file lacks is measured, so that a run that was stopped goes on. Writes
benchmarks/results/far-fields.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import convbasis as cb
from convbasis.hybrid import row_factors, sampling, scaled_conv, selection
from convbasis.hybrid.look import rows_for_fits
from convbasis.hybrid.window import BLOCK, QUERIES, Window
from convbasis.integrations.capture import CapturedLayer, cached_layers
from convbasis.integrations.smollm2 import NAME, load_smollm2, load_tokenizer, sample_text, token_ids
from convbasis.storage import save_text

ROOT = Path(__file__).parent.parent
SINKS, COLUMNS, SAMPLES = 4, 60, 64
KERNELS = (1, 4, 16, 64)
SPLITS = (4, 8, 16)  # rotary pairs that are looked at by lag
BANDS = ((0, 8), (8, 16), (16, 24), (24, 32))
SWEEPS, LAG_BINS = 40, 64
TINY = 1e-30

KINDS = ("local", "sink", "columns", "retrieval", "diffuse")
DROPPED, SEGMENTS = "dropped", "segments, key weights"
SAMPLED = (
    "conv, sampled",
    "conv, sampled, mass of segments",
    "conv, key weights",
    "conv, key weights, mass of segments",
    "conv of every lag, a row of 16, mass of segments",
    "16 kernels of every lag, a row of 16, mass of segments",
)
ORACLE = "conv, oracle"
ORACLES = (ORACLE, *(f"{ORACLE}, {count} kernels" for count in KERNELS[1:]))


class Head:
    """One head with the keys that are near, and its true weights. Matrices are key by query."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Take query, key ``(n, d)`` and value ``(n, d_v)``."""
        self.query, self.key, self.value, self.scale = query, key, value, scale
        self.n = n = len(query)
        if n % QUERIES:
            raise SystemExit(f"{n} tokens: a multiple of {QUERIES} is wanted")
        logits = key @ (query * scale).T
        logits.masked_fill_(torch.ones(n, n, dtype=torch.bool).tril_(-1), -torch.inf)
        self.lse = logits.logsumexp(0)
        self.weights = logits.sub_(self.lse).exp_()
        self.more = torch.cat([value, torch.ones(n, 1)], 1)  # the last column adds up the weights
        both = (self.weights.T @ self.more).double()
        self.exact = both[:, :-1] / both[:, -1:]

    def cut(self, tokens: int, shared: int = BLOCK) -> None:
        """Choose near keys as the library does; `shared` queries have windows that begin together."""
        n = self.n
        self.window = window = Window(tokens, shared)
        self.first = window.first(torch.arange(n)).clamp(min=0)
        rows = rows_for_fits(window, n, SAMPLES, 0)
        self.rows = rows
        exact = self.weights[:, rows] * (torch.arange(n)[:, None] < self.first[rows])
        self.columns = selection.heaviest(exact.sum(1)[None], n, SINKS, COLUMNS)
        self.seen = selection.seen_columns(self.columns, n, n)[0]
        # The row from which on a key is far.
        self.start = torch.searchsorted(self.first, torch.arange(n), right=True)
        self.flat = torch.zeros(n * (n + 1))
        self.far = self.flat[: n * n].view(n, n)
        self.far.copy_(self.weights)
        self.hide(self.far)
        near = (self.weights - self.far).T @ self.more
        self.near = near.double()
        self.mass = self.far.sum(0, dtype=torch.float64)
        self.sampled = self.far[:, rows].double()  # (n, s)
        total = self.sampled.sum(1)
        self.key_weights = (total + 0.1 * total.mean()).masked_fill(self.seen, 0.0)
        self.buffer = torch.empty(n * (n + 1))

    def hide(self, matrix: Tensor) -> Tensor:
        """Set what is near, or later, to 0."""
        if self.window.shared == 1:
            matrix.masked_fill_(torch.arange(self.n) < self.start[:, None], 0.0)
        else:
            for low in range(0, self.n, BLOCK):
                matrix[low : low + BLOCK, : int(self.start[low])] = 0.0
        matrix[self.seen] = 0.0
        return matrix

    @property
    def starts(self) -> Tensor:
        """The row from which on each block of keys is far."""
        return self.start[::BLOCK]

    def error(self, output: Tensor) -> float:
        """The relative error of an output."""
        return float((output.double() - self.exact).norm() / self.exact.norm())

    def merged(self, both: Tensor) -> float:
        """The error with far values and, in the last column, far weights."""
        both = self.near + both
        return self.error(both[:, :-1] / both[:, -1:])

    def product(self, matrix: Tensor) -> Tensor:
        """Values and, in the last column, 1, added up with the weights of a matrix."""
        return (matrix.T @ self.more).double()

    def with_mass(self, both: Tensor, mass: Tensor | None = None) -> Tensor:
        """Rows scaled to a far mass, the true one by default."""
        wanted = self.mass if mass is None else mass
        return both * (wanted / both[:, -1].clamp(min=TINY))[:, None]

    def by_lag(self, flat: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
        """Sums over the lags of ranges of keys, of a matrix that is 0 where it is not far."""
        skew = flat.view(self.n, self.n + 1)[:, : self.n]
        return torch.stack([skew[a:b].sum(0, dtype=torch.float64) for a, b in ranges])

    def laid_out(self, kernels: Tensor, columns: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
        """The matrix columns[j] kernels[r, i - j] on far keys, in the buffer."""
        skew = self.buffer.view(self.n, self.n + 1)
        for (low, high), kernel in zip(ranges, kernels.float(), strict=True):
            skew[low:high, : self.n] = kernel
        skew[:, self.n] = 0.0
        skew.mul_(columns.float()[:, None])
        self.buffer[self.n**2 :] = 0.0
        return self.hide(self.buffer[: self.n**2].view(self.n, self.n))

    def ranges(self, count: int) -> list[tuple[int, int]]:
        """Segments of whole blocks, alike as far as that goes."""
        blocks = self.n // BLOCK
        edges = [BLOCK * (x * blocks // count) for x in range(count + 1)]
        return list(itertools.pairwise(edges))


class Fit(NamedTuple):
    """A matrix rows[i] columns[j] kernels[r, i - j]."""

    rows: Tensor
    columns: Tensor
    kernels: Tensor
    off: float
    """The greatest of the sums' differences to those wanted, each relative to all of the weight."""


def fitted(head: Head, flat: Tensor, ranges: list[tuple[int, int]], sweeps: int = SWEEPS) -> Fit:
    """Proportional fitting to the row, key and lag sums of a matrix on far keys.

    Sums of the fit are products with the kernels, by transforms for each block of keys.
    """
    n, starts = head.n, head.starts.tolist()
    blocks, size = n // BLOCK, n + 2 * BLOCK
    of_block = [next(r for r, (a, b) in enumerate(ranges) if a <= x * BLOCK < b) for x in range(blocks)]
    matrix = flat[: n * n].view(n, n)
    want_rows = matrix.sum(0, dtype=torch.float64)
    want_columns = matrix.sum(1, dtype=torch.float64)
    want_lags = head.by_lag(flat, ranges)
    index = torch.tensor(of_block)
    columns = want_columns / want_columns.max().clamp(min=TINY)
    kernels = (want_lags > 0).double()
    rows = want_rows
    own = torch.zeros(blocks, n, dtype=torch.float64)

    def ratio(wanted: Tensor, found: Tensor) -> Tensor:
        return torch.where(wanted > 0, wanted / found.clamp(min=TINY), 0.0)

    def row_sums(by_column: Tensor) -> Tensor:
        found = torch.fft.irfft(by_column * torch.fft.rfft(kernels, size)[index], size)
        total = torch.zeros(n, dtype=torch.float64)
        for x, start in enumerate(starts):
            total[start:] += found[x, start - x * BLOCK : n - x * BLOCK]
        return total

    def lag_sums(by_row: Tensor, by_column: Tensor) -> Tensor:
        found = torch.zeros(len(ranges), size // 2 + 1, dtype=torch.complex128)
        found.index_add_(0, index, by_row * by_column.conj())
        return torch.fft.irfft(found, size)[:, :n]

    def column_sums(by_row: Tensor) -> Tensor:
        by_lag = torch.fft.rfft(kernels, size).conj()[index]
        return torch.fft.irfft(by_row * by_lag, size)[:, :BLOCK].flatten()

    for sweep in range(sweeps + 1):
        by_column = torch.fft.rfft(columns.view(blocks, BLOCK), size)
        rows = ratio(want_rows, row_sums(by_column))
        own.zero_()
        for x, start in enumerate(starts):
            own[x, start - x * BLOCK : n - x * BLOCK] = rows[start:]
        by_row = torch.fft.rfft(own, size)
        lags = lag_sums(by_row, by_column)
        if sweep == sweeps:
            break
        kernels = ratio(want_lags, lags)
        kernels /= kernels.max().clamp(min=TINY)
        columns = ratio(want_columns, column_sums(by_row))
        columns /= columns.max().clamp(min=TINY)
    everything = want_rows.sum().clamp(min=TINY)
    off = max(
        float((lags * kernels - want_lags).abs().sum() / everything),
        float((column_sums(by_row) * columns - want_columns).abs().sum() / everything),
    )
    return Fit(rows, columns, kernels, off)


def fitted_rows(head: Head, count: int, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor]:
    """The same without lags: rows ``(k, n)`` for each of k segments, and columns ``(n,)``."""
    ranges, blocks = head.ranges(count), head.n // BLOCK
    opened = torch.arange(head.n) >= head.starts[:, None]
    by_block = head.far.view(blocks, BLOCK, head.n).sum(1, dtype=torch.float64)
    want = torch.stack([by_block[a // BLOCK : b // BLOCK].sum(0) for a, b in ranges])
    want_columns = head.far.sum(1, dtype=torch.float64)
    columns = want_columns.clone()
    rows = want
    for _ in range(sweeps):
        sums = columns.view(blocks, BLOCK).sum(1)[:, None] * opened
        visible = torch.stack([sums[a // BLOCK : b // BLOCK].sum(0) for a, b in ranges])
        rows = torch.where(want > 0, want / visible.clamp(min=TINY), 0.0)
        later = torch.cat([rows.flip(1).cumsum(1).flip(1), torch.zeros(len(ranges), 1)], 1)
        lengths = torch.tensor([(b - a) // BLOCK for a, b in ranges])
        looked = later.repeat_interleave(lengths, 0).gather(1, head.starts[:, None])
        looked = looked.repeat_interleave(BLOCK)
        columns = torch.where(want_columns > 0, want_columns / looked.clamp(min=TINY), 0.0)
    sums = columns.view(blocks, BLOCK).sum(1)[:, None] * opened
    visible = torch.stack([sums[a // BLOCK : b // BLOCK].sum(0) for a, b in ranges])
    return torch.where(want > 0, want / visible.clamp(min=TINY), 0.0), columns


def by_segments(head: Head, factors: Tensor, columns: Tensor) -> Tensor:
    """Far values and weights where the weight of key j is factors[block of j, i] columns[j]."""
    opened = torch.arange(head.n) >= head.starts[:, None]
    means = (head.more.double() * columns[:, None]).view(-1, BLOCK, head.more.shape[1]).sum(1)
    return (factors * opened).T @ means


def segment_means(head: Head, weighted: bool = True) -> tuple[Tensor, Tensor]:
    """Mean keys of blocks ``(b, d)``, and what part of its block each key is times their number."""
    weights = head.key_weights if weighted else (~head.seen).double()
    own = weights.view(-1, BLOCK)
    share = own / own.sum(1, keepdim=True).clamp(min=TINY)
    mean = torch.einsum("bl,bld->bd", share, head.key.double().view(-1, BLOCK, head.key.shape[1]))
    numbers = (~head.seen).view(-1, BLOCK).sum(1, keepdim=True)
    return mean, (share * numbers).flatten()


def corrections(head: Head, sampled: Tensor) -> Tensor:
    """What makes the weight of blocks right in the mean over sampled rows, for a model ``(n, s)``."""
    opened = head.rows >= head.starts[:, None]
    exact, found = (x.view(-1, BLOCK, len(head.rows)).sum((1, 2)) for x in (head.sampled, sampled))
    change = (exact.clamp(min=TINY) / found.clamp(min=TINY)).log().clamp(-10.0, 10.0).exp()
    return torch.where(opened.any(1), change, 1.0)


def segments(head: Head) -> tuple[Tensor, Tensor]:
    """Means of segments with key weights: factors ``(b, n)`` and columns ``(n,)``."""
    mean, columns = segment_means(head)
    factors = (mean @ head.query.double().T * head.scale - head.lse.double()).exp()
    opened = head.rows >= head.starts[:, None]
    sampled = (factors[:, head.rows] * opened).repeat_interleave(BLOCK, 0) * columns[:, None]
    return factors * corrections(head, sampled)[:, None], columns


def lag_bins(head: Head) -> Tensor:
    """The bin of each lag, alike in logarithm."""
    edges = torch.linspace(0, float(torch.tensor(float(head.n)).log()), LAG_BINS + 1)
    every = torch.arange(head.n).clamp(min=1).log()
    return (torch.bucketize(every, edges) - 1).clamp(0, LAG_BINS - 1)


def mean_of_bins(head: Head, kernels: Tensor) -> Tensor:
    """Kernels with the mean over a bin of lags in the place of each."""
    bins = lag_bins(head)
    count = torch.bincount(bins, minlength=LAG_BINS).clamp(min=1)
    sums = torch.zeros(len(kernels), LAG_BINS, dtype=kernels.dtype).index_add_(1, bins, kernels)
    return (sums / count)[:, bins]


def sampled_lags(
    head: Head, model: Tensor, *, free_rows: bool, sweeps: int = 6
) -> tuple[Tensor, Tensor]:
    """A kernel, constant on bins, that makes the sums over lags of a sampled model ``(n, s)`` right.

    Rows are scaled to their true mass, or blocks of keys are corrected. Returns kernel and corrections.
    """
    lags = (head.rows - torch.arange(head.n)[:, None]).clamp(min=0)
    bins = lag_bins(head)
    at = bins[lags]

    def sums(matrix: Tensor) -> Tensor:
        return torch.zeros(LAG_BINS).double().index_add_(0, at.flatten(), matrix.flatten())

    want = sums(head.sampled)
    own = torch.ones(LAG_BINS, dtype=torch.float64)
    blocks = torch.ones(head.n // BLOCK, dtype=torch.float64)
    for _ in range(sweeps):
        now = model * own[at]
        if free_rows:
            now = now * (head.sampled.sum(0) / now.sum(0).clamp(min=TINY))
        else:
            blocks = corrections(head, now)
            now = now * blocks.repeat_interleave(BLOCK)[:, None]
        own = (own * (want + TINY) / (sums(now) + TINY)).clamp(1e-6, 1e6)
    if not free_rows:
        blocks = corrections(head, model * own[at])
    return own[bins], blocks


def ridge_mass(head: Head, both: Tensor) -> Tensor:
    """Far mass by the library's row factors, ridge regression on the query, for any scale."""
    exact = sampling.SampledRows(
        head.rows, head.weights[:, head.rows].T[None], head.lse[None, head.rows]
    )
    targets = head.sampled.sum(0).log()[None] + exact.lse
    lse = both[:, -1].log()[None].float()
    factors = row_factors.row_factors(
        head.query[None], head.key[None], head.seen[None], head.window, head.scale, exact,
        targets.float(), lse,
    )  # fmt: skip
    return (lse + factors - head.lse)[0].double().exp()


def sampled_fits(head: Head) -> dict[str, float]:
    """Errors of fits that know 64 rows."""
    every = head.ranges(1)
    factors, columns = segments(head)
    found = by_segments(head, factors, columns)
    mass = found[:, -1]
    errors = {
        "segments, key weights, emulated": head.merged(found),
        "segments, key weights, true row mass": head.merged(head.with_mass(found)),
    }
    opened = head.rows >= head.start[:, None]
    far = opened & ~head.seen[:, None]
    # The library's fit, on these near keys.
    exact = sampling.SampledRows(
        head.rows, head.weights[:, head.rows].T[None], head.lse[None, head.rows]
    )
    fit, _ = scaled_conv._fit(head.seen[None], head.window, exact)
    kernel, _ = sampled_lags(head, head.key_weights[:, None] * far, free_rows=True)
    for name, own in (
        ("conv, sampled", (fit.lags[0].double().exp(), fit.columns[0].double().exp())),
        ("conv, key weights", (kernel, head.key_weights)),
        ("no kernel, key weights", (torch.ones(head.n), head.key_weights)),
    ):
        matrix = head.laid_out(own[0][None] / own[0].max(), own[1] / own[1].max(), every)
        both = head.product(matrix)
        if name != "no kernel, key weights":
            errors[name] = head.merged(head.with_mass(both, ridge_mass(head, both)))
        errors[f"{name}, mass of segments"] = head.merged(head.with_mass(both, mass))
        errors[f"{name}, true row mass"] = head.merged(head.with_mass(both))
    # Kernels with a number for each lag, from a sixteenth of the rows.
    some = 16 * torch.arange(head.n // 16)
    some += torch.randint(16, some.shape, generator=torch.Generator().manual_seed(0))
    flat = torch.zeros_like(head.flat)
    flat[: head.n**2].view(head.n, head.n)[:, some] = head.far[:, some]
    for count, name in ((1, SAMPLED[4]), (16, SAMPLED[5])):
        ranges = head.ranges(count)
        own_fit = fitted(head, flat, ranges, 10)
        smooth = 0.9 * own_fit.kernels + 0.1 * mean_of_bins(head, own_fit.kernels)
        weights = own_fit.columns + 0.1 * own_fit.columns.mean()
        both = head.product(head.laid_out(smooth, weights / weights.max(), ranges))
        errors[name] = head.merged(head.with_mass(both, mass))
    # Segments, and a kernel over them.
    own_rows = factors[:, head.rows].repeat_interleave(BLOCK, 0) * columns[:, None] * far
    kernel, change = sampled_lags(head, own_rows, free_rows=False)
    matrix = head.laid_out(kernel[None], columns, every).view(-1, BLOCK, head.n)
    matrix *= (factors * change[:, None]).float()[:, None]
    errors["segments, key weights and a kernel"] = head.merged(head.product(matrix.flatten(0, 1)))
    return errors


def oracle_fits(head: Head, sweeps: int) -> tuple[dict[str, float], float]:
    """Errors of fits to the sums of all true weights, and the most that one is off its sums."""
    errors, off = {}, 0.0
    for count in KERNELS:
        ranges = head.ranges(count)
        fit = fitted(head, head.flat, ranges, sweeps)
        both = head.product(head.laid_out(fit.kernels, fit.columns, ranges)) * fit.rows[:, None]
        name = ORACLE if count == 1 else f"{ORACLE}, {count} kernels"
        errors[name] = head.merged(both)
        off = max(off, fit.off)
        # As many numbers for each token: k kernels, rows and columns; k + 1 rows and columns.
        for size in {1, count + 1} if count < head.n // BLOCK else {head.n // BLOCK}:
            name = f"rows, oracle, {size} segments" if size > 1 else "no kernel, oracle"
            if name not in errors:
                rows, columns = fitted_rows(head, size, sweeps)
                lengths = torch.tensor([(b - a) // BLOCK for a, b in head.ranges(size)])
                both = by_segments(head, rows.repeat_interleave(lengths, 0), columns)
                errors[name] = head.merged(both)
    return errors, off


def pairs(head: Head, low: int, high: int) -> Tensor:
    """Dimensions of the rotary pairs low .. high - 1, which are f and f + d/2."""
    half = head.query.shape[1] // 2
    return torch.cat([torch.arange(low, high), torch.arange(low, high) + half])


def band_parts(head: Head, low: int, high: int) -> tuple[Fit, Tensor]:
    """A convolution for exponentials of some pairs' logits, oracle sums; and their mean by lag."""
    at = pairs(head, low, high)
    flat = torch.zeros(head.n * (head.n + 1))
    own = flat[: head.n**2].view(head.n, head.n)
    torch.mm(head.key[:, at], head.query[:, at].T * head.scale, out=own)
    head.hide(own)
    every = head.ranges(1)
    head.laid_out(torch.ones(1, head.n), torch.ones(head.n), every)
    count = head.by_lag(head.buffer, every)
    mean = head.by_lag(flat, every) / count.clamp(min=1.0)
    most = own.amax(0)
    own.sub_(most).exp_()
    head.hide(own)
    fit = fitted(head, flat, every, 15)
    return fit._replace(rows=fit.rows * most.double().exp()), mean[0]


def band_fits(head: Head) -> dict[str, float]:
    """Errors where some rotary pairs are seen by lag: the others by segments, or exactly."""
    every, errors = head.ranges(1), {}
    mean, columns = segment_means(head)
    query = head.query.double() * head.scale
    half = head.query.shape[1] // 2
    for split in SPLITS:
        at = pairs(head, split, half)
        factors = (mean[:, at] @ query[:, at].T - head.lse.double()).exp()
        fit, lag_mean = band_parts(head, 0, split)
        one = torch.ones(head.n, dtype=torch.float64)
        for name, kernel, own, rows in (
            ("dropped", one, one, one),
            ("mean kernel", lag_mean.exp(), one, one),
            ("conv", fit.kernels[0], fit.columns, fit.rows),
        ):
            matrix = head.laid_out(kernel[None], columns * own, every).view(-1, BLOCK, head.n)
            matrix *= (factors * rows).float()[:, None]
            matrix = matrix.flatten(0, 1)
            change = corrections(head, matrix[:, head.rows].double())
            matrix *= change.repeat_interleave(BLOCK).float()[:, None]
            errors[f"pairs 0-{split - 1} {name}, others segments"] = head.merged(head.product(matrix))
    for low, high in BANDS:
        at = pairs(head, low, high)
        fit, _ = band_parts(head, low, high)
        kernel = head.laid_out(fit.kernels, fit.columns / fit.columns.max(), every)
        band = head.key[:, at] @ (head.query[:, at].T * head.scale)
        rest = head.far * (-band).exp_()
        both = head.product(rest * kernel)
        errors[f"band {low}-{high - 1} conv"] = head.merged(head.with_mass(both))
        errors[f"band {low}-{high - 1} dropped"] = head.merged(head.with_mass(head.product(rest)))
        blocks = (mean[:, at] @ query[:, at].T).exp().float()
        rest.view(-1, BLOCK, head.n).mul_(blocks[:, None])
        errors[f"band {low}-{high - 1} segments"] = head.merged(head.with_mass(head.product(rest)))
    return errors


def library_fits(head: Head, tokens: int) -> dict[str, float]:
    """Errors of what the library computes."""
    near = {"window": tokens, "sinks": SINKS, "columns": COLUMNS, "samples": SAMPLES}
    weighed = {"far_field": "segments", "key_weights": True}
    settings: dict[str, dict[str, Any]] = {
        "dropped, shorter window": {},
        "conv, library, shorter window": {"far_field": "conv"},
        "segments": {"far_field": "segments"},
        SEGMENTS: weighed,
        "16 segments, key weights": {**weighed, "num_segments": 16},
    }
    tensors = [x[None, None] for x in (head.query, head.key, head.value)]
    return {
        name: head.error(cb.hybrid_attention(*tensors, scale=head.scale, **near, **own)[0, 0])
        for name, own in settings.items()
    }


def shares(head: Head) -> dict[str, float]:
    """Where the head looks, in the mean over the rows of the last three quarters."""
    late = slice(head.n // 4, None)
    rows = torch.arange(head.n)[late]
    columns = head.columns[0][head.columns[0] >= SINKS]
    columns = columns[columns < head.n]
    before = columns[:, None] < head.first[late]
    few = head.sampled.topk(16, dim=0).values.sum() / head.sampled.sum().clamp(min=TINY)
    found = {
        "sinks": float(head.weights[:SINKS, late].sum(0).mean()),
        "columns": float((head.weights[columns][:, late] * before).sum() / len(rows)),
        "far": float(head.mass[late].mean()),
        "few": float(few),  # of the far mass, on the 16 heaviest far keys of each row
    }
    return {**found, "window": 1.0 - found["sinks"] - found["columns"] - found["far"]}


def kind(found: dict[str, float]) -> str:
    """The kind of a head, by its shares at the smallest window: where most of its weight is.

    Retrieval are heads with a twentieth of their weight, or more, on far keys, and much of that on few.
    """
    if found["far"] >= 0.05 and found["few"] >= 0.4:
        return "retrieval"
    parts = {"local": "window", "sink": "sinks", "columns": "columns", "diffuse": "far"}
    return max(parts, key=lambda x: found[parts[x]])


def measure(head: Head, tokens: int, bands: bool, sweeps: int) -> dict[str, Any]:
    head.cut(tokens)
    errors = {DROPPED: head.merged(torch.zeros_like(head.near)), **library_fits(head, tokens)}
    errors.update(sampled_fits(head))
    oracle, off = oracle_fits(head, sweeps)
    errors.update(oracle)
    if bands:
        errors.update(band_fits(head))
    return {"window": tokens, "shares": shares(head), "off": off, "errors": errors}


def interval(values: Tensor) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean."""
    index = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[index].mean(1).sort().values
    return float(means[50]), float(means[1949])


def best(errors: dict[str, float], names: tuple[str, ...]) -> float:
    return min(errors[x] for x in names)


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each length, window and kind of heads, what each far field gives."""
    least = min(x["window"] for x in records)
    place = ("n", "text", "layer", "head")
    kinds = {tuple(x[p] for p in place): kind(x["shares"]) for x in records if x["window"] == least}
    rows = []
    for n, window in sorted({(x["n"], x["window"]) for x in records}):
        named = []
        for x in records:
            if (x["n"], x["window"]) == (n, window):
                errors = dict(x["errors"])
                errors["best of the sampled convs"] = best(errors, SAMPLED)
                errors["best of all convs, oracle ones too"] = best(errors, SAMPLED + ORACLES)
                named.append((kinds[tuple(x[p] for p in place)], errors))
        for group, name in itertools.product(("all", *KINDS), named[0][1]):
            have = [e for k, e in named if group in ("all", k) and name in e]
            if not have:
                continue
            values = torch.tensor([e[name] for e in have], dtype=torch.float64)
            low, high = interval(values)
            rows.append(
                {
                    "n": n,
                    "window": window,
                    "kind": group,
                    "far_field": name,
                    "heads": len(have),
                    "mean": float(values.mean()),
                    "low": low,
                    "high": high,
                    "median": float(values.median()),
                    "beats_dropped": sum(e[name] < e[DROPPED] for e in have),
                    "beats_segments": sum(e[name] < e[SEGMENTS] for e in have),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    """Print, for each length and window, a table with a column for each kind of heads."""
    found = {(x["n"], x["window"], x["far_field"], x["kind"]): x for x in rows}
    for n, window in sorted({(x["n"], x["window"]) for x in rows}):
        own = [x for x in rows if (x["n"], x["window"]) == (n, window)]
        kinds = list(dict.fromkeys(x["kind"] for x in own))
        numbers = [found[n, window, DROPPED, k]["heads"] for k in kinds]
        heads = " | ".join(f"{k} ({c})" for k, c in zip(kinds, numbers, strict=True))
        print(f"\nn = {n:,}, window {window}: mean error, 95 % interval; heads that are better than "
              "dropped / than segments with key weights\n")  # fmt: skip
        print(f"| far field | {heads} |\n|{'---|' * (1 + len(kinds))}")
        for name in dict.fromkeys(x["far_field"] for x in own):
            cells = [
                ""
                if x is None
                else f"{x['mean']:.3f} ({x['low']:.3f}-{x['high']:.3f}); "
                f"{x['beats_dropped']} / {x['beats_segments']}"
                for x in (found.get((n, window, name, k)) for k in kinds)
            ]
            print(f"| {name} | {' | '.join(cells)} |")


PAIRS = (
    (SAMPLED[0], DROPPED),
    ("conv, sampled, mass of segments", DROPPED),
    ("conv, sampled, mass of segments", SEGMENTS),
    ("segments, key weights and a kernel", SEGMENTS),
    (ORACLE, "no kernel, oracle"),
    (ORACLE, SEGMENTS),
    (ORACLE, "segments, key weights, true row mass"),
    ("conv, oracle, 64 kernels", "rows, oracle, 64 segments"),
)


def table_of_differences(records: list[dict[str, Any]]) -> None:
    """Print by how much the error of one far field is larger than another's, in the mean over heads and
    without the head in which the oracle convolution is furthest from segments."""
    print(
        "\n| n | window | far field | beside | difference | better "
        "| without the furthest head | better |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for n, window in sorted({(x["n"], x["window"]) for x in records}):
        own = [x["errors"] for x in records if (x["n"], x["window"]) == (n, window)]
        furthest = max(own, key=lambda errors: abs(errors[ORACLE] - errors[SEGMENTS]))
        others = [errors for errors in own if errors is not furthest]
        for pair in PAIRS:
            if all(name in errors for errors in own for name in pair):
                cells = [_difference(*pair, errors) for errors in (own, others) if errors]
                print(f"| {n:,} | {window} | {' | '.join((*pair, *cells))} |")


def _difference(ours: str, theirs: str, errors: list[dict[str, float]]) -> str:
    values = torch.tensor([x[ours] - x[theirs] for x in errors], dtype=torch.float64)
    low, high = interval(values)
    better = f"{int((values < 0).sum())} of {len(values)}"
    return f"{float(values.mean()):+.4f} ({low:+.4f} to {high:+.4f}) | {better}"


def captured(text: str, n: int, layers: list[int]) -> dict[int, CapturedLayer]:
    if text == "code":
        library = Path(sysconfig.get_path("stdlib"))
        content = "\n".join(
            (library / x).read_text(encoding="utf-8") for x in ("argparse.py", "ast.py")
        )
    else:
        content = sample_text()
    ids = token_ids(load_tokenizer(), content, n)
    return cached_layers(lambda: load_smollm2().model, NAME, ids, layers)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(0, 30, 3)))
    parser.add_argument("--heads-per-layer", type=int, default=3)
    parser.add_argument("--texts", nargs="+", choices=["prose", "code"], default=["prose", "code"])
    parser.add_argument("--windows", type=int, nargs="+", default=[128, 384])
    parser.add_argument("--bands", type=int, nargs="*", default=[128], help="windows with rotary bands")
    parser.add_argument("--sweeps", type=int, default=SWEEPS, help="of the oracle fits")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many; go on later")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/far-fields.json")
    options = parser.parse_args()
    begun = time.monotonic()
    records = json.loads(options.output.read_text())["heads"] if options.output.exists() else []
    have = {(x["n"], x["text"], x["layer"], x["head"], x["window"]) for x in records}

    def save() -> None:
        rows = summary(records)
        content = {"torch": torch.__version__, "rows": rows, "heads": records}
        save_text(options.output, json.dumps(content, indent=1) + "\n")

    for n, text in itertools.product(options.lengths, options.texts):
        layers = None
        for layer, part in itertools.product(options.layers, range(options.heads_per_layer)):
            if time.monotonic() - begun > 60 * options.minutes:
                continue
            at = int((part + 0.5) * 9 / options.heads_per_layer)
            missing = [w for w in options.windows if (n, text, layer, at, w) not in have]
            if not missing:
                continue
            layers = layers or captured(text, n, options.layers)
            given = layers[layer]
            group = given.query.shape[1] // given.key.shape[1]
            tensors = given.query[0, at], given.key[0, at // group], given.value[0, at // group]
            head = Head(*(x.contiguous() for x in tensors), given.scale)
            for window in missing:
                clock = time.monotonic()
                found = measure(head, window, window in options.bands, options.sweeps)
                records.append({"n": n, "text": text, "layer": layer, "head": at, **found})
                errors = found["errors"]
                print(
                    f"n = {n:,}, {text}, layer {layer}, head {at}, window {window}: dropped "
                    f"{errors[DROPPED]:.3f}, segments {errors[SEGMENTS]:.3f}, conv sampled "
                    f"{errors[SAMPLED[0]]:.3f}, oracle {errors[ORACLE]:.3f}, off its sums by "
                    f"{found['off']:.0e}, {time.monotonic() - clock:.0f} s",
                    flush=True,
                )
            save()
    if records:
        table(summary(records))
        table_of_differences(records)


if __name__ == "__main__":
    main()
