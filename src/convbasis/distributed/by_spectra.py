"""Attention by blocks over ranks, which exchange spectra: every rank multiplies some frequencies.

Each rank transforms the blocks of kernels whose lags it has, and the pieces of values whose tokens it
has. An exchange brings every rank its frequencies of all of them, and another one the products back.
All of it is done in float64, with one stabiliser for a head. Where the rounding of the transforms is
too large a part of any row of any rank, nothing is returned, in all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_finite
from ..convolve import row_noise
from ..errors import ConvBasisError
from .call import Tokens
from .frequencies import to_frequencies, to_rows
from .grid import Grid
from .strips import Strips
from .transport import SPENT

# The largest expected rounding error of a row, relative to it; that of gradients is about as large.
_TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-9}


class Given(NamedTuple):
    """Tensors of this rank's tokens, in float32 or float64."""

    logits: Tensor
    """``(B, H, m, k)``, of queries and first keys."""
    value: Tensor
    """``(B, H_kv, m, d_v)``."""
    key_bias: Tensor | None
    """``(B, H, m, 1)``."""
    lag_bias: Tensor | None
    """``(B, H, n)``, the same in all ranks."""

    def tensors(self) -> list[Tensor]:
        """Return those that there are."""
        return [x for x in self if x is not None]

    def detached(self) -> Given:
        """Return the same without what made them."""
        biases = (None if x is None else x.detach() for x in (self.key_bias, self.lag_bias))
        return Given(self.logits.detach(), self.value.detach(), *biases)


def attend_by_spectra(
    tokens: Tokens, grid: Grid, given: Given, firsts: Tensor, real: Tensor | None
) -> Tensor | None:
    """Return attention ``(B, H, m, d_v)`` of this rank's tokens; None in all ranks if a row is lost.

    Args:
        tokens: of all ranks.
        grid: blocks, with the starts of the segments.
        given: of this rank.
        firsts: ``(B, k)``, the first real keys of the segments.
        real: bool ``(B, n)``, of all tokens; None if all are real.

    Raises:
        InputError: a bias or a logit is not finite.
        DistributedError: another rank's is not, or a rank is missing.
    """
    tensors = given.tensors()
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    call = _Call(tokens, grid, given, firsts, real, needed)
    if not call.forward():
        return None
    if not needed:
        return call.output
    output: Tensor = _BySpectra.apply(call, *tensors)
    return output


class _BySpectra(torch.autograd.Function):
    """One node for all exchanges, so that every rank makes them in the same order."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        ctx.call = call
        return call.output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.call.backward(grad)


class _Stage(NamedTuple):
    """What a rank computes between two exchanges."""

    sources: list[Tensor]
    result: Tensor

    def pull(self, grad: Tensor) -> list[Tensor]:
        """Return the gradients of the sources."""
        if not self.result.requires_grad:  # of no tokens
            return [torch.zeros_like(x) for x in self.sources]
        found = torch.autograd.grad(self.result, self.sources, grad, allow_unused=True)
        return [
            torch.zeros_like(x) if own is None else own
            for x, own in zip(self.sources, found, strict=True)
        ]


class _Call:
    """One call in one rank: three stages and the exchanges before, between and after them."""

    output: Tensor

    def __init__(
        self,
        tokens: Tokens,
        grid: Grid,
        given: Given,
        firsts: Tensor,
        real: Tensor | None,
        needed: bool,
    ) -> None:
        self.tokens, self.ranks, self.grid, self.needed = tokens, tokens.ranks, grid, needed
        self.given = given.detached()
        self.firsts, self.real = firsts, real
        self.device = given.value.device
        self.batch, self.heads, _, self.segments = given.logits.shape
        self.kv_heads, self.width = given.value.shape[1], given.value.shape[-1]
        # Keys that weigh differently in each head are values of each head.
        self.value_heads = self.kv_heads if given.key_bias is None else self.heads
        self.lags, self.cuts = grid.lag_rows[self.ranks.rank], grid.cuts[self.ranks.rank]
        whole = [(slice(0, self.batch), firsts[0].tolist())]
        groups = [(slice(b, b + 1), own) for b, own in enumerate(firsts.tolist())]
        ranks, lengths, block = tokens.ranks, tokens.lengths, grid.block
        wanted = grid.lag_strips(whole if real is None else groups)
        self.of_logits = Strips(ranks, lengths, wanted, (len(self.lags), block, 1))
        self.of_values, self.of_biases = (
            Strips(
                ranks, lengths, grid.token_strips(self.batch, columns), (1, grid.each * block, columns)
            )
            for columns in (self.width, 1)
        )
        self.stages: list[_Stage] | None = None
        # Rows of spectra of each rank, of what is multiplied and of products.
        self.factors = [
            self.batch * (self.heads * len(lags) + self.value_heads * (self.width + 1) * len(cuts))
            for lags, cuts in zip(grid.lag_rows, grid.cuts, strict=True)
        ]
        self.products = [grid.each * self.batch * self.heads * (self.width + 1)] * self.ranks.size

    def forward(self) -> bool:
        """Compute the output; False if a row of some rank is lost."""
        given, ranks, grid = self.given, self.ranks, self.grid
        self._check()
        logits = self.of_logits.gather(given.logits)
        value = self.of_values.gather(given.value)[:, :, 0]
        by_key = None
        if given.key_bias is not None:
            by_key = self.of_biases.gather(given.key_bias)[:, :, 0]
        peaks = self._peaks(logits, by_key)
        with ranks.noted(), torch.set_grad_enabled(self.needed):
            sources = [x for x in (logits, value, by_key, given.lag_bias) if x is not None]
            sources = [self._leaf(x) for x in sources]
            first = _Stage(sources, self._transformed(sources, peaks))
        spectra = to_frequencies(ranks, grid, first.result.detach(), self.factors)
        with ranks.noted(), torch.set_grad_enabled(self.needed):
            spectra = self._leaf(spectra)
            second = _Stage([spectra], self._multiplied(spectra))
        products = to_rows(ranks, grid, second.result.detach(), self.products)
        entered, reached = self._entered()
        with ranks.noted(), torch.set_grad_enabled(self.needed):
            products = self._leaf(products)
            rows, lost = self._divided(products, entered, reached)
            third = _Stage([products], rows)
        flag = products.new_full((1,), float(lost))
        if any(bool(own) for own in ranks.gather(flag, [1] * ranks.size, "lost rows")):
            return False
        self.output = self.of_values.scatter(rows.detach()[:, :, None], self.width)
        if self.needed:
            self.stages = [first, second, third]
        return True

    def backward(self, grad: Tensor) -> list[Tensor]:
        """Return the gradients of what was given; the exchanges of forward the other way."""
        if self.stages is None:
            raise ConvBasisError(SPENT)
        (first, second, third), self.stages = self.stages, None
        ranks, grid = self.ranks, self.grid
        rows = self.of_values.gather(grad)[:, :, 0]
        with ranks.noted():
            (of_products,) = third.pull(rows)
        own = to_frequencies(ranks, grid, of_products, self.products)
        with ranks.noted():
            (of_spectra,) = second.pull(own)
        own = to_rows(ranks, grid, of_spectra, self.factors)
        with ranks.noted():
            of_logits, of_value, *others = first.pull(own)
        found = [
            self.of_logits.scatter(of_logits, self.segments),
            self.of_values.scatter(of_value[:, :, None], self.width),
        ]
        if self.given.key_bias is not None:
            found.append(self.of_biases.scatter(others.pop(0)[:, :, None], 1))
        return [*found, *others]

    def _leaf(self, tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(self.needed)

    def _check(self) -> None:
        """Check what others have not looked at, and tell them."""
        given = self.given
        with self.ranks.noted():
            check_finite("the logits scale·query·key", given.logits)
            if given.lag_bias is not None:
                check_finite("lag_bias", given.lag_bias)
            if given.key_bias is not None:
                own = None
                if self.real is not None:
                    first = self.tokens.first
                    own = self.real[:, None, first : first + given.key_bias.shape[2], None]
                check_finite("key_bias", given.key_bias, own)

    def _tokens(self, known: Tensor | None) -> Tensor:
        """Return what is known of all tokens, bool ``(B, n)``, for those of this rank's blocks."""
        low, high = self.grid.tokens(self.ranks.rank)
        size = self.grid.each * self.grid.block
        found = torch.zeros((self.batch, size), dtype=torch.bool, device=self.device)
        found[:, : high - low] = True if known is None else known[:, low:high]
        return found

    def _lags(self) -> Tensor:
        """Return the lags of this rank's rows, ``(rows, M)``."""
        block = torch.tensor([block for _, block in self.lags], dtype=torch.int64, device=self.device)
        every = torch.arange(self.grid.block, device=self.device)
        return block[:, None] * self.grid.block + every

    def _exist(self) -> Tensor:
        """Return which lags have rows up to the last real token, ``(B, 1, rows, M)``.

        Rows of padding after that have logits of 0, which may be large beside the others.
        """
        segment = torch.tensor([r for r, _ in self.lags], dtype=torch.int64, device=self.device)
        stop = torch.full((self.batch, 1), self.grid.n, device=self.device)
        if self.real is not None:
            position = torch.arange(1, self.grid.n + 1, device=self.device)
            stop = (position * self.real).amax(-1, keepdim=True)
        exist = self._lags() < (stop - self.firsts[:, segment])[..., None]
        return exist[:, None]

    def _peaks(self, logits: Tensor, by_key: Tensor | None) -> list[Tensor]:
        """Return the largest logit of each head, ``(B, H)`` float64, and the largest bias of keys."""
        known = logits[..., 0].double()
        if self.given.lag_bias is not None:
            known = known + self._by_lag(self.given.lag_bias)
        known = known.masked_fill(~self._exist(), -torch.inf).flatten(2)
        parts = [known]
        if by_key is not None:
            padding = ~self._tokens(self.real)[:, None]
            parts.append(by_key[..., 0].double().masked_fill(padding, -torch.inf))
        none = known.new_full((self.batch, self.heads, 1), -torch.inf)
        own = torch.stack([torch.cat([part, none], -1).amax(-1) for part in parts])
        gathered = self.ranks.gather(own, [own.numel()] * self.ranks.size, "peaks")
        peaks = torch.stack(gathered).amax(0).view(own.shape)
        return list(peaks.masked_fill(peaks == -torch.inf, 0.0))

    def _by_lag(self, bias: Tensor) -> Tensor:
        """Return the biases of this rank's lags, ``(B, H, rows, M)`` float64."""
        return bias[:, :, self._lags().clamp(max=self.grid.n - 1)].double()

    def _transformed(self, sources: Sequence[Tensor], peaks: Sequence[Tensor]) -> Tensor:
        """Return the spectra of kernels and of pieces of values and normaliser, ``(rows, bins, 2)``."""
        logits, value, *others = sources
        weights = self._tokens(self.real)[:, None].double()
        value = value.double().masked_fill(weights[..., None] == 0, 0.0)
        if self.given.key_bias is not None:
            bias = others.pop(0)[..., 0].double() - peaks[1][..., None]
            weights = bias.masked_fill(weights == 0, -torch.inf).exp()
            value = value.repeat_interleave(self.heads // self.kv_heads, 1) * weights[..., None]
        kernel = logits[..., 0].double()
        if others:
            kernel = kernel + self._by_lag(others[0])
        kernel = kernel - peaks[0][..., None, None]
        kernel = kernel.masked_fill(~self._exist(), -torch.inf).exp()
        weights = weights.expand(-1, self.value_heads, -1)
        columns = torch.cat([value, weights[..., None]], -1)
        pieces = self._pieces(columns)
        self._weigh(kernel.detach(), pieces.detach())
        rows = [self._spectra(kernel.flatten(0, 2)), self._spectra(pieces.flatten(0, 3))]
        return torch.view_as_real(torch.cat(rows))

    def _pieces(self, columns: Tensor) -> Tensor:
        """Return the pieces of columns ``(B, G, tokens, c)``, 0 elsewhere, ``(B, G, pieces, c, M)``."""
        size = self.grid.block
        begin = [cut.block * size for cut in self.cuts]
        own = [cut.block - self.grid.each * self.ranks.rank for cut in self.cuts]
        edges = [[cut.low - b, cut.high - b] for cut, b in zip(self.cuts, begin, strict=True)]
        low, high = torch.tensor(edges, dtype=torch.int64, device=self.device).view(-1, 2).unbind(-1)
        places = torch.arange(size, device=self.device)
        inside = (places >= low[:, None]) & (places < high[:, None])
        blocks = columns.unflatten(2, (self.grid.each, size))
        chosen = blocks.index_select(2, torch.tensor(own, dtype=torch.int64, device=self.device))
        return (chosen * inside[..., None]).mT

    def _spectra(self, rows: Tensor) -> Tensor:
        if not len(rows):
            return rows.new_zeros((0, self.grid.bins), dtype=torch.complex128)
        spectra: Tensor = torch.fft.rfft(rows, n=self.grid.transform)
        return spectra

    def _weigh(self, kernel: Tensor, pieces: Tensor) -> None:
        """Keep sums of squares of blocks of kernels and of pieces, and where the first value is."""
        squares = kernel.square().sum(-1)
        of_columns = pieces.square().sum(-1)
        parts = torch.stack([of_columns[..., :-1].sum(-1), of_columns[..., -1]], -1)
        none = float(self.grid.n)
        first = pieces.new_full((self.batch, self.value_heads), none)
        for place, cut in enumerate(self.cuts):
            begin = cut.block * self.grid.block
            found = (pieces[:, :, place, :-1] != 0).any(-2)
            position = begin + found.to(torch.int8).argmax(-1).double()
            first = torch.minimum(first, torch.where(found.any(-1), position, none))
        self.weighed = torch.cat([squares.flatten(), parts.flatten(), first.flatten()])

    def _entered(self) -> tuple[Tensor, Tensor]:
        """Return sums of squares of what enters each of this rank's blocks, of values and of weights,
        ``(B, H, blocks, 2)``; and the first row of each head that sees a value, ``(B, H)``."""
        grid, batch = self.grid, self.batch
        sizes = [
            (batch * self.heads * len(lags), batch * self.value_heads * 2 * len(cuts))
            for lags, cuts in zip(grid.lag_rows, grid.cuts, strict=True)
        ]
        last = batch * self.value_heads
        counts = [sum(own) + last for own in sizes]
        kernels, pieces, firsts = [], [], []
        every = self.ranks.gather(self.weighed, counts, "sums of squares")
        for arrived, own in zip(every, sizes, strict=True):
            kernel, piece, first = arrived.split([*own, last])
            kernels.append(kernel.view(batch, self.heads, own[0] // (batch * self.heads)))
            pieces.append(piece.view(batch, self.value_heads, own[1] // (2 * last), 2))
            firsts.append(first.view(batch, self.value_heads))
        of_kernels = torch.nn.functional.pad(torch.cat(kernels, -1), (0, 1))
        here, before = grid.windows(self.device)
        of_windows = torch.nn.functional.pad(of_kernels[..., here] + of_kernels[..., before], (0, 1))
        begin = grid.each * self.ranks.rank
        pairs = grid.pairs(self.device)[begin : begin + grid.each]
        sharing = self.heads // self.value_heads
        of_pieces = torch.cat(pieces, 2).repeat_interleave(sharing, 1)
        first = torch.stack(firsts).amin(0).repeat_interleave(sharing, 1)
        return of_windows[..., pairs] @ of_pieces, first

    def _multiplied(self, spectra: Tensor) -> Tensor:
        """Return this rank's frequencies of the products of all blocks, ``(rows, F, 2)``."""
        grid, batch, heads, columns = self.grid, self.batch, self.heads, self.width + 1
        known = torch.view_as_complex(spectra)
        bins = known.shape[-1]
        kernels, pieces = [], []
        owners = zip(known.split(self.factors), grid.lag_rows, grid.cuts, strict=True)
        for part, lags, cuts in owners:
            count = batch * heads * len(lags)
            kernels.append(part[:count].view(batch, heads, len(lags), bins))
            pieces.append(part[count:].view(batch, self.value_heads, len(cuts), columns, bins))
        none = known.new_zeros((batch, heads, 1, bins))
        kernel = torch.cat([*kernels, none], 2).mT
        here, before = grid.windows(self.device)
        # The block of lags before stands M places earlier.
        place = torch.arange(bins, device=self.device) + grid.frequencies(self.ranks.rank).start
        angle = 2.0 * torch.pi * grid.block / grid.transform * place.double()
        shift = torch.polar(torch.ones_like(angle), angle)
        window = kernel.index_select(-1, here) + shift[:, None] * kernel.index_select(-1, before)
        window = torch.cat([window, window.new_zeros((*window.shape[:-1], 1))], -1)
        pairs = grid.pairs(self.device)
        factor = torch.cat(pieces, 2).permute(0, 1, 4, 2, 3)
        sharing = heads // self.value_heads
        parts = []
        for low, high, count in grid.row_groups():
            blocks = high - low
            matrix = window.index_select(-1, pairs[low:high, :count].flatten())
            matrix = matrix.view(batch, self.value_heads, sharing, bins, blocks, count).transpose(2, 3)
            matrix = matrix.reshape(batch, self.value_heads, bins, sharing * blocks, count)
            product = matrix @ factor[..., :count, :]
            product = product.view(batch, self.value_heads, bins, sharing, blocks, columns)
            product = product.permute(4, 0, 1, 3, 5, 2)
            parts.append(product.reshape(blocks * batch * heads * columns, bins))
        return torch.view_as_real(torch.cat(parts))

    def _divided(self, products: Tensor, entered: Tensor, reached: Tensor) -> tuple[Tensor, bool]:
        """Return the rows of this rank's blocks ``(B, H, tokens, d_v)``, and whether one is lost.

        Args:
            products: ``(rows, bins, 2)``, spectra.
            entered: see `_entered`.
            reached: see there.
        """
        grid, width = self.grid, self.width
        shape = (grid.each, self.batch, self.heads, width + 1, grid.bins)
        spectra = torch.view_as_complex(products).view(shape)
        circular = torch.fft.irfft(spectra, n=grid.transform).permute(1, 2, 0, 4, 3)
        useful = circular[..., : grid.block, :].flatten(2, 3)  # (B, H, tokens, c)
        numerator, normaliser = useful[..., :width], useful[..., width]
        visible = self._tokens(None)[:, None]
        if self.real is not None:
            after = self.real.cummax(-1).values & self.real.flip(-1).cummax(-1).values.flip(-1)
            visible = self._tokens(after)[:, None]
        low, _ = grid.tokens(self.ranks.rank)
        position = low + torch.arange(useful.shape[2], device=self.device)
        seen = visible & (position >= reached[..., None])
        with torch.no_grad():
            left = circular.square().sum(3)
            energy = torch.stack([left[..., :width].sum(-1), left[..., width]], -1) + 4.0 * entered
            noise = row_noise(energy, grid.transform, torch.float64)
            noise = noise.repeat_interleave(grid.block, 2)
            most = _TOLERANCE[self.given.value.dtype]
            norms = torch.linalg.vector_norm(numerator, dim=-1)
            fine = (noise[..., 1] <= most * normaliser) & normaliser.isfinite()
            fine &= (noise[..., 0] <= most * norms) | ~seen
            lost = bool((visible & ~fine).any())
            usable = visible & (normaliser > 0)
        divisor = torch.where(usable, normaliser, 1.0)
        # What sees zeros alone is zero, whatever the transform says; its gradient is not.
        exact = torch.where(seen[..., None], numerator, numerator - numerator.detach())
        rows = (exact / divisor[..., None]).masked_fill(~usable[..., None], 0.0)
        return rows.to(self.given.value.dtype), lost
