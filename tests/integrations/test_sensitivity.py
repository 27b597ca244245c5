"""What is predicted for errors of a head in a prompt, against the KL that later tokens have."""

from __future__ import annotations

import pytest
import reference
import torch
import transformers

import convbasis as cb
from convbasis.integrations.capture import attending, exact_sdpa
from convbasis.integrations.sensitivity import head_sensitivities
from convbasis.plan import HeadSetting

LADDER = (HeadSetting(window=8, columns=0), HeadSetting(window=8, columns=0, far_field="segments"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(64, (1, 300), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def kl_of_errors(model, ids, prompt, setting, layer, head, share):
    """KL per token after a prompt in which one head has a share of a setting's errors; their size."""
    relative = []

    def erring(module, query, key, value, *inputs, **options):
        output, weights = exact_sdpa(module, query, key, value, *inputs, **options)
        if module.layer_idx == layer:
            own = [x[:, :, :prompt].double() for x in (query, key, value)]
            sizes = setting.at(prompt)._asdict()
            given = {"scale": options["scaling"], "enable_gqa": True}
            rough = cb.hybrid_attention(*own, **sizes, **given)[0, head]
            exact = reference.exact_attention(*own, scale=options["scaling"])[0, head]
            relative.append(float((rough - exact).norm() / exact.norm()))
            output = output.clone()
            output[0, :prompt, head] += share * (rough - exact).to(output.dtype)
        return output, weights

    exact = model(ids).logits[0, prompt:].double().log_softmax(-1)
    with attending(model, erring):
        other = model(ids).logits[0, prompt:].double().log_softmax(-1)
    return float((exact.exp() * (exact - other)).sum(-1).mean()), relative[0]


def test_small_errors_of_a_prompt_cost_what_is_predicted_for_later_tokens(model, ids):
    setting = HeadSetting(window=8, columns=0)
    found = torch.tensor(head_sensitivities(model, ids, [setting], draws=300))
    assert found.shape == (2, 4)
    # 300 tokens: a prompt of 226, 37 that go on, 37 that repeat what begins at its quarter.
    seen = torch.cat([ids[:, :263], ids[:, 56 : 56 + 37]], dim=1)
    for layer in range(2):
        for head in range(4):
            kl, relative = kl_of_errors(model, seen, 226, setting, layer, head, 0.1)
            predicted = float(found[layer, head]) * (0.1 * relative) ** 2
            assert predicted == pytest.approx(kl, rel=0.35), (layer, head)
    assert float(found[0].min()) > 0


def test_what_a_last_layer_gives_reaches_no_later_token(model, ids):
    found = head_sensitivities(model, ids, LADDER)
    assert found[-1] == [0.0] * 4
    assert min(found[0]) > 0


def test_the_first_setting_of_each_kind_counts(model, ids):
    window, segments = LADDER
    further = HeadSetting(window=64, columns=0)
    both = head_sensitivities(model, ids, [window, segments])
    assert head_sensitivities(model, ids, [window, further, segments]) == both
    assert head_sensitivities(model, ids, [window]) != both


def test_a_head_in_which_nothing_errs_adds_nothing(model, ids):
    found = head_sensitivities(model, ids, [HeadSetting(window=300)])
    assert found == [[0.0] * 4] * 2
    # Beside a setting that errs, one that does not says nothing.
    mixed = [HeadSetting(window=300, far_field="segments"), HeadSetting(window=8, columns=0)]
    one, other = (torch.tensor(head_sensitivities(model, ids, own)) for own in (mixed, mixed[1:]))
    assert torch.allclose(one, other)


def test_nothing_of_the_model_is_left_changed(model, ids):
    before = model.config._attn_implementation
    head_sensitivities(model, ids, LADDER)
    assert model.config._attn_implementation == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_seed_draws_the_tokens(model, ids):
    one, again, other = (head_sensitivities(model, ids, LADDER, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_the_first_tokens_are_enough(model):
    ids = torch.randint(64, (1, 2100), generator=torch.Generator().manual_seed(2))
    first = head_sensitivities(model, ids[:, :2048], LADDER, draws=1)
    assert head_sensitivities(model, ids, LADDER, draws=1) == first


def test_a_model_without_gradients_is_refused(model, ids):
    class Cut(torch.nn.Module):
        config = model.config

        def set_attn_implementation(self, name):
            model.set_attn_implementation(name)

        def forward(self, *inputs, **options):
            with torch.no_grad():
                return model(*inputs, **options)

    with pytest.raises(cb.ConvBasisError, match="gives no gradients"):
        head_sensitivities(Cut(), ids, LADDER)


def test_too_few_tokens_are_refused(model, ids):
    with pytest.raises(cb.InputError, match="input_ids has 7 tokens; at least 8"):
        head_sensitivities(model, ids[:, :7], LADDER)
    assert len(head_sensitivities(model, ids[:, :8], LADDER)) == 2
