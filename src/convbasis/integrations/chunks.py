"""A prompt of a planned layer that comes in chunks: each head by its setting, strictly causal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_qkv
from ..hybrid.exact import serves_exactly
from ..hybrid.heads import Together, attend_pieces, pieces_of_work
from ..hybrid.running import Running
from ..hybrid.settings import Settings, check_settings
from ..plan import HeadPlan, HeadSetting
from .prefill import OTHERS, Prefill, attend_last_rows, of_heads

_KNOWN = 64  # latest keys by which a prompt is known again


class ChunkedLayer:
    """What one layer carries from chunk to chunk of one batch of prompts."""

    def __init__(self, heads: Sequence[HeadPlan], n: int, scale: float) -> None:
        """Begin a prompt.

        Args:
            heads: the plan of each head. Corrections need the whole prompt and are left out; so are
                convolutions and low-rank factors.
            n: tokens that the sizes of settings are stated for: how long the prompt will be is unknown.
            scale: factor of the logits.
        """
        self._settings = [
            None if head.setting is None else _strictly(head.setting, n) for head in heads
        ]
        self._scale = scale
        self._running: dict[tuple[int, ...], Running | None] = {}  # by sequence and heads
        self.length = 0
        """Tokens so far."""
        self._last: Tensor | None = None

    def goes_on(self, key: Tensor, offset: int) -> bool:
        """Whether keys ``(B, H_kv, n, d)`` of which `offset` are older are of the same prompts."""
        last = self._last
        if last is None or offset != self.length or last.shape[:2] != key.shape[:2]:
            return False
        earlier = key[:, :, offset - last.shape[2] : offset]
        # The cache may hold them in another type than they are attended to in.
        return last.device == key.device and torch.equal(last, earlier.to(last.dtype))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, tolerance: float | None) -> Prefill:
        """Return causal attention of the next tokens over all so far.

        Args:
            query: ``(B, H, m, d)``.
            key: ``(B, H_kv, length + m, d)``.
            value: ``(B, H_kv, length + m, d_v)``.
            tolerance: a head whose estimated error in the latest rows exceeds it is computed exactly in
                these; None leaves every head as it is.
        """
        check_qkv(query, key, value, True, past=self.length)
        batch, count, m, _ = query.shape
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        # Exact heads among others are pieces of work like these, the longest; elsewhere they follow.
        as_pieces = serves_exactly(query, value) and not recorded
        alone = [head for head, own in enumerate(self._settings) if own is None]
        pieces = []
        for b in range(batch):
            if as_pieces:
                pieces += [Together(b, [head], ()) for head in alone]
            pieces += pieces_of_work(query, key, b, self._settings)
        names = [(piece.sequence, *piece.heads) for piece in pieces]
        # As the model wants it in the end: by token, then by head.
        output = query.new_empty(batch, m, count, value.shape[-1]).transpose(1, 2)
        found, after = attend_pieces(
            query,
            key,
            value,
            pieces,
            self._scale,
            None,
            tolerance is not None,
            [self._running.get(name) for name in names],
            None if recorded else output,
            tolerance=tolerance if as_pieces else None,
        )
        self._running = dict(zip(names, after, strict=True))
        exact = torch.zeros(batch, count, dtype=torch.bool)
        exact[:, alone] = True
        fallen_back = torch.zeros_like(exact)
        for (b, members, own), group in zip(pieces, found, strict=True):
            if not own:
                continue
            if recorded:
                output[b, members] = group.output
            if tolerance is not None:
                fallen_back[b, members] = ~(group.bound <= tolerance).cpu()
        self.length += m
        self._last = key[:, :, -_KNOWN:].detach().clone()
        left = torch.zeros_like(exact) if as_pieces else exact | fallen_back
        for row, again in enumerate(left.tolist()):
            members = [head for head in range(count) if again[head]]
            if members:
                chosen = of_heads(members, *(x[row : row + 1] for x in (query, key, value)))
                output[row, members] = attend_last_rows(*chosen, self._scale)[0]
        return Prefill(output, fallen_back, ~exact)


def _strictly(setting: HeadSetting, n: int) -> Settings:
    """Return what a setting computes where later tokens are unknown, with its sizes for n tokens."""
    sizes = setting.at(n)
    far = "none" if sizes.far_field in ("conv", "lowrank") else sizes.far_field
    sizes = sizes._replace(far_field=far, correction=False)
    own = Settings(**sizes._asdict(), **OTHERS, strict=True)
    check_settings(own)
    return own
