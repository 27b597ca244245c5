"""hybrid_attention over several ranks: where the tokens are, or in shares of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_scale, describe
from ..errors import InputError
from ..hybrid import hybrid_attention as attention_of_one
from ..hybrid.settings import Settings, check_settings
from .by_heads import attend_by_heads
from .by_tokens import attend_by_tokens, why_not_by_tokens
from .call import begin, graph_of_its_own, opened, told
from .shares import LAYOUTS, Piece


@torch.compiler.disable  # type: ignore[untyped-decorator]
def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: Any = None,
    window: int = 256,
    sinks: int = 4,
    columns: int = 64,
    blocks: int = 0,
    far_field: str = "none",
    num_segments: int = 128,
    key_weights: bool = False,
    samples: int = 64,
    scale: float | None = None,
    is_causal: bool = True,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    seed: int = 0,
    strict: bool = False,
    correction: bool = False,
    layout: str = "auto",
    timeout: float = 300.0,
) -> Tensor:
    """Return `convbasis.hybrid_attention` of a sequence whose tokens are spread over ranks.

    All ranks of the mesh call it together, each with its own tokens, forward and backward. Windows,
    sinks and columns are computed where the queries are: the ranks before send the keys that windows
    reach back to (the halo), and every rank sends round those of its keys that are columns. Blocks,
    far fields, padding and the other options need whole heads, which go to and fro as in
    `convbasis.distributed.conv_basis_attention`.

    Args:
        query: ``(B, H, m, d)``, of this rank's m tokens, or a DTensor, as there.
        key: ``(B, H_kv, m, d)``.
        value: ``(B, H_kv, m, d_v)``.
        mesh: DeviceMesh of one dimension, the ranks; not needed with DTensors.
        window: as all that follow, see `convbasis.hybrid_attention`; the same in all ranks.
        sinks: first tokens that every query sees.
        columns: heaviest single keys.
        blocks: blocks of 64 keys for each block of 128 queries.
        far_field: ``"none"``, ``"segments"``, ``"conv"`` or ``"lowrank"``.
        num_segments: at most that many segments.
        key_weights: weigh the keys of a segment.
        samples: rows of exact attention for columns and fits.
        scale: factor of the logits.
        is_causal: must be True.
        enable_gqa: allow H to be a multiple of H_kv.
        key_padding_mask: bool ``(B, m)``, of this rank's tokens.
        seed: of all samples.
        strict: choose for each query from earlier tokens alone.
        correction: correct by some exact rows.
        layout: ``"tokens"``, where the queries are; ``"heads"`` or ``"columns"``, in shares;
            ``"auto"``, tokens where that can be. It changes how, never what is computed.
        timeout: seconds in which each exchange is over, or an error names the rank that is missing.

    Returns:
        ``(B, H, m, d_v)`` of this rank's tokens; a DTensor placed as the query if that is one.

    Raises:
        InputError: (a ValueError) what cannot be used, in this rank.
        DistributedError: another rank has something else or refuses its tensors, has died or hangs; the
            message names it.

    Complexity:
        ``"tokens"``: time of one process for n / W tokens. A rank sends about window (d + d_v) numbers
        of each key-value head to the ranks that follow it, and its share of the columns to all.

    Source:
        "Near and far keys" of docs/mathematics.md.

    Example:
        With two processes, ``torchrun --nproc-per-node 2``: see docs/several-machines.md.
    """
    kind, (q, k, v), ranks = opened(mesh, timeout, query=query, key=key, value=value)
    settings = Settings(
        window,
        sinks,
        columns,
        blocks,
        far_field,
        num_segments,
        key_weights,
        samples,
        seed,
        strict,
        correction,
    )
    same = {**settings._asdict(), "scale": scale, "is_causal": is_causal, "layout": layout}

    def described() -> dict[str, Any]:
        return {name: told(value) for name, value in same.items()}

    tokens = begin(ranks, q, k, v, key_padding_mask, enable_gqa, described)
    if is_causal is not True:
        raise InputError(f"is_causal={describe(is_causal)}: hybrid attention is causal")
    check_settings(settings)
    factor = check_scale(scale, q.shape[-1])
    reason = why_not_by_tokens(settings, key_padding_mask)
    if layout not in ("tokens", *LAYOUTS):
        raise InputError(
            f"layout={describe(layout)} is not known; use 'auto', 'tokens', 'heads' or 'columns'"
        )
    if layout == "tokens" and reason is not None:
        raise InputError(f"layout='tokens' with {reason}, which needs whole heads: use layout='auto'")
    with torch.autocast(q.device.type, enabled=False), graph_of_its_own():
        if layout in ("auto", "tokens") and reason is None:
            with ranks.noted():
                output = attend_by_tokens(tokens, q, k, v, settings, factor)
            return kind.wrap(output)
        real = tokens.gather_mask(key_padding_mask)

        def attend(_: Piece, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention_of_one(
                query,
                key,
                value,
                **settings._asdict(),
                scale=scale,
                enable_gqa=True,
                key_padding_mask=real,
            )

        output = attend_by_heads(tokens, q, k, v, layout, attend)
    return kind.wrap(output)
