"""What an error of a head in a prompt does to the tokens after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import InputError
from ..hybrid import hybrid_attention
from ..plan import HeadSetting
from .capture import attending, exact_sdpa

_TOKENS = 2048  # of the text that are looked at: a backward pass keeps every layer's activations
_AFTER = 8  # one in so many of them goes on after the prompt, and as many repeat a part of it
_DRAWS = 4


class _Errors(NamedTuple):
    """What some settings get wrong in a layer."""

    errors: Tensor
    """``(s, P, H, d_v)``."""
    relative: Tensor
    """``(s, H)``, squared."""


def head_sensitivities(
    model: Any,
    input_ids: Tensor,
    ladder: Sequence[HeadSetting],
    *,
    draws: int = _DRAWS,
    seed: int = 0,
) -> list[list[float]]:
    """Return how much KL(exact || approximate) of later tokens a head adds by its errors in a prompt.

    Half of the later tokens go on with the text, half repeat a stretch of the prompt: to copy from far
    away is what errors disturb first, whatever the text. To second order, that KL is half the variance
    of what the errors add to the log-likelihood of tokens that are drawn from the model's own
    distribution. What they add comes from one backward pass for each draw, in the direction of the
    errors that settings make. Rows of a head err alike, and do more together than one by one: how much
    more is taken to be the same for all heads, since to tell it for one takes far more draws. Heads are
    taken as independent of each other. An error in the prompt's own predictions counts nothing: what a
    last layer gives reaches no later token.

    Args:
        model: a transformers model that attends through the attention interface; its parameters get no
            gradients.
        input_ids: ``(1, n)``; the first 2,048 tokens are looked at, or all: three quarters of them as
            the prompt, an eighth after it, and once more as many tokens of the prompt.
        ladder: whose errors count: the first setting of each kind.
        draws: of the later tokens, at least 1.
        seed: of the drawn tokens.

    Returns:
        for each layer, for each head: nats for each later token for a relative error of 1; an error of
        e adds e² times as much. 0 for a head in which no setting errs.

    Raises:
        InputError: fewer than 8 tokens, or the model gives no gradients of its attention outputs.
        MissingExtraError: transformers is not installed.

    Complexity: over 2,048 tokens one forward pass, a backward pass for each draw, and some settings.
    """
    tokens = min(_TOKENS, input_ids.shape[1])
    if tokens < _AFTER:
        raise InputError(f"input_ids has {tokens} tokens; at least {_AFTER} are wanted")
    after = tokens // _AFTER
    scored, prompt = 2 * after, tokens - 2 * after
    again = prompt // 4
    ids = torch.cat([input_ids[:, : prompt + after], input_ids[:, again : again + after]], dim=1)
    settings = _of_each_kind(ladder)
    outputs: dict[int, Tensor] = {}
    found: dict[int, _Errors] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *inputs: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = exact_sdpa(module, query, key, value, *inputs, **options)
        scaling = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        own = [tensor[:, :, :prompt].detach() for tensor in (query, key, value)]
        found[module.layer_idx] = _errors(own[0], own[1], own[2], scale, settings)
        if not outputs:  # what comes before the first layer's output needs no graph
            output = output.detach().requires_grad_()
        outputs[module.layer_idx] = output
        return output, weights

    with attending(model, attend), torch.enable_grad():
        ones = torch.ones_like(ids)
        later = model(ids, attention_mask=ones, use_cache=False, logits_to_keep=scored)
        logs = later.logits[0, -scored:].float().log_softmax(-1)
        if not logs.requires_grad:
            raise InputError(f"{type(model).__name__} gives no gradients of its attention outputs")
        layers = sorted(outputs)
        added: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        generator = torch.Generator().manual_seed(seed)
        for draw in range(draws):
            with torch.no_grad():
                drawn = torch.multinomial(logs.exp().cpu(), 1, generator=generator)
            likelihood = logs.gather(1, drawn.to(logs.device)).sum()
            gradients = torch.autograd.grad(
                likelihood, [outputs[layer] for layer in layers], retain_graph=draw + 1 < draws
            )
            for layer, gradient in zip(layers, gradients, strict=True):
                own = gradient[0, :prompt].to(torch.float32)
                rows = torch.einsum("phv,sphv->sph", own, found[layer].errors).double()
                added[layer].append(torch.stack([rows.square().sum(1), rows.sum(1).square()]))
    harms = [
        _of_an_error_of_one(found[layer], torch.stack(added[layer]).mean(0) / (2 * scored))
        for layer in layers
    ]
    one_by_one, together = (sum(float(harm[way].sum()) for harm in harms) for way in (0, 1))
    more = together / one_by_one if one_by_one else 0.0
    return [(more * harm[0]).tolist() for harm in harms]


def _of_each_kind(ladder: Sequence[HeadSetting]) -> list[HeadSetting]:
    """Return the first setting of each kind: they err in other directions."""
    first: dict[tuple[str, bool], HeadSetting] = {}
    for setting in ladder:
        first.setdefault((setting.far_field, setting.blocks != 0), setting)
    return [*first.values()]


@torch.no_grad()
def _errors(
    query: Tensor, key: Tensor, value: Tensor, scale: float, settings: Sequence[HeadSetting]
) -> _Errors:
    """Return what settings get wrong in a layer's prompt, ``(1, H, P, d)`` and its keys and values."""
    exact = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )
    errors = torch.cat(
        [
            hybrid_attention(
                query,
                key,
                value,
                **setting.at(query.shape[2])._asdict(),
                scale=scale,
                enable_gqa=True,
            )
            - exact
            for setting in settings
        ]
    ).to(torch.float32)
    sizes, whole = (x.double().square().sum((-1, -2)) for x in (errors, exact))
    return _Errors(errors.transpose(1, 2), sizes / whole.clamp(min=1e-300))


def _of_an_error_of_one(found: _Errors, harm: Tensor) -> Tensor:
    """Return what harm ``(2, s, H)`` of errors is for a relative error of 1, ``(2, H)``: the mean over
    settings that err.
    """
    # Below this errors are rounding, and point nowhere.
    errs = found.relative > 1e-10
    each = torch.where(errs, harm / found.relative.clamp(min=1e-10), 0.0)
    return each.sum(1) / errs.sum(0).clamp(min=1)
