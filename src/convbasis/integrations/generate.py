"""Text that continues a prompt, with the time to its first token."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Generated(NamedTuple):
    """What a model went on with."""

    ids: list[int]
    """Tokens after the prompt."""
    first_seconds: float
    """From the call to the first of them."""
    seconds: float
    """From the call to the last of them."""


class _Ticks:
    """A streamer, as generation in transformers calls it, that keeps the times of tokens."""

    def __init__(self, tell: Callable[[list[int]], None] | None) -> None:
        self.begin = time.perf_counter()
        self.times: list[float] = []
        self.ids: list[int] = []
        self._tell = tell
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:  # the prompt itself comes first
            self._prompt = False
            return
        self.times.append(time.perf_counter() - self.begin)
        self.ids.extend(value.flatten().tolist())
        if self._tell is not None:
            self._tell(self.ids)

    def end(self) -> None:
        """Nothing is left to do at the end."""


@torch.no_grad()
def warm_up(model: Any, input_ids: Tensor) -> None:
    """Let whatever is set up at a first call be paid before a clock runs."""
    model(input_ids[:, :64], logits_to_keep=1)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int,
    progress: Callable[[list[int]], None] | None = None,
) -> Generated:
    """Continue a prompt greedily.

    Args:
        model: a transformers model, with a plan or without.
        input_ids: ``(1, n)``.
        max_new_tokens: tokens to add at most; fewer if the model ends.
        progress: called with the tokens so far after each one.
    """
    ticks = _Ticks(progress)
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=model.generation_config.pad_token_id or 0,
        streamer=ticks,
    )
    return Generated(ticks.ids, ticks.times[0], ticks.times[-1])
