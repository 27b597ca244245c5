"""The far field by segments of keys: each is one key, the mean, that counts for all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .beyond import Gathered, Shared
from .joined import joined
from .window import BLOCK

_ROWS = 256  # sampled rows that are compared with the means of segments at a time


class Weighing(NamedTuple):
    """What weighs the keys of segments: exact attention of s sampled rows."""

    query: Tensor
    """``(R, s, d)``."""
    first: Tensor
    """``(R or 1, s)``, the first key in the window of each; 0 for a row that does not count."""
    lse: Tensor
    """``(R, s)``."""
    mass: Tensor
    """``(R, p)``, weights of the first keys, each summed over the rows that have it before their
    windows; 0 for those that follow."""
    tokens: Tensor | int
    """``(R, 1)`` or one number: the keys over which a tenth of the mean mass is given to each."""


def segment_length(n: int, num_segments: int) -> int:
    """Return how many tokens a segment of n has: whole blocks, in at most that many segments."""
    blocks = -(-n // BLOCK)
    return -(-blocks // num_segments) * BLOCK


def segment_keys(
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    chosen: Tensor | None,
    before: Tensor,
    span: int,
    scale: float,
    weighing: Weighing | None,
) -> tuple[list[Shared], list[Gathered]]:
    """Return means of segments as keys of blocks of queries, for the keys that nothing else sees.

    A segment is a number of blocks of keys. Blocks before the window that do not fill a segment count
    each for itself, so that a query sees nothing after its own token.

    Args:
        key: ``(1, b·64, d)``, whole blocks; 0 past the end.
        value: ``(1, b·64, d_v)``, the same.
        seen: ``(R, b·64)``, True for keys that count elsewhere, or are past the end.
        chosen: ``(R, c, B)`` blocks of keys that are exact, b for none; None for none at all.
        before: ``(R or 1, c)``, the blocks of keys before the window of each block of queries.
        span: blocks of a segment, from `segment_length`.
        scale: factor of the logits.
        weighing: what weighs the keys of a segment, and the segment as a whole; None for equal weights.

    Complexity: O(n d) time, and O(k + n / (64 k)) keys for k segments.
    """
    heads, total, count = len(seen), key.shape[1] // BLOCK, before.shape[-1]
    whole = total // span
    device = key.device
    numbers = (~seen).to(key.dtype)
    weights = numbers if weighing is None else _sampled_weights(weighing.mass, seen, weighing.tokens)

    def means(tensor: Tensor, length: int, stop: int) -> Tensor:
        """Return the weighted means over runs of keys, ``(R, runs, ·)``."""
        own = weights[:, :stop].unflatten(1, (-1, length))
        share = own / own.sum(-1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
        runs = tensor[0, :stop].unflatten(0, (-1, length))
        # Head by head: all at once they would be rounded in another way, and depend on each other.
        return joined([torch.einsum("rsl,sld->rsd", head[None], runs) for head in share])

    by_block = numbers.unflatten(1, (total, BLOCK)).sum(-1)  # keys that count here
    shared, gathered = [], []
    edge = before.div(span, rounding_mode="floor")  # whole segments before the window
    if whole and int(edge.max()):
        stop = whole * span
        keys = means(key, span * BLOCK, stop * BLOCK)
        own = by_block[:, :stop].unflatten(-1, (whole, span)).sum(-1)[:, None]
        own = own.expand(heads, count, whole)
        if chosen is not None:
            own = _without_chosen(own, by_block, chosen, span)
        own = own.masked_fill(torch.arange(whole, device=device) >= edge[..., None], 0.0)
        bias = own.log_()
        if weighing is not None:
            bias += _corrections(keys.detach(), weighing, span, seen, scale)[:, None]
        shared.append(Shared(keys, means(value, span * BLOCK, stop * BLOCK), bias))
    if span > 1:
        index = edge[..., None] * span + torch.arange(span - 1, device=device)
        inside = index < before[..., None]
        index = index.clamp(max=total - 1).expand(heads, -1, -1)
        own = by_block.gather(1, index.flatten(1)).view_as(index)
        if chosen is not None:
            place = chosen - edge[..., None] * span
            place = place.where((place >= 0) & (place < span - 1), span - 1)  # the others beside
            own = torch.nn.functional.pad(own, (0, 1)).scatter_(2, place, 0.0)[..., : span - 1]
        own = own.masked_fill(~inside, 0.0)
        pools = [means(x, BLOCK, total * BLOCK)[:, :, None] for x in (key, value)]
        gathered.append(Gathered(pools[0], pools[1], index, own.log_()))
    return shared, gathered


def _without_chosen(own: Tensor, by_block: Tensor, chosen: Tensor, span: int) -> Tensor:
    """Return the keys of segments of so many blocks ``(R, c, k)`` less those of chosen blocks."""
    segments = own.shape[-1]
    taken = torch.nn.functional.pad(by_block, (0, 1)).gather(1, chosen.flatten(1)).view_as(chosen)
    place = chosen.div(span, rounding_mode="floor").clamp(max=segments)  # others in one more
    left = torch.nn.functional.pad(own, (0, 1)).scatter_add_(2, place, -taken)
    return left[..., :segments]


def _sampled_weights(mass: Tensor, seen: Tensor, tokens: Tensor | int) -> Tensor:
    """Return the weight of each key in the sampled rows, and a little of the mean, ``(R, b·64)``."""
    mass = torch.nn.functional.pad(mass, (0, seen.shape[-1] - mass.shape[-1]))
    mass = mass.masked_fill(seen, 0.0)
    floor = 0.1 * (mass.sum(-1, keepdim=True) / tokens) + torch.finfo(mass.dtype).tiny
    return (mass + floor).masked_fill(seen, 0.0)


@torch.no_grad()
def _corrections(keys: Tensor, weighing: Weighing, span: int, seen: Tensor, scale: float) -> Tensor:
    """Return what makes the weight of segments right in the mean over sampled rows, in nats ``(R, k)``.

    It is relative to the mean key's logit plus the logarithm of the number of keys. A row counts for a
    segment with the keys that it has before its window.
    """
    length, segments = span * BLOCK, keys.shape[1]
    stop = segments * length
    mass = torch.nn.functional.pad(weighing.mass, (0, max(0, stop - weighing.mass.shape[-1])))
    exact = mass[:, :stop].masked_fill(seen[:, :stop], 0.0).unflatten(-1, (segments, length)).sum(-1)
    # Keys that count here, of each segment before the windows of rows.
    so_far = torch.nn.functional.pad((~seen[:, :stop]).long().cumsum(-1), (1, 0))
    begin = torch.arange(0, stop, length, device=keys.device)
    model, counted = torch.zeros_like(exact), torch.zeros_like(exact)
    parts = (x.split(_ROWS, 1) for x in (weighing.query, weighing.first, weighing.lse))
    for query, first, lse in zip(*parts, strict=True):
        edge = first[..., None].clamp(begin, begin + length).expand(len(keys), -1, -1)  # (R, s, k)
        numbers = so_far.gather(1, edge.flatten(1)).view_as(edge) - so_far[:, None, begin]
        numbers = numbers.to(exact.dtype)
        logits = joined([x[None] @ y.mT[None] for x, y in zip(query, keys, strict=True)])
        logits = logits * scale + numbers.log()
        # What does not count here counts nothing, however large its logit.
        model += (logits - lse[..., None]).exp().masked_fill(numbers == 0, 0.0).sum(1)
        counted += numbers.sum(1)
    tiny = torch.finfo(exact.dtype).tiny
    found = exact.clamp(min=tiny).log() - model.clamp(min=tiny).log()
    return found.masked_fill(counted == 0, 0.0).clamp(-10.0, 10.0)
