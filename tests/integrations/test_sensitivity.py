"""What is predicted for an error of a head, against the KL that it has."""

from __future__ import annotations

import pytest
import torch
import transformers

import convbasis as cb
from convbasis.integrations.capture import attending, exact_sdpa
from convbasis.integrations.sensitivity import head_sensitivities


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
def kl_of_noise(model, ids, layer, head, size, seed):
    """KL per token when one head's output has a relative error of some size, in random directions."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(module, *inputs, **options):
        output, weights = exact_sdpa(module, *inputs, **options)
        if module.layer_idx == layer:
            output = output.clone()
            own = output[0, :, head]
            noise = torch.randn(own.shape, generator=generator)
            output[0, :, head] = own + noise * (size * own.norm() / noise.norm())
        return output, weights

    exact = model(ids).logits[0].double().log_softmax(-1)
    with attending(model, noisy):
        other = model(ids).logits[0].double().log_softmax(-1)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def test_small_errors_cost_what_is_predicted(model, ids):
    found = torch.tensor(head_sensitivities(model, ids))
    assert found.shape == (2, 4)
    size = 0.02
    true = torch.tensor(
        [
            [
                sum(kl_of_noise(model, ids, layer, head, size, seed) for seed in range(4)) / 4
                for head in range(4)
            ]
            for layer in range(2)
        ]
    )
    ratio = size**2 * found / true
    assert float(ratio.log().mean().exp()) == pytest.approx(1.0, abs=0.3)
    assert float(ratio.max()) < 3.0
    assert float(ratio.min()) > 1 / 3
    # It tells heads apart: those that matter more are those it says.
    ranks = [x.flatten().argsort().argsort().double() for x in (found, true)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.6


def test_nothing_of_the_model_is_left_changed(model, ids):
    before = model.config._attn_implementation
    head_sensitivities(model, ids)
    assert model.config._attn_implementation == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_seed_draws_the_tokens(model, ids):
    one, again, other = (head_sensitivities(model, ids, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_the_first_tokens_are_enough(model):
    ids = torch.randint(64, (1, 1500), generator=torch.Generator().manual_seed(2))
    assert head_sensitivities(model, ids) == head_sensitivities(model, ids[:, :1024])


def test_a_model_without_gradients_is_refused(model, ids):
    class Cut(torch.nn.Module):
        config = model.config

        def set_attn_implementation(self, name):
            model.set_attn_implementation(name)

        def forward(self, *inputs, **options):
            with torch.no_grad():
                return model(*inputs, **options)

    with pytest.raises(cb.ConvBasisError, match="gives no gradients"):
        head_sensitivities(Cut(), ids)
