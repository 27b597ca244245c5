"""calibrate on a small random model: what the plan says, and that it goes on where it stopped."""

from __future__ import annotations

import copy
import importlib
import json

import pytest
import torch

import convbasis as cb
from convbasis.plan import HeadPlan, HeadSetting
from convbasis.plan.choice import Chosen
from convbasis.plan.ladder import Costs

transformers = pytest.importorskip("transformers")
calibrate = importlib.import_module("convbasis.integrations.calibrate")

LADDER = (HeadSetting(window=32, columns=8), HeadSetting(window=128, columns=8, blocks=2))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(64, (2, 600), generator=torch.Generator().manual_seed(1))


def test_a_plan_states_every_head_and_holds_to_the_tolerance(model, ids, monkeypatch):
    monkeypatch.setattr("convbasis.plan.ladder._seconds", lambda *_, **__: 1e-3)
    before = model.config._attn_implementation
    # Exact attention and every setting take the same time here: nothing is cheaper.
    assert cb.calibrate(model, ids, tolerance=10.0, budget=None, ladder=LADDER).approximated == 0

    def seconds(run, query, *inputs, **options):
        return 2.0 if options.get("is_causal") and query.shape[2] > 512 else 1.0

    monkeypatch.setattr("convbasis.plan.ladder._seconds", seconds)
    loose = cb.calibrate(model, ids, tolerance=10.0, budget=None, ladder=LADDER)
    assert loose.approximated == 12
    assert (loose.calibrated_length, loose.min_length, loose.tolerance) == (600, 554, 10.0)
    assert all(head.cost == 0.5 and head.error <= 10.0 for layer in loose.heads for head in layer)
    tight = cb.calibrate(model, ids, tolerance=1e-6, ladder=LADDER)
    assert tight.approximated == 0
    # The margin is a part of the tolerance.
    worst = max(head.error for layer in loose.heads for head in layer)
    whole = {"ladder": LADDER[:1], "budget": None, "tolerance": 1.001 * worst}
    every = cb.calibrate(model, ids, **whole, margin=1.0)
    some = cb.calibrate(model, ids, **whole, margin=0.8)
    assert every.tolerance == some.tolerance
    assert some.approximated < every.approximated
    assert loose.texts_sha256 == tight.texts_sha256
    assert loose.texts_sha256 != cb.calibrate(model, ids[:1], ladder=LADDER).texts_sha256
    assert model.config._attn_implementation == before
    loose.check_model(model)


def test_heads_share_a_budget(model, ids, monkeypatch, tmp_path):
    def seconds(run, query, key, value, *rest, **options):
        return 2.0 if options.get("is_causal") else 1.0 if rest[0].window == 32 else 1.5

    monkeypatch.setattr("convbasis.plan.ladder._seconds", seconds)
    # What is measured does not depend on the budget.
    options = {"tolerance": 10.0, "ladder": LADDER, "checkpoint": tmp_path / "measured"}

    def plan(budget):
        return cb.calibrate(model, ids, budget=budget, **options)

    free = plan(None)
    assert free.predicted_kl is None
    everything = plan(1e9)
    assert everything.heads == free.heads
    last, cost = everything.predicted_kl, 0.0
    for part in (0.5, 0.1, 0.0):
        own = plan(part * everything.predicted_kl)
        assert own.predicted_kl <= part * everything.predicted_kl
        assert own.predicted_kl < last
        last, before = own.predicted_kl, cost
        cost = sum(head.cost for layer in own.heads for head in layer)
        assert cost > before
    # Errors of the last layer reach no later token.
    assert last == 0.0
    exact = [[head.setting is None for head in layer] for layer in own.heads]
    assert exact == [[True] * 4, [True] * 4, [False] * 4]
    assert cb.calibrate(model, ids, **options).predicted_kl <= 0.001


def test_the_crossover_is_that_of_all_heads_together(monkeypatch):
    """A setting that never pays for itself, one that does from 2,048 on, and exact heads."""
    monkeypatch.setattr(calibrate, "_WORTH_IT", 0.9)
    costs = Costs([1024, 2048, 4096], [[1.5, 0.8], [0.7, 0.4], [0.5, 0.2]])
    one, two, exact = HeadPlan(LADDER[0]), HeadPlan(LADDER[1]), HeadPlan(None)
    for heads, shortest in [
        ([one], 1722),
        ([two], 0),
        ([one, two], 1367),
        ([one, two, two, two], 1136),  # 0.975, then 0.475
        ([one, two, two, two, two], 1085),  # 0.94, then 0.46
        ([one, *[two] * 7], 0),  # 0.8875
        ([one, exact], 1878),
        ([two, exact, exact], 1218),
        ([one, exact, exact, exact], 2896),
        ([exact, exact, two, exact, exact, exact, exact, exact, exact], 4096),
    ]:
        assert calibrate._crossover(Chosen((tuple(heads),), None), costs, LADDER) == shortest


def test_a_stopped_calibration_goes_on(model, ids, tmp_path, monkeypatch):
    file = tmp_path / "measured.json"

    class Stop(Exception): ...

    def stop(done: int, total: int) -> None:
        assert total == 6 + 1  # what errors do to the model comes last
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        cb.calibrate(model, ids, ladder=LADDER, checkpoint=file, progress=stop)
    kept = json.loads(file.read_text())["measured"]
    assert list(kept) == ["costs", "0.0", "0.1", "0.2", "1.0"]
    assert list(kept["costs"]) == ["lengths", "costs"]
    assert [len(of_each) for of_each in kept["costs"]["costs"]] == [2] * len(kept["costs"]["lengths"])
    assert list(kept["1.0"]) == ["bounds", "errors"]

    def again(*_, **__):
        raise AssertionError("times are measured once")

    monkeypatch.setattr("convbasis.plan.ladder._seconds", again)
    done = []
    cb.calibrate(model, ids, ladder=LADDER, checkpoint=file, progress=lambda d, _: done.append(d))
    assert done == [4, 4, 4, 4, 5, 6, 7]
    after = json.loads(file.read_text())["measured"]
    assert {name: after[name] for name in kept} == kept
    assert list(after) == [*kept, "1.1", "1.2", "effects"]
    with pytest.raises(cb.FileFormatError, match="another calibration"):
        cb.calibrate(model, ids, ladder=LADDER, checkpoint=file, seed=1)
    file.write_text("{")
    with pytest.raises(cb.FileFormatError, match="no calibration checkpoint"):
        cb.calibrate(model, ids, ladder=LADDER, checkpoint=file)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([torch.arange(100) % 64, torch.arange(90) % 64], {}, r"\[90, 100\] tokens"),
        (torch.arange(9), {}, "at least 64 tokens"),
        (torch.rand(100), {}, "integers of shape"),
        (torch.arange(100) % 64, {"tolerance": 0.0}, "tolerance=0"),
        (torch.arange(100) % 64, {"ladder": ()}, "ladder is empty"),
        (torch.arange(100) % 64, {"margin": 0.0}, r"margin=0.0 is not in \(0, 1\]"),
        (torch.arange(100) % 64, {"margin": 1.5}, r"margin=1.5 is not in \(0, 1\]"),
        (torch.arange(100) % 64, {"budget": -0.1}, "budget=-0.1 is not a finite number >= 0"),
    ],
)
def test_bad_input_is_refused(model, texts, options, message):
    with pytest.raises(cb.InputError, match=message):
        cb.calibrate(model, texts, **options)


def test_a_layer_that_is_not_finite_is_named(model, ids):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[0, 0] = float("inf")
    with pytest.raises(cb.InputError, match="the key of layer 1 holds"):
        cb.calibrate(broken, ids[:1], ladder=LADDER[:1], budget=None)


def test_a_layer_that_does_not_attend_through_the_interface(model, ids, monkeypatch):
    monkeypatch.setattr("convbasis.integrations.calibrate.observe_layers", lambda *_: None)
    with pytest.raises(cb.InputError, match="layer 0 of the model does not attend through"):
        cb.calibrate(model, ids)


def test_a_checkpoint_of_other_weights_is_refused(model, ids, tmp_path):
    place = tmp_path / "measured.json"
    cb.calibrate(model, ids[:1], ladder=LADDER[:1], budget=None, checkpoint=place)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[-1, -1] += 0.5
    with pytest.raises(cb.ConvBasisError, match="weights, texts, ladder or seed differ"):
        cb.calibrate(other, ids[:1], ladder=LADDER[:1], budget=None, checkpoint=place)


def test_what_a_killed_run_left_beside_the_checkpoint_is_removed(model, ids, tmp_path):
    place, other = tmp_path / "measured[1].json", tmp_path / ".other.json.abc.part"
    left = tmp_path / ".measured[1].json.abc.part"
    left.write_text("half")
    other.write_text("half")
    cb.calibrate(model, ids[:1], ladder=LADDER[:1], budget=None, checkpoint=place)
    assert sorted(file.name for file in tmp_path.iterdir()) == [other.name, place.name]
