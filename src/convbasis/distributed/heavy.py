"""The heaviest columns of each head, found by all ranks together: each weighs its own keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..hybrid.look import rows_for_fits
from ..hybrid.selection import heaviest, with_first
from ..hybrid.settings import Settings
from ..hybrid.window import Window
from .call import Tokens
from .transport import gather_tokens


@torch.no_grad()
def heavy_columns(
    tokens: Tokens, query: Tensor, key: Tensor, settings: Settings, window: Window, scale: float
) -> Tensor:
    """Return the columns of all heads, the same in all ranks: ``(B, H, c)``, n for none.

    They are those of one process, but for keys whose weights differ by no more than rounding.

    Args:
        tokens: of all ranks.
        query: ``(B, H, m, d)``, of this rank, in the dtype to work in.
        key: ``(B, H_kv, m, d)``.
        settings: number of sinks, columns, samples; seed.
        window: keys that are seen already.
        scale: factor of the logits.

    Complexity: O(s m d) time for each head with s samples; s d + s W + 2 c W numbers sent.
    """
    n = tokens.n
    batch, heads = query.shape[:2]
    if not settings.columns:
        return heaviest(query.new_zeros((heads, 0)), n, settings.sinks, 0).expand(batch, -1, -1)
    rows = rows_for_fits(window, n, settings.samples, settings.seed).to(query.device)
    sampled = gather_tokens(tokens.ranks, tokens.lengths, query, rows.expand(batch, -1))
    positions = tokens.first + torch.arange(key.shape[2], device=key.device)
    later = positions > rows[:, None]
    lse = torch.stack([x.logsumexp(-1) for x in _logits(sampled, key, later, scale)])
    parts = tokens.ranks.gather(lse, [lse.numel()] * tokens.ranks.size, "normalisers of sampled rows")
    lse = torch.stack(parts).logsumexp(0).view(lse.shape)
    hidden = (positions >= window.first(rows)[:, None]) | (positions < settings.sinks)
    found = []
    for logits, total in zip(_logits(sampled, key, later, scale), lse, strict=True):
        weights = logits.sub_(total[..., None]).exp_().masked_fill_(hidden, 0.0)
        found.append(weights.sum(1).topk(min(settings.columns, key.shape[2]), dim=-1))
    masses = torch.cat([own.values for own in found])
    places = torch.cat([own.indices for own in found]) + tokens.first
    counts = [min(settings.columns, length) for length in tokens.lengths]
    sizes = [len(masses) * count for count in counts]
    gathered = zip(
        tokens.ranks.gather(masses, sizes, "masses of columns"),
        tokens.ranks.gather(places, sizes, "places of columns"),
        counts,
        strict=True,
    )
    pairs = [(x.view(-1, count), y.view(-1, count)) for x, y, count in gathered]
    mass, place = (torch.cat(column, dim=-1) for column in zip(*pairs, strict=True))
    heavy = mass.topk(min(settings.columns, n), dim=-1)
    columns = with_first(heavy.values, place.gather(-1, heavy.indices), n, settings.sinks)
    return columns.view(batch, heads, -1)


def _logits(sampled: Tensor, key: Tensor, later: Tensor, scale: float):  # type: ignore[no-untyped-def]
    """Yield the logits of sampled queries with this rank's keys, ``(R, s, m)``, by key-value heads."""
    sharing = sampled.shape[1] // key.shape[1]
    for rows, keys in zip(sampled, key, strict=True):
        for head in range(len(keys)):
            own = rows[head * sharing : (head + 1) * sharing]
            yield (own @ keys[head].t() * scale).masked_fill_(later, -torch.inf)
