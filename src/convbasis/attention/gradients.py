"""What goes into the backward pass beside the inputs, and what comes out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .forward import Inputs


class Wanted(NamedTuple):
    """Which gradients, and how."""

    gradient: str
    """``"forward"`` or ``"attention"``; or ``"values"``: 0 for queries and keys."""
    lag_bias: bool
    """Whether the gradient of a bias by lag is wanted."""
    backend: str
    """Of the forward pass, one of `BACKENDS`."""
    max_bytes: int
    queries_alone: bool = False
    """Leave all other gradients at 0."""
    keys_and_queries_alone: bool = False
    """Leave those of values and biases at 0."""


class Incoming(NamedTuple):
    """What the rows of attention receive."""

    rows: Tensor
    """``(P, R, n, d_v)``, gradients of the output; 0 for rows that see no key."""
    shared: Tensor
    """``(P, R, n)``, the part of the gradients of the logits that a row's entries share."""
    lse: Tensor
    """``(P, R, n)``, inf for rows that see no key."""


class Gradients(NamedTuple):
    """Gradients of the inputs."""

    query: Tensor
    """``(P, R, n, d)``."""
    key: Tensor
    """``(P, n, d)``."""
    value: Tensor
    """``(P, n, d_v)``."""
    key_bias: Tensor | None
    """``(P, R, n)``."""
    lag_bias: Tensor | None
    """``(P, R, n)``."""

    @classmethod
    def zeros(cls, inputs: Inputs, lag_bias: bool) -> Gradients:
        """Return zeros."""
        made = cls.empty(inputs, lag_bias)
        for part in made:
            if part is not None:
                part.zero_()
        return made

    @classmethod
    def empty(cls, inputs: Inputs, lag_bias: bool) -> Gradients:
        """Return memory for the gradients of all heads, which `put` fills one after the other."""
        rows = inputs.query.shape[:3]
        return cls(
            torch.empty_like(inputs.query),
            torch.empty_like(inputs.key),
            torch.empty_like(inputs.value),
            None if inputs.key_bias is None else inputs.query.new_empty(rows),
            inputs.query.new_empty(rows) if lag_bias else None,
        )

    def put(self, problem: int, head: int, part: Gradients) -> None:
        """Write the gradients of one head alone; of key and value all heads of a problem add up."""
        self.query[problem, head] = part.query[0, 0]
        for own, other in ((self.key_bias, part.key_bias), (self.lag_bias, part.lag_bias)):
            if own is not None and other is not None:
                own[problem, head] = other[0, 0]
        if head == 0:
            self.key[problem], self.value[problem] = part.key[0], part.value[0]
        else:
            self.key[problem] += part.key[0]
            self.value[problem] += part.value[0]

    def clear(self, unreal: Tensor) -> None:
        """Put zeros at padding, bool ``(P, n)``; lags have none."""
        self.query.masked_fill_(unreal[:, None, :, None], 0.0)
        self.key.masked_fill_(unreal[..., None], 0.0)
        self.value.masked_fill_(unreal[..., None], 0.0)
        if self.key_bias is not None:
            self.key_bias.masked_fill_(unreal[:, None], 0.0)
