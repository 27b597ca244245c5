"""A prompt of a planned layer that comes in chunks: each head by its setting, strictly causal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..hybrid import HybridState
from ..plan import ConcreteSetting, HeadPlan
from .prefill import Prefill, attend_last_rows, of_heads

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
        by_setting: dict[ConcreteSetting, list[int]] = {}
        for head, planned in enumerate(heads):
            if planned.setting is not None:
                by_setting.setdefault(_strictly(planned.setting.at(n)), []).append(head)
        self._groups = [
            (
                members,
                HybridState(
                    window=sizes.window,
                    sinks=sizes.sinks,
                    columns=sizes.columns,
                    blocks=sizes.blocks,
                    far_field=sizes.far_field,
                    key_weights=sizes.key_weights,
                    scale=scale,
                    enable_gqa=True,
                ),
            )
            for sizes, members in by_setting.items()
        ]
        self._count, self._scale = len(heads), scale
        self.length = 0
        """Tokens so far."""
        self._last: Tensor | None = None

    def goes_on(self, key: Tensor, offset: int) -> bool:
        """Whether keys ``(B, H_kv, n, d)`` of which `offset` are older are of the same prompts."""
        last = self._last
        if last is None or offset != self.length or last.shape[:2] != key.shape[:2]:
            return False
        return torch.equal(last, key[:, :, offset - last.shape[2] : offset])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, tolerance: float | None) -> Prefill:
        """Return causal attention of the next tokens over all so far.

        Args:
            query: ``(B, H, m, d)``.
            key: ``(B, H_kv, length + m, d)``.
            value: ``(B, H_kv, length + m, d_v)``.
            tolerance: a head whose estimated error in these rows exceeds it is computed exactly in
                them; None leaves every head as it is.
        """
        batch, _, m, _ = query.shape
        output = query.new_empty(batch, self._count, m, value.shape[-1])
        exact = torch.ones(batch, self._count, dtype=torch.bool)
        fallen_back = torch.zeros_like(exact)
        for members, state in self._groups:
            stats = state.attend_stats(*of_heads(members, query, key, value))
            output[:, members] = stats.output
            exact[:, members] = False
            if tolerance is not None:
                fallen_back[:, members] = ~(stats.error_estimate <= tolerance).cpu()
        self.length += m
        self._last = key[:, :, -_KNOWN:].clone()
        for row, again in enumerate((exact | fallen_back).tolist()):
            members = [head for head in range(self._count) if again[head]]
            if members:
                chosen = of_heads(members, *(x[row : row + 1] for x in (query, key, value)))
                output[row, members] = attend_last_rows(*chosen, self._scale)[0]
        return Prefill(output, fallen_back, ~exact)


def _strictly(sizes: ConcreteSetting) -> ConcreteSetting:
    """Return what a setting computes where later tokens are unknown."""
    far = "none" if sizes.far_field in ("conv", "lowrank") else sizes.far_field
    return sizes._replace(far_field=far, correction=False)
