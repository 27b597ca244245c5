"""The gradients of one head by partitioned transforms, and of the rows that need care entry by entry.

A row whose normaliser is small beside the largest of its block would magnify the block's rounding: it
is evaluated by itself, in float64. Where there are many such rows, or the rounding that is to be
expected is still too large a part of a gradient, the head is evaluated in float64; and where many rows
would be too small even so, the matrix is laid out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..convolve import LogitWindows, Partition, Sizes, partitioned_blocks
from ..convolve.gradients import Outer, partitioned_gradients
from ..convolve.reference import row_entries
from ..convolve.spectra import column_step
from .forward import Inputs
from .gradients import Gradients, Incoming, Wanted

# The largest part of its block's largest normaliser that makes a row irregular.
_RANGE = {torch.float32: 1 / 256, torch.float64: 1e-4}
# More irregular rows than this part of a head, and than this number, are too many to be evaluated one
# by one.
_SHARE, _FEW = 0.02, 64
_ROWS = 1 << 16  # that are converted at a time
# The largest expected rounding error of a float32 gradient, relative to it in the Euclidean norm. That
# of values and kernels is known; products for queries and keys of attention have the same matrix.
_TOLERANCE = 3e-5


def head_gradients(
    clean: Inputs,
    head: int,
    incoming: Incoming,
    sizes: Sizes,
    wanted: Wanted,
) -> Gradients | None:
    """Return the gradients of one of P·R heads, ``(1, 1, n, ·)``.

    Args:
        clean: cleaned inputs.
        head: which head.
        incoming: of all heads.
        sizes: of the partition.
        wanted: which gradients.

    Returns:
        None where too many rows are irregular in float64 too: the matrix is to be laid out.
    """
    n = clean.query.shape[2]
    one = clean.of(head, n)
    starts = one.starts[0, 0].tolist()
    if not starts:  # padding alone
        return Gradients.zeros(one, wanted.lag_bias)
    partition = Partition(starts, n, sizes)
    problem, own = divmod(head, clean.query.shape[1])
    rows = Incoming(*(tensor[problem, own] for tensor in incoming))
    for dtype in (clean.work, torch.float64):
        irregular = _irregular(rows.lse, sizes.block, dtype)
        count = int(irregular.sum())
        if count > _SHARE * n and count > _FEW:
            continue
        found = _Head(one, dtype, partition, rows, irregular, wanted).evaluate()
        if found is not None:
            if count:
                _add_irregular(one, rows, irregular.nonzero()[:, 0], wanted, found)
            return found
    return None


def _irregular(lse: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Return the visible rows whose normaliser is small beside the largest of their block, ``(n,)``."""
    visible = lse.isfinite()
    n = len(lse)
    seen = lse.masked_fill(~visible, -torch.inf)
    padded = torch.nn.functional.pad(seen, (0, -n % block), value=-torch.inf).view(-1, block)
    peak = padded.amax(-1).repeat_interleave(block)[:n]
    return visible & (seen < peak + math.log(_RANGE[dtype]))


class _Head:
    """The regular rows of one head, worked in one dtype; tensors of n d numbers stay in their own."""

    def __init__(
        self,
        one: Inputs,
        dtype: torch.dtype,
        partition: Partition,
        rows: Incoming,
        irregular: Tensor,
        wanted: Wanted,
    ) -> None:
        self.one, self.partition, self.wanted, self.dtype = one, partition, wanted, dtype
        self.query, self.key, self.value = one.query[0, 0], one.key[0], one.value[0]
        self.first = torch.tensor(partition.starts, device=self.query.device)
        self.first_keys = self.key.index_select(0, self.first).to(dtype) * one.scale
        by_key, by_lag = one.key_bias, one.lag_bias
        self.lag_bias = None if by_lag is None else by_lag[0, 0].to(dtype)
        by_key = None if by_key is None else by_key.to(dtype)
        weighted = one._replace(key_bias=by_key).key_weights()
        self.weighted = weighted is not None
        self.weights = torch.ones(partition.n, dtype=dtype, device=self.query.device)
        offset = self.weights.new_zeros(())
        if weighted is not None:
            self.weights, offset = weighted[0][0, 0], weighted[1][0, 0, 0]
        self.rows, self.shared = rows.rows, rows.shared
        self.lse = (rows.lse.double() - offset).masked_fill(irregular, torch.inf)

    def weigh(self, rows: Tensor) -> Tensor:
        """Return rows ``(n, ·)`` times the weights of the keys."""
        return rows * self.weights[:, None] if self.weighted else rows

    def windows(self) -> LogitWindows:
        return LogitWindows(self.query, self.first_keys, self.partition, self.lag_bias)

    def evaluate(self) -> Gradients | None:
        """Return the gradients of the one head; None where rounding would be too large a part."""
        forward = self.wanted.gradient == "forward"
        if self.wanted.queries_alone and not forward:
            found = Gradients.zeros(self.one, False)
            return found._replace(query=self._of_attention()[0][None, None])
        columns = forward or self.wanted.lag_bias
        # The gradient of a bias is what is left of two sums, and wants their digits.
        of_values = self.dtype if self.one.key_bias is not None else self.one.work
        value = self.weigh(self.value)
        products = partitioned_gradients(
            self.windows(),
            self.partition,
            value,
            self.weights,
            Outer(self.rows, self.shared, self.lse),
            self.wanted.max_bytes,
            of_columns=columns,
            logarithmic=True,
            dtype=self.dtype,
            result=of_values,
        )
        assert products.weights is not None
        if self.dtype != torch.float64:
            of_x = torch.linalg.vector_norm(products.noise) / torch.linalg.vector_norm(products.x)
            if not float(of_x) <= _TOLERANCE:
                return None
            if products.columns is not None:
                size = float(torch.linalg.vector_norm(products.columns))
                if not products.column_noise <= _TOLERANCE * size:
                    return None
        of_value = self.weigh(products.x)
        of_bias = of_lag = None
        if self.one.key_bias is not None:
            of_bias = (products.x * value).sum(-1) + products.weights * self.weights
        if self.wanted.lag_bias:
            assert products.columns is not None
            of_lag = _by_lag(products.columns, self.partition.starts)
        if forward:
            assert products.columns is not None
            of_query, of_key = self._of_columns(products.columns)
        elif self.wanted.gradient == "attention":
            of_query, of_key = self._of_attention()
        else:
            of_query, of_key = torch.zeros_like(self.query), torch.zeros_like(self.key)
        return Gradients(
            of_query[None, None],
            of_key[None],
            of_value[None],
            None if of_bias is None else of_bias[None, None],
            None if of_lag is None else of_lag[None, None],
        )

    def _of_columns(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of queries and keys, from those of the kernels ``(k, n)``."""
        of_query = torch.empty_like(self.query)
        of_first = torch.zeros_like(self.first_keys)
        for low in range(0, self.partition.n, _ROWS):
            own = slice(low, low + _ROWS)
            of_query[own] = columns[:, own].t() @ self.first_keys
            of_first.addmm_(columns[:, own], self.query[own].to(self.dtype))
        of_key = torch.zeros_like(self.key)
        of_key.index_add_(0, self.first, (of_first * self.one.scale).to(of_key.dtype))
        return of_query, of_key

    def _of_attention(self) -> tuple[Tensor, Tensor]:
        """Return ``scale dS K`` and ``scale dS^T Q``: products with P for each column of the values."""
        value = torch.cat([self.value, torch.ones_like(self.value[:, :1])], dim=-1).to(self.dtype)
        rows = torch.cat([self.rows, self.shared[:, None]], dim=-1).to(self.dtype)
        key = self.weigh(self.key.to(self.dtype))
        query = self.query.to(self.dtype)
        of_query, of_key = torch.zeros_like(query), torch.zeros_like(key)
        d, sizes = key.shape[-1], self.partition.sizes
        pieces, item = len(self.partition.pieces), self.dtype.itemsize
        step = column_step(pieces, sizes.bins, value.shape[-1] * d, 2 * item, self.wanted.max_bytes)
        together = max(1, step // d)
        for low in range(0, value.shape[-1], together):
            high = min(value.shape[-1], low + together)
            self._add_products(query, key, value[:, low:high], rows[:, low:high], of_query, of_key)
        return of_query.mul_(self.one.scale), self.weigh(of_key.mul_(self.one.scale))

    def _add_products(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Tensor,
        of_query: Tensor,
        of_key: Tensor,
    ) -> None:
        """Add what some columns of the values contribute."""
        count, d = value.shape[-1], key.shape[-1]
        x = (value[:, :, None] * key[:, None, :]).flatten(1)
        for block in partitioned_blocks(self.windows(), self.partition, x, None, self.wanted.max_bytes):
            own = slice(*block.rows)
            shift = torch.tensor(block.shifts, dtype=torch.float64, device=x.device)
            height = block.values.shape[-1]
            scale = (shift.repeat_interleave(height) - self.lse[own]).exp_().to(self.dtype)
            factor = (rows[own] * scale[:, None]).unflatten(0, (-1, height)).mT  # (blocks, count, rows)
            low, high = block.columns
            if high - low == count * d:
                parts = block.values.unflatten(1, (count, d)) * factor[:, :, None]
                of_query[own] += parts.sum(1).mT.flatten(0, 1)
            else:  # a part of the columns, which may begin within one of the values
                for c in range(low // d, -(-high // d)):
                    begin, end = max(low, c * d), min(high, (c + 1) * d)
                    part = block.values[:, begin - low : end - low] * factor[:, c, None]
                    of_query[own, begin - c * d : end - c * d] += part.mT.flatten(0, 1)
        if self.wanted.queries_alone:
            return
        outer = (rows[:, :, None] * query[:, None, :]).flatten(1)
        products = partitioned_gradients(
            self.windows(),
            self.partition,
            x,
            None,
            Outer(outer, None, self.lse),
            self.wanted.max_bytes,
            of_columns=False,
        )
        of_key += (products.x.unflatten(1, (count, d)) * value[:, :, None]).sum(1)


def _by_lag(columns: Tensor, starts: list[int]) -> Tensor:
    """Return the sums by lag, ``(n,)``, of columns ``(k, n)`` by row."""
    n = columns.shape[-1]
    sums = columns.new_zeros(n)
    for own, start in zip(columns, starts, strict=True):
        sums[: n - start] += own[start:]
    return sums


def _add_irregular(
    one: Inputs, rows: Incoming, chosen: Tensor, wanted: Wanted, grads: Gradients
) -> None:
    """Add the gradients of some rows of one head, entry by entry in float64."""
    tokens = int(chosen.max()) + 1
    clean = one.of(0, tokens)._replace(work=torch.float64).cleaned()
    logits, starts, bias = clean.logits()[:, 0], clean.starts[:, 0], clean.by_key()
    query, key, value = clean.query[0, 0], clean.key[0], clean.value[0]
    of_kernels = torch.zeros_like(logits[0])
    forward = wanted.gradient == "forward"
    for block, entries, index in row_entries(logits, starts, chosen[None]):
        own = chosen[block]
        extent = entries.shape[-1]
        shifted = entries[0] - rows.lse[own, None].double()
        if bias is not None:
            shifted = shifted + bias[0, 0, :extent]
        weights = shifted.exp_()
        up = rows.rows[own].double()
        grads.value[0, :extent] += (weights.mT @ up).to(grads.value.dtype)
        change = weights * (up @ value[:extent].mT + rows.shared[own, None].double())
        if grads.key_bias is not None:
            grads.key_bias[0, 0, :extent] += change.sum(0).to(grads.key_bias.dtype)
        of_kernels.view(-1).index_add_(0, index[0].flatten(), change.flatten())
        if wanted.gradient == "attention":
            grads.query[0, 0, own] += (change @ key[:extent] * one.scale).to(grads.query.dtype)
            grads.key[0, :extent] += (change.mT @ query[own] * one.scale).to(grads.key.dtype)
    if grads.lag_bias is not None:
        grads.lag_bias[0, 0, :tokens] += of_kernels.sum(0).to(grads.lag_bias.dtype)
    if forward:
        for own, start in zip(of_kernels, starts[0].tolist(), strict=True):
            count = tokens - start
            by_lag = own[:count] * one.scale
            grads.query[0, 0, start:tokens] += (by_lag[:, None] * key[start]).to(grads.query.dtype)
            grads.key[0, start] += (by_lag @ query[start:tokens]).to(grads.key.dtype)
