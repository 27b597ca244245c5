"""What an error in a head's output does to the next token's distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .capture import attending, exact_sdpa

_TOKENS = 1024  # of the text that are looked at: a backward pass keeps every layer's activations


def head_sensitivities(model: Any, input_ids: Tensor, *, seed: int = 0) -> list[list[float]]:
    """Return how much KL(exact || approximate) each head adds for an error of its output.

    To second order, the KL of the next token's distribution is half the Fisher information of the
    head's output times the error squared. The information is that of one draw of every next token from
    the model's own distribution; errors are taken as independent between heads and rows, and as equally
    large in all directions.

    Args:
        model: a transformers model that attends through the attention interface; its parameters get no
            gradients.
        input_ids: ``(1, n)``; the first 1,024 tokens are looked at.
        seed: of the drawn tokens.

    Returns:
        for each layer, for each head: nats per token for a relative error of 1; an error of e adds e²
        times as much.

    Raises:
        InputError: a layer does not attend through the interface, or the model gives no gradients.
        MissingExtraError: transformers is not installed.

    Complexity: one forward and one backward pass over 1,024 tokens.
    """
    ids = input_ids[:, :_TOKENS]
    outputs: dict[int, Tensor] = {}

    def attend(module: Any, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = exact_sdpa(module, *inputs, **options)
        if not outputs:  # what comes before the first layer's output needs no graph
            output = output.detach().requires_grad_()
        outputs[module.layer_idx] = output
        return output, weights

    with attending(model, attend), torch.enable_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)
        likelihood = logits.log_softmax(-1).gather(1, drawn.to(logits.device)).sum()
        if not likelihood.requires_grad:
            raise InputError(f"{type(model).__name__} gives no gradients of its attention outputs")
        layers = sorted(outputs)
        gradients = torch.autograd.grad(likelihood, [outputs[layer] for layer in layers])
    found = []
    for layer, gradient in zip(layers, gradients, strict=True):
        size = outputs[layer].detach()[0].double().square().sum(-1).mean(0)  # (H,)
        information = gradient[0].double().square().sum(-1).mean(0)
        found.append((information * size / (2 * gradient.shape[-1])).tolist())
    return found
