"""What is predicted for errors of a head in a prompt, against the KL that later tokens have."""

from __future__ import annotations

import copy

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


def test_the_setting_with_the_smallest_window_of_each_kind_counts(model, ids):
    window, segments = LADDER
    further = HeadSetting(window=64, columns=0)
    both = head_sensitivities(model, ids, [window, segments])
    assert head_sensitivities(model, ids, [window, further, segments]) == both
    assert head_sensitivities(model, ids, [further, segments, window]) == both
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
    # 1,536 as the prompt, and 256 after it; what follows is the prompt once more.
    other = ids.clone()
    other[:, 1792:] = 0
    first = head_sensitivities(model, other, LADDER, draws=1)
    assert head_sensitivities(model, ids, LADDER, draws=1) == first


class Around(torch.nn.Module):
    """A model inside another: what it is asked, and what it answers, may be changed."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def set_attn_implementation(self, name):
        self.model.set_attn_implementation(name)

    def forward(self, *inputs, **options):
        return self.model(*inputs, **options)


def test_a_model_inside_another_is_measured_as_it_is(model, ids):
    found, alone = (
        torch.tensor(head_sensitivities(own, ids, LADDER)) for own in (Around(model), model)
    )
    assert torch.allclose(found, alone)


def test_a_model_without_gradients_is_refused(model, ids):
    class Cut(Around):
        @torch.no_grad()
        def forward(self, *inputs, **options):
            return super().forward(*inputs, **options)

    with pytest.raises(cb.ConvBasisError, match="gives no gradients"):
        head_sensitivities(Cut(model), ids, LADDER)


def test_too_few_tokens_are_refused(model, ids):
    with pytest.raises(cb.InputError, match="input_ids has 7 tokens; at least 8"):
        head_sensitivities(model, ids[:, :7], LADDER)
    assert len(head_sensitivities(model, ids[:, :8], LADDER)) == 2


def test_rounding_of_half_types_is_no_error(model, ids):
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert head_sensitivities(half, ids, [HeadSetting(window=300)]) == [[0.0] * 4] * 2
    found, exact = (torch.tensor(head_sensitivities(own, ids, LADDER)[0]) for own in (half, model))
    assert torch.allclose(found, exact, rtol=0.5)


def test_a_model_that_attends_in_its_own_way_is_refused(model, ids):
    class Deaf(Around):
        def set_attn_implementation(self, name):
            pass

    with pytest.raises(cb.InputError, match="no gradients of its attention outputs"):
        head_sensitivities(Deaf(model), ids, LADDER)


def test_gradients_that_are_not_finite_are_refused(model, ids):
    class Huge(Around):
        def forward(self, *inputs, **options):
            found = super().forward(*inputs, **options)
            found.logits.register_hook(lambda gradient: gradient * torch.inf)
            return found

    with pytest.raises(cb.InputError, match="gradients that are not finite"):
        head_sensitivities(Huge(model), ids, LADDER)


def test_windows_that_hold_the_short_prompt_share_no_budget(model):
    ids = torch.randint(64, (1, 2400), generator=torch.Generator().manual_seed(3))
    with pytest.raises(cb.InputError, match="no window of the ladder is shorter than the 1536 tokens"):
        head_sensitivities(model, ids, [HeadSetting(window=1700)])
    with pytest.raises(cb.InputError, match="or budget=None"):
        cb.calibrate(model, ids, ladder=[HeadSetting(window=1700)])
    assert cb.calibrate(model, ids, ladder=[HeadSetting(window=1700)], budget=None).predicted_kl is None


def test_layers_that_a_plan_leaves_exact_count_nothing(ids):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.MistralConfig(
        vocab_size=64, num_hidden_layers=2, num_key_value_heads=2, sliding_window=100, **sizes
    )
    model = transformers.MistralForCausalLM(config).eval()
    assert head_sensitivities(model, ids, LADDER) == [[0.0] * 4] * 2
    model.config.sliding_window = None
    wide = transformers.MistralForCausalLM(model.config).eval()
    assert min(head_sensitivities(wide, ids, LADDER)[0]) > 0
