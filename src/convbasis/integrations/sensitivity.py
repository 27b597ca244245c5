"""What an error of a head in a prompt does to the tokens after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..checks import compute_dtype
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
    relative_squared: Tensor
    """``(s, H)``."""


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
        input_ids: ``(1, n)``; of 2,048 tokens, or of all if they are fewer, three quarters are the
            prompt, an eighth comes after it, and instead of the last eighth a part of the prompt comes
            once more.
        ladder: whose errors count: the setting with the smallest window of each kind.
        draws: of the later tokens, at least 1.
        seed: of the drawn tokens, and of what settings sample.

    Returns:
        for each layer, for each head: nats for each later token for a relative error of 1; an error of
        e adds e² times as much. 0 for a head in which no setting errs, and in layers whose sliding
        window is shorter than the text: a plan leaves them exact.

    Raises:
        InputError: fewer than 8 tokens, no window in the ladder that is shorter than that prompt, or
            no finite gradients of the model's attention outputs.
        MissingExtraError: transformers is not installed.

    Complexity: over 2,048 tokens one forward pass, a backward pass for each draw, and some settings.
    Memory for all layers' activations and, for each kind of setting, errors as large as all heads'
    outputs.
    """
    ids, scored = _prompt_and_later_tokens(input_ids)
    whole, prompt = input_ids.shape[1], ids.shape[1] - scored
    settings = _of_each_kind(ladder, prompt)
    if all(own.at(prompt).window >= prompt for own in settings) and any(
        own.at(whole).window < whole for own in ladder
    ):
        raise InputError(
            f"no window of the ladder is shorter than the {prompt} tokens from which a budget is "
            "shared; give one that is, or budget=None for the tolerance alone"
        )
    outputs: dict[int, Tensor] = {}
    found: dict[int, _Errors] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *inputs: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = exact_sdpa(module, query, key, value, *inputs, **options)
        scaling = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        # Rounding to half types is an error, too, which points nowhere.
        work = compute_dtype(query.dtype)
        of_prompt = [tensor[:, :, :prompt].detach().to(work) for tensor in (query, key, value)]
        window = options.get("sliding_window")
        exact = window is not None and window < whole
        given = of_prompt[0], of_prompt[1], of_prompt[2]
        found[module.layer_idx] = _errors(*given, scale, [] if exact else settings, seed)
        if not outputs:  # what comes before the first layer's output needs no graph
            output = output.detach().requires_grad_()
        outputs[module.layer_idx] = output
        return output, weights

    with attending(model, attend), torch.enable_grad():
        asked = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        if "logits_to_keep" in signature(model.forward).parameters:
            asked["logits_to_keep"] = scored
        later = model(ids, **asked)
        logs = later.logits[0, -scored:].float().log_softmax(-1)
        if not outputs or not logs.requires_grad:
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
    if not math.isfinite(one_by_one + together):
        raise InputError(
            f"{type(model).__name__} has gradients that are not finite; load it in bfloat16 or float32"
        )
    # Four draws may by chance find less than what rows do one by one.
    coherence = max(1.0, together / one_by_one) if one_by_one else 1.0
    return [(coherence * harm[0]).tolist() for harm in harms]


def _prompt_and_later_tokens(input_ids: Tensor) -> tuple[Tensor, int]:
    """Return ``(1, m)`` tokens, and how many of them come after the prompt: half go on with the text,
    half repeat what begins at the prompt's quarter."""
    tokens = min(_TOKENS, input_ids.shape[1])
    if tokens < _AFTER:
        raise InputError(f"input_ids has {tokens} tokens; at least {_AFTER} are wanted")
    after = tokens // _AFTER
    prompt = tokens - 2 * after
    again = prompt // 4
    parts = input_ids[:, : prompt + after], input_ids[:, again : again + after]
    return torch.cat(parts, dim=1), 2 * after


def _of_each_kind(ladder: Sequence[HeadSetting], prompt: int) -> list[HeadSetting]:
    """Return the setting with the smallest window of each kind: kinds err in other directions."""
    found: dict[tuple[str, bool], HeadSetting] = {}
    for setting in sorted(ladder, key=lambda setting: setting.at(prompt).window):
        found.setdefault((setting.far_field, setting.at(prompt).blocks > 0), setting)
    return [*found.values()]


@torch.no_grad()
def _errors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    settings: Sequence[HeadSetting],
    seed: int,
) -> _Errors:
    """Return what settings get wrong in a layer's prompt, ``(1, H, P, d)`` and its keys and values."""
    given: dict[str, Any] = {"scale": scale, "enable_gqa": True}
    exact = scaled_dot_product_attention(query, key, value, is_causal=True, **given)
    sizes = (setting.at(exact.shape[2])._asdict() for setting in settings)
    rough = [hybrid_attention(query, key, value, **given, **own, seed=seed) for own in sizes]
    errors = torch.cat([exact[:0], *(output - exact for output in rough)])
    off, whole = (x.double().square().sum((-1, -2)) for x in (errors, exact))
    return _Errors(errors.transpose(1, 2).float(), off / whole.clamp(min=1e-300))


def _of_an_error_of_one(found: _Errors, harm: Tensor) -> Tensor:
    """Return what harm ``(2, s, H)`` of errors is for a relative error of 1, ``(2, H)``: the mean over
    settings that err.
    """
    # Below this errors are rounding, and point nowhere.
    errs = found.relative_squared > 1e-10
    each = torch.where(errs, harm / found.relative_squared.clamp(min=1e-10), 0.0)
    return each.sum(1) / errs.sum(0).clamp(min=1)
