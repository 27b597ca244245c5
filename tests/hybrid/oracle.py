"""The dense oracle of hybrid attention, on what the library chooses."""

from __future__ import annotations

import reference
import torch

from convbasis.hybrid import row_factors, sampling, scaled_conv, selection
from convbasis.hybrid.look import rows_for_fits
from convbasis.hybrid.window import BLOCK, QUERIES, Window

DEFAULTS = {
    "window": 256, "sinks": 4, "columns": 64, "blocks": 0, "far_field": "none", "num_segments": 128,
    "key_weights": False, "samples": 64, "seed": 0, "correction": False,
}  # fmt: skip


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def qkv(n, *, batch=1, heads=1, kv_heads=None, d=16, d_v=None, dtype=torch.float64, seed=0):
    g = gen(seed)

    def draw(h, width):
        return torch.randn(batch, h, n, width, generator=g, dtype=torch.float64)

    kv_heads = kv_heads or heads
    query, key, value = draw(heads, d), draw(kv_heads, d), draw(kv_heads, d_v or d)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def hybrid_attention(query, key, value, scale=None, **options):
    """Output and log-sum-exp ``(B, H, n, ·)`` in float64; differentiable, the selection is constant."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, value = (x.to(work) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, _, _ = query.shape
    group = heads // key.shape[1]
    outputs, sums = [], []
    for b in range(batch):
        for h in range(key.shape[1]):
            own = query[b, h * group : (h + 1) * group], key[b, h : h + 1], value[b, h : h + 1]
            found = [selected(*own, scale, {**DEFAULTS, **options}, head) for head in range(group)]
            for head, chosen in enumerate(found):
                output, lse = reference.hybrid_attention(
                    own[0][head], own[1][0], own[2][0], scale, **chosen
                )
                if options.get("correction"):
                    exact = reference.hybrid_attention(
                        own[0][head], own[1][0], own[2][0], scale, torch.zeros(query.shape[2])
                    )[0]
                    output = corrected(output, exact, chosen["first"], options.get("seed", 0))
                outputs.append(output)
                sums.append(lse)
    return (
        torch.stack(outputs).unflatten(0, (batch, heads)),
        torch.stack(sums).unflatten(0, (batch, heads)),
    )


def corrected(output, exact, first, seed):
    """Output of one head with the mean difference to exact rows, linear between middles of blocks."""
    n = len(output)
    exact = exact.to(output.dtype)
    begin = int((first > 0).int().argmax()) if bool(first[-1] > 0) else n
    blocks = range(-(-begin // QUERIES), n // QUERIES)
    if not len(blocks):
        return output
    rows = selection.rows_of_blocks(QUERIES, seed, n // QUERIES, n)
    means = torch.stack([(exact - output)[rows[block]].mean(0) for block in blocks])
    middles = torch.tensor([block * QUERIES + (QUERIES - 1) / 2 for block in blocks])
    added = []
    for row in range(begin, n):
        after = int((middles <= row).sum())
        if after in (0, len(blocks)):
            added.append(means[0 if after == 0 else -1])
        else:
            share = float(row - middles[after - 1]) / QUERIES
            added.append((1 - share) * means[after - 1] + share * means[after])
    better = torch.cat([output[:begin], output[begin:] + torch.stack(added)])
    chosen = rows[blocks.start :].flatten()
    return better.index_copy(0, chosen, exact[chosen])


@torch.no_grad()
def selected(query, key, value, scale, settings, head):
    """What one head of those that share a key sees: columns and blocks are the library's choice."""
    n = query.shape[1]
    far, span = settings["far_field"], None
    aligned = far == "segments" or (far == "none" and settings["blocks"] + settings["columns"] > 0)
    size = (QUERIES if settings["blocks"] else BLOCK) if aligned else 1
    window = Window(settings["window"], size)
    first = window.first(torch.arange(n)).clamp(min=0)
    begin = int((first > 0).int().argmax()) if bool(first[-1] > 0) else n
    found = {"first": first}
    if begin == n:
        return found
    rows = rows_for_fits(window, n, settings["samples"], settings["seed"])
    exact = sampling.sampled_rows(query, key, rows, scale)
    mass = exact.mass_before(window.first(rows))
    columns = selection.heaviest(mass, n, settings["sinks"], settings["columns"])
    seen = selection.seen_columns(columns, n, n)
    found["columns"] = seen[head].nonzero()[:, 0].tolist()
    blocks = -(-n // BLOCK)
    if settings["blocks"]:
        padding = (0, 0, 0, -n % QUERIES)
        q, k = (torch.nn.functional.pad(x, padding) for x in (query, key))
        before = window.first(torch.arange(0, n, size)).clamp(min=0) // BLOCK
        chosen = selection.heavy_blocks(
            q, k, columns, before, settings["blocks"], size, scale, settings["seed"], real=n
        )
        found["size"] = size
        found["chosen"] = [[x for x in own.tolist() if x < blocks] for own in chosen.blocks[head]]
    if far == "segments":
        found["span"] = span = -(-blocks // settings["num_segments"])
        if settings["key_weights"]:
            found["weights"], found["corrections"] = reference.segment_fit(
                query[head], key[0], scale, first, found["columns"], span, rows
            )
    if far == "conv":
        fit, targets = scaled_conv._fit(seen, window, exact)
        lags = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
        model = fit.columns[:, None].double() + fit.lags.double()[:, lags]
        hidden = (torch.arange(n) >= first[:, None]) | seen[:, None]
        lse = model.masked_fill(hidden, -torch.inf).logsumexp(-1).to(query.dtype)
        alpha = row_factors.row_factors(query, key, seen, window, scale, exact, targets, lse)
        found["factors"] = model[head] + alpha[head, :, None].double()
    return found
