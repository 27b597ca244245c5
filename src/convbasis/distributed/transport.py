"""From token shards to shares of heads and columns, and back; some tokens to all; so gradients, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConvBasisError
from .ranks import Ranks
from .shares import Piece, length_of

# One part of a tensor ``(B, heads, tokens, columns)``: its place among the tensors, heads and columns.
Part = tuple[int, slice, slice]
# From what a rank received for its pieces, over all tokens, and from what every rank has, to the
# outputs ``(B, heads, n, columns)`` of its pieces.
Local = Callable[[list[Tensor], list[Tensor]], list[Tensor]]

# What a second backward pass says.
SPENT = (
    "a second backward pass over the same output: what it needs is gone after the first; "
    "compute the output again, or add up the losses before backward"
)


class Roads(NamedTuple):
    """What goes where."""

    ranks: Ranks
    lengths: list[int]
    """Tokens of each rank."""
    wanted: list[list[Part]]
    """For each rank, the parts of the inputs that it needs of all tokens."""
    pieces: list[list[Piece]]
    """For each rank, the outputs that it computes."""
    heads: int
    width: int

    def to_shares(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts that this rank wants, over all tokens."""
        batch = tensors[0].shape[0]
        blocks = [[tensors[i][:, h, :, c] for i, h, c in parts] for parts in self.wanted]
        own = self.wanted[self.ranks.rank]
        shapes = [
            [(batch, length_of(h), length, length_of(c)) for _, h, c in own] for length in self.lengths
        ]
        return _joined(exchange(self.ranks, blocks, shapes, tensors[0], "inputs of heads"))

    def from_shares(
        self, grads: Sequence[Tensor], shapes: Sequence[torch.Size], like: Tensor
    ) -> list[Tensor]:
        """Return the gradients of this rank's tokens, from those of the parts that it wanted."""
        batch, length = shapes[0][0], self.lengths[self.ranks.rank]
        parts = [[(batch, length_of(h), length, length_of(c)) for _, h, c in w] for w in self.wanted]
        arrived = exchange(
            self.ranks, _by_rank(grads, self.lengths), parts, like, "gradients of inputs"
        )
        sums = [like.new_zeros(shape) for shape in shapes]
        for wanted, blocks in zip(self.wanted, arrived, strict=True):
            for (i, h, c), block in zip(wanted, blocks, strict=True):
                sums[i][:, h, :, c] += block
        return sums

    def to_tokens(self, outputs: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return the output of this rank's tokens, from the pieces that all ranks computed."""
        batch, length = like.shape[0], self.lengths[self.ranks.rank]
        shapes = [
            [(batch, length_of(p.heads), length, length_of(p.columns)) for p in pieces]
            for pieces in self.pieces
        ]
        arrived = exchange(
            self.ranks, _by_rank(outputs, self.lengths), shapes, like, "outputs of heads"
        )
        output = like.new_empty((batch, self.heads, length, self.width))
        for pieces, blocks in zip(self.pieces, arrived, strict=True):
            for piece, block in zip(pieces, blocks, strict=True):
                output[:, piece.heads, :, piece.columns] = block
        return output

    def from_tokens(self, grad: Tensor) -> list[Tensor]:
        """Return the gradients of the outputs that this rank computed, over all tokens."""
        batch = grad.shape[0]
        blocks = [[grad[:, p.heads, :, p.columns] for p in pieces] for pieces in self.pieces]
        own = self.pieces[self.ranks.rank]
        shapes = [
            [(batch, length_of(p.heads), length, length_of(p.columns)) for p in own]
            for length in self.lengths
        ]
        return _joined(exchange(self.ranks, blocks, shapes, grad, "gradients of outputs"))


def spread(
    roads: Roads, local: Local, tensors: Sequence[Tensor], everywhere: Sequence[Tensor] = ()
) -> Tensor:
    """Return attention of this rank's tokens, computed in shares of heads and columns.

    Args:
        roads: what goes where.
        local: computes this rank's pieces.
        tensors: ``(B, heads, tokens, columns)`` each, of this rank's tokens, of one dtype.
        everywhere: what every rank has whole. Its gradient in a rank is that of the rank's pieces: the
            sum over ranks is the gradient, as with other parameters that ranks share.

    Raises:
        DistributedError: a rank is missing, or failed by itself.
    """
    output: Tensor = _Spread.apply(roads, local, len(tensors), *tensors, *everywhere)
    return output


class _Spread(torch.autograd.Function):
    """One node for both roads, so that every rank goes them in the same order whatever it computes."""

    @staticmethod
    def forward(ctx: Any, roads: Roads, local: Local, count: int, *given: Tensor) -> Tensor:
        tensors, everywhere = given[:count], [tensor.detach() for tensor in given[count:]]
        arrived = roads.to_shares(tensors)
        needed = any(ctx.needs_input_grad)
        with roads.ranks.noted(), torch.set_grad_enabled(needed):
            if needed:
                for part in (*arrived, *everywhere):
                    part.requires_grad_()
            outputs = local(arrived, everywhere)
        ctx.graph = (arrived, everywhere, outputs) if needed else None
        ctx.roads, ctx.shapes = roads, [tensor.shape for tensor in tensors]
        return roads.to_tokens([output.detach() for output in outputs], tensors[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        roads: Roads = ctx.roads
        if ctx.graph is None:
            raise ConvBasisError(SPENT)
        arrived, everywhere, outputs = ctx.graph
        ctx.graph = None
        incoming = roads.from_tokens(grad)
        sources = [*arrived, *everywhere]
        found: Sequence[Tensor | None] = [None] * len(sources)
        with roads.ranks.noted():
            if outputs:
                found = torch.autograd.grad(outputs, sources, incoming, allow_unused=True)
        whole = [
            torch.zeros_like(part) if own is None else own
            for part, own in zip(sources, found, strict=True)
        ]
        own_tokens = roads.from_shares(whole[: len(arrived)], ctx.shapes, grad)
        return None, None, None, *own_tokens, *whole[len(arrived) :]


def gather_tokens(ranks: Ranks, lengths: Sequence[int], tensor: Tensor, positions: Tensor) -> Tensor:
    """Return tokens of the whole sequence, the same in all ranks; gradients go back to their owners.

    Args:
        ranks: the processes.
        lengths: tokens of each rank.
        tensor: ``(B, H, m, c)``, of this rank's tokens.
        positions: ``(B, p)`` or ``(B, H, p)`` in the whole sequence, the same in all ranks.

    Returns:
        ``(B, H, p, c)``.
    """
    places = positions if positions.ndim == 3 else positions[:, None]
    places = places.expand(*tensor.shape[:2], -1)
    found: Tensor = _Gather.apply(ranks, list(lengths), tensor, places)
    return found


class _Gather(torch.autograd.Function):
    """Every rank sends the tokens that it owns to all."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, lengths: list[int], tensor: Tensor, places: Tensor) -> Tensor:
        ends = torch.tensor(lengths, device=places.device).cumsum(0)
        owner = torch.searchsorted(ends, places.contiguous(), right=True)  # (B, H, p)
        mine = owner == ranks.rank
        first = int(ends[ranks.rank]) - lengths[ranks.rank]
        b, h, p = mine.nonzero(as_tuple=True)
        index = (b, h, places[b, h, p] - first)
        width = tensor.shape[-1]
        counts = torch.bincount(owner.flatten(), minlength=ranks.size).tolist()
        sizes = [count * width for count in counts]
        arrived = ranks.gather(tensor[index], sizes, "single tokens")
        found = tensor.new_empty((*places.shape, width))
        for rank, rows in enumerate(arrived):
            found[owner == rank] = rows.view(-1, width)
        ctx.ranks, ctx.shape = ranks, tensor.shape
        ctx.save_for_backward(owner, *index)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        owner, *index = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        blocks = [[grad[owner == rank]] for rank in range(ranks.size)]
        own = blocks[ranks.rank][0]
        arrived = ranks.all_to_all(
            blocks, [own.numel()] * ranks.size, grad, "gradients of single tokens"
        )
        total = torch.stack(arrived).sum(0).view(own.shape)
        found = grad.new_zeros(ctx.shape)
        found.index_put_(tuple(index), total, accumulate=True)
        return None, None, found, None


def exchange(
    ranks: Ranks,
    blocks: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    like: Tensor,
    what: str,
) -> list[list[Tensor]]:
    """Send some tensors to each rank, and return those of known shapes that came from each.

    Args:
        ranks: the processes.
        blocks: for each rank, what goes to it.
        shapes: for each rank, of what comes from it.
        like: a tensor of the dtype and device of all.
        what: is exchanged, in at most 32 letters.
    """
    sizes = [[math.prod(shape) for shape in own] for own in shapes]
    arrived = ranks.all_to_all(blocks, [sum(own) for own in sizes], like, what)
    return [
        [part.view(shape) for part, shape in zip(x.split(own), of, strict=True)] if own else []
        for x, own, of in zip(arrived, sizes, shapes, strict=True)
    ]


def _by_rank(tensors: Sequence[Tensor], lengths: list[int]) -> list[list[Tensor]]:
    """Return the tokens of each rank, of tensors over all tokens."""
    parts = [tensor.split(lengths, dim=2) for tensor in tensors]
    return [[part[rank] for part in parts] for rank in range(len(lengths))]


def _joined(arrived: list[list[Tensor]]) -> list[Tensor]:
    """Return tensors over all tokens, from the ranks' parts of each."""
    return [torch.cat(parts, dim=2) for parts in zip(*arrived, strict=True)]
