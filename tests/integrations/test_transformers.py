"""attn_implementation="conv_basis": exact without a plan, by it over prompts, exact afterwards."""

import copy
import dataclasses
import itertools
import logging
import shutil

import pytest
import torch
from tiny_models import (
    APPROXIMATED,
    CONFIGS,
    EVERYTHING,
    EXACT_ONLY,
    LITTLE,
    WINDOW,
    build,
    ids,
    padded,
    plan_for,
)
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

import convbasis as cb
from convbasis.hybrid.heads import _Sequence
from convbasis.integrations import prefill
from convbasis.integrations.exact import exact_attention
from convbasis.integrations.masks import MaskSpec
from convbasis.integrations.planned import fallbacks_by_head
from convbasis.integrations.reasons import why_exact
from convbasis.integrations.smollm2 import sample_text, token_ids
from convbasis.integrations.transformers import load_plan, save_plan
from convbasis.integrations.weights import weights_sha256
from convbasis.plan import HeadPlan, HeadSetting, Size

PADDINGS = (None, "left", "right")


def inputs(n=80, side=None, batch=2):
    if side is None:
        return {"input_ids": ids(n, batch)}
    tokens, mask = padded(ids(n, batch), side)
    return {"input_ids": tokens, "attention_mask": mask}


@torch.no_grad()
def logits(model, given, **options):
    """Return the logits of real tokens."""
    found = model(**given, **options).logits
    mask = given.get("attention_mask")
    return found if mask is None or mask.ndim != 2 else found[mask.bool()]


def worst(a, b):
    return float((a - b).abs().max())


def planned(family="llama", setting=EVERYTHING, *, changes=(), plan=(), **options):
    """Return a model with a plan applied, its last rows as all others, and the same model without."""
    options.setdefault("last_rows", 0)
    reference = build(family, **dict(changes))
    model = build(family, **dict(changes))
    cb.apply_plan(model, plan_for(model, setting, **dict(plan)), **options)
    return model, reference


class TestWithoutAPlan:
    @pytest.mark.parametrize("side", PADDINGS)
    @pytest.mark.parametrize("n", [40, WINDOW + 30])
    @pytest.mark.parametrize("family", CONFIGS)
    def test_logits_are_those_of_the_model(self, family, n, side):
        given = inputs(n, side)
        assert worst(logits(build(family, "conv_basis"), given), logits(build(family), given)) <= 1e-5

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("side", [None, "left"])
    @pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
    def test_generated_tokens_are_those_of_the_model(self, family, side, cache):
        assert torch.equal(
            generated(build(family, "conv_basis"), side, cache), generated(build(family), side, cache)
        )

    def test_how_to_make_a_plan_is_logged_once_for_each_model(self, caplog):
        for _ in range(2):
            model = build(implementation="conv_basis")
            for _ in range(3):
                logits(model, inputs(20))
        told = [r for r in caplog.records if r.name == "convbasis"]
        assert len(told) == 2
        assert "make one with convbasis.calibrate" in told[0].getMessage()

    def test_compiles_as_one_graph(self):
        model = build(implementation="conv_basis")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert worst(logits(compiled, inputs(), use_cache=False), logits(model, inputs())) <= 1e-5


def generated(model, side, cache, n=40):
    return model.generate(
        **inputs(n, side),
        max_new_tokens=6,
        do_sample=False,
        cache_implementation=None if cache == "dynamic" else "static",
        disable_compile=True,
        eos_token_id=None,
    )


class TestEverythingInTheWindow:
    """A plan whose windows hold the whole prompt changes nothing, through all of the machinery."""

    @pytest.mark.parametrize("side", PADDINGS)
    @pytest.mark.parametrize("family", APPROXIMATED)
    def test_logits(self, family, side):
        model, reference = planned(family)
        given = inputs(80, side)
        assert worst(logits(model, given), logits(reference, given)) <= 1e-5
        assert cb.plan_report(model) == (2, 16, 0, 0)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("side", [None, "left"])
    @pytest.mark.parametrize("family", APPROXIMATED)
    def test_generated_tokens(self, family, side, cache):
        model, reference = planned(family)
        assert torch.equal(generated(model, side, cache), generated(reference, side, cache))
        assert cb.plan_report(model) == (2, 16, 0, 0)

    def test_exact_heads_beside_approximated_ones(self):
        for exact_heads in [(0,), (0, 1), (1, 3), (0, 1, 2, 3)]:
            model, reference = planned(plan={"exact_heads": exact_heads})
            for side in PADDINGS:
                given = inputs(80, side)
                assert worst(logits(model, given), logits(reference, given)) <= 1e-5
            exact = 12 * len(exact_heads)
            assert cb.plan_report(model) == (6, 48 - exact, exact, 0)

    def test_half_precision(self):
        model, reference = planned()
        given = inputs(80, "left")
        difference = logits(model.bfloat16(), given) - logits(reference.bfloat16(), given)
        assert difference.float().norm() <= 0.02 * logits(reference, given).float().norm()
        assert cb.plan_report(model).heads_approximated == 16

    def test_autocast(self):
        model, reference = planned()
        given = inputs(80, "left")
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = logits(model, given), logits(reference, given)
        assert found.dtype == expected.dtype
        assert (found - expected).float().norm() <= 0.02 * expected.float().norm()
        assert cb.plan_report(model).heads_approximated == 16

    def test_a_model_spread_by_device_map(self, tmp_path):
        build().save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
        cb.apply_plan(model, plan_for(model))
        assert worst(logits(model, inputs()), logits(build(), inputs())) <= 1e-5
        assert cb.plan_report(model).heads_approximated == 16

    def test_a_layer_whose_weights_are_on_disk(self, tmp_path):
        build().save_pretrained(tmp_path)
        here = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
        places = {**dict.fromkeys(here, "cpu"), "model.layers.1": "disk"}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=places, offload_folder=tmp_path / "offloaded"
        )
        assert next(model.model.layers[1].parameters()).device.type == "meta"
        cb.apply_plan(model, plan_for(model, LITTLE), dynamic=False, last_rows=0)
        expected, _ = planned(setting=LITTLE, dynamic=False)
        assert worst(logits(model, inputs()), logits(expected, inputs())) <= 1e-6
        assert cb.plan_report(model).heads_approximated == 16


class TestApproximation:
    def test_a_small_window_changes_the_prompt(self):
        model, reference = planned(setting=LITTLE, dynamic=False)
        assert worst(logits(model, inputs()), logits(reference, inputs())) > 1e-2
        assert cb.plan_report(model) == (2, 16, 0, 0)

    def test_weights_of_half_precision_give_what_those_of_single_do(self):
        model, _ = planned(setting=LITTLE, dynamic=False)
        given = inputs(80, "left")
        expected = logits(model, given)
        difference = logits(model.bfloat16(), given).float() - expected
        assert difference.norm() <= 0.02 * expected.norm()
        assert cb.plan_report(model).heads_approximated == 32

    @torch.no_grad()
    def test_each_sequence_is_approximated_as_if_alone(self):
        model, _ = planned(setting=LITTLE, dynamic=False)
        tokens, mask = padded(ids(80, 2), "left", (0, 13))
        together = model(tokens, attention_mask=mask).logits
        alone = model(tokens[1:, 13:]).logits
        assert worst(together[1:, 13:], alone) <= 1e-5

    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("count", [1, 5])
    def test_later_calls_are_exact(self, count, static):
        model, _ = planned(setting=LITTLE, dynamic=False)
        tokens = ids(80)
        cache = DynamicCache() if not static else StaticCache(config=model.config, max_cache_len=100)
        with torch.no_grad():
            model(tokens[:, :70], past_key_values=cache)
            again = copy.deepcopy(cache)
            before = cb.plan_report(model)
            following = model(tokens[:, 70 : 70 + count], past_key_values=cache).logits
            assert cb.plan_report(model) == before
            cb.remove_plan(model)
            exact = model(tokens[:, 70 : 70 + count], past_key_values=again).logits
        assert worst(following, exact) <= 1e-5

    def test_long_following_chunks_are_exact(self):
        model, reference = planned(setting=LITTLE, dynamic=False, min_length=30)
        tokens, cache = ids(80), DynamicCache()
        with torch.no_grad():
            model(tokens[:, :20], past_key_values=cache)
            following = model(tokens[:, 20:], past_key_values=cache).logits
        assert worst(following, logits(reference, {"input_ids": tokens})[:, 20:]) <= 1e-5
        assert cb.plan_report(model) == (1, 0, 8, 0)

    def test_gradients_in_training(self):
        gradients = []
        for model in planned(training=True):
            model.train()(**inputs(), labels=inputs()["input_ids"]).loss.backward()
            gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
        assert gradients[0].norm() > 0
        assert worst(*gradients) <= 1e-5


class TestOptions:
    def test_min_length(self):
        given = inputs(50)
        for plans, option, approximated in [(49, None, 8), (50, None, 0), (10, 50, 0), (90, 49, 8)]:
            model, reference = planned(
                setting=LITTLE, plan={"min_length": plans}, min_length=option, dynamic=False
            )
            difference = worst(logits(model, {"input_ids": given["input_ids"][:1]}),
                               logits(reference, {"input_ids": given["input_ids"][:1]}))  # fmt: skip
            assert cb.plan_report(model) == (1, approximated, 8 - approximated, 0)
            assert (difference > 1e-3) == (approximated > 0)

    def test_dynamic_falls_back_to_exact(self, caplog):
        caplog.set_level(logging.INFO, "convbasis")
        model, reference = planned(setting=LITTLE, plan={"tolerance": 1e-6})
        assert worst(logits(model, inputs()), logits(reference, inputs())) <= 1e-5
        assert cb.plan_report(model) == (2, 0, 0, 16)
        assert "layer 1: the estimated error of 8 of 8 approximated heads exceeds 1e-06" in caplog.text

    def test_beyond_twice_the_calibrated_length_estimates_are_checked(self):
        options = {"plan": {"length": 39, "tolerance": 1e-6}, "dynamic": False}
        model, reference = planned(setting=LITTLE, **options)
        logits(model, inputs(78))
        assert cb.plan_report(model) == (2, 16, 0, 0)
        with pytest.warns(
            cb.ConvBasisWarning, match=r"79 tokens is more than twice .* \(39\)"
        ) as caught:
            found = logits(model, inputs(79))
        assert len(caught) == 1
        assert worst(found, logits(reference, inputs(79))) <= 1e-5
        assert cb.plan_report(model) == (4, 16, 0, 16)
        logits(model, inputs(79))  # an error if it warned again

    def test_training(self, caplog):
        caplog.set_level(logging.INFO, "convbasis")
        for training in (False, True):
            model, reference = planned(setting=LITTLE, dynamic=False, training=training)
            difference = worst(logits(model.train(), inputs()), logits(reference.train(), inputs()))
            assert (difference > 1e-2) == training
            assert cb.plan_report(model).heads_approximated == 16 * training
        assert caplog.text.count("the model is in training mode") == 1


def packed(n=60):
    positions = torch.cat([torch.arange(25), torch.arange(n - 25)])[None]
    return {"input_ids": ids(n), "position_ids": positions, "use_cache": False}


def with_own_mask(n=60):
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[40:, :20] = False
    return {"input_ids": ids(n), "attention_mask": mask[None, None]}


def with_a_gap():
    tokens = ids(WINDOW + 30)
    mask = torch.ones_like(tokens)
    mask[:, 60:70] = 0
    return {"input_ids": tokens, "attention_mask": mask}


class TestWhatRunsExactly:
    @pytest.mark.parametrize(
        ("family", "given", "reason"),
        [
            ("llama", packed(), "packed position_ids, or a mask of the model's own"),
            ("llama", with_own_mask(), "an explicit attention mask"),
            (
                "llama",
                {**inputs(), "sliding_window": 40},
                "longer than its local attention of 40 tokens",
            ),
            ("mistral", with_a_gap(), "padding between tokens of a sliding window"),
            ("gemma2", inputs(), "soft-capped logits"),
            ("gpt_oss", inputs(), "attention-sink parameters"),
            ("llama", {**inputs(), "is_causal": False}, "attention that is not causal"),
            ("llama", {**inputs(), "cu_seq_lens_q": torch.tensor([0])}, "the option cu_seq_lens_q"),
        ],
        ids=["packed", "4-D mask", "local", "gap", "soft cap", "sinks", "not causal", "option"],
    )
    def test_logged_once_with_the_reason(self, family, given, reason, caplog):
        model, reference = planned(family, LITTLE, dynamic=False)
        for _ in range(2):
            assert worst(logits(model, given), logits(reference, given)) <= 1e-5
        prompts = 2 * len(given["input_ids"])
        assert cb.plan_report(model) == (prompts, 0, 8 * prompts, 0)
        assert caplog.text.count("attending exactly in spite of the plan") == 1
        assert reason in caplog.text

    def test_masks_follow_the_device_of_their_layer(self):
        _, mask = padded(ids(20, 2), "left")
        given = {
            "inputs_embeds": torch.randn(2, 20, 4),
            "attention_mask": mask,
            "past_key_values": None,
        }
        spec = create_causal_mask(build(implementation="conv_basis").config, **given)
        for made in (spec.padding, spec.for_sdpa, spec.for_eager):
            assert made(torch.device("cpu")) is made(torch.device("cpu"))  # once for all layers
            assert made(torch.device("meta")).device.type == "meta"

    def test_heads_divided_over_devices(self):
        module = build().model.layers[0].self_attn
        query = torch.randn(1, 2, 50, 8)
        mask = create_causal_mask(build(implementation="conv_basis").config, query[0], None, None)
        assert why_exact(module, query, mask, {}, heads=4) == "heads divided over devices"
        assert why_exact(module, query, mask, {}, heads=2) is None

    def test_within_the_sliding_window_layers_are_approximated(self):
        model, reference = planned("mistral", LITTLE, dynamic=False)
        assert worst(logits(model, inputs(WINDOW)), logits(reference, inputs(WINDOW))) > 1e-2
        assert cb.plan_report(model).heads_approximated == 16

    @pytest.mark.parametrize("side", PADDINGS)
    def test_beyond_the_sliding_window_layers_are_exact_without_a_dense_mask(self, side, monkeypatch):
        model, reference = planned("mistral", LITTLE, dynamic=False)
        given = inputs(WINDOW + 30, side)
        expected = logits(reference, given)
        monkeypatch.setattr(MaskSpec, "for_sdpa", None)
        assert worst(logits(model, given), expected) <= 1e-5
        assert cb.plan_report(model) == (2, 0, 16, 0)

    @torch.no_grad()
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_output_attentions(self, family, caplog):
        model, _ = planned(family, LITTLE, dynamic=False)
        found = model(**inputs(side="left"), output_attentions=True)
        expected = build(family, "eager")(**inputs(side="left"), output_attentions=True)
        assert len(found.attentions) == 2
        for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
            assert worst(ours, theirs) <= 1e-5
        assert cb.plan_report(model).heads_approximated == 0
        assert caplog.text.count("output_attentions") == 1

    def test_dropout_in_training(self, caplog):
        model, _ = planned(changes={"attention_dropout": 0.1}, training=True)
        logits(model.train(), inputs())
        assert cb.plan_report(model) == (2, 0, 16, 0)
        assert caplog.text.count("attention dropout") == 1

    def test_a_family_without_eager_attention_for_what_sdpa_lacks(self):
        tensors = [torch.randn(1, 2, 5, 4) for _ in range(3)]
        with pytest.raises(
            cb.InputError, match="Identity asks for soft-capped logits, which scaled dot"
        ):
            exact_attention(torch.nn.Identity(), *tensors, None, softcap=30.0)

    def test_eager_attention_without_a_mask_is_causal(self):
        module = build("gemma2").model.layers[0].self_attn
        tensors = [torch.randn(1, heads, 5, 8) for heads in (4, 2, 2)]
        found, weights = exact_attention(module, *tensors, None, softcap=1e4, scaling=0.5)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *tensors, is_causal=True, scale=0.5, enable_gqa=True
        )
        assert worst(found.transpose(1, 2), expected) <= 1e-5
        assert torch.equal(weights, weights.tril())

    def test_a_bool_mask_for_eager_attention(self):
        given = with_own_mask()
        added = torch.zeros(1, 1, 60, 60).masked_fill(~given["attention_mask"], torch.finfo().min)
        expected = logits(build("gemma2"), {**given, "attention_mask": added})
        assert worst(logits(build("gemma2", "conv_basis"), given), expected) <= 1e-5


class TestPrefill:
    """One layer's prompt, head by head."""

    def heads(self, batch=2, n=50):
        torch.manual_seed(2)
        return [torch.randn(batch, count, n, 8) for count in (4, 2, 2)]

    def run(self, tensors, model_heads, **options):
        given = {"scale": 0.5, "padding": None, "tolerance": 0.1, **options}
        return prefill.planned_prefill(*tensors, model_heads, **given)

    def exact(self, query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.5, enable_gqa=True
        )

    def judge(self, monkeypatch, bound):
        """Let the bounds of pieces of work be others."""
        compute = _Sequence._judge

        def judged(self, pieces, *args):
            found = compute(self, pieces, *args)
            for place, (b, members, _) in enumerate(pieces):
                bounds = torch.tensor([float(bound(b, head)) for head in members])
                found[place] = found[place][0]._replace(bound=bounds), found[place][1]
            return found

        monkeypatch.setattr(_Sequence, "_judge", judged)

    @pytest.mark.parametrize("side", PADDINGS)
    @pytest.mark.parametrize("last_rows", [1, 7, 100])
    def test_the_last_rows_of_a_prompt_are_exact(self, last_rows, side):
        tensors = [x.requires_grad_() for x in self.heads(n=90)]
        padding = inputs(90, side)["attention_mask"].bool() if side else None
        little = HeadPlan(HeadSetting(window=4, sinks=1, columns=0))
        plans = [little, HeadPlan(None), little, little]
        options = {"padding": padding, "tolerance": None}
        found = self.run(tensors, plans, last_rows=last_rows, **options).output
        before = self.run(tensors, plans, **options).output
        with torch.no_grad():  # as prompts are attended to, in memory that is written in place
            again = self.run(tensors, plans, last_rows=last_rows, **options).output
        assert torch.allclose(found, again, atol=1e-6)
        for row in range(2):
            real = torch.arange(90) if padding is None else padding[row].nonzero()[:, 0]
            own = [x[row : row + 1, :, real] for x in tensors]
            expected, tail = self.exact(*own)[0], min(last_rows, len(real))
            split = len(real) - tail
            assert torch.allclose(found[row][:, real[split:]], expected[:, split:], atol=1e-5)
            assert torch.equal(found[row][:, real[:split]], before[row][:, real[:split]])
            assert split == 0 or (before[row][0, real[-1]] - expected[0, -1]).norm() > 0.1

    @pytest.mark.parametrize("side", PADDINGS)
    def test_only_the_head_that_exceeds_the_tolerance_is_exact_again(self, side, monkeypatch):
        tensors, plan = self.heads(), plan_for(build(), LITTLE).heads[0]
        mask = None if side is None else padded(ids(50, 2), side)[1].bool()
        without = self.run(tensors, plan, padding=mask, tolerance=None)
        assert not without.fallen_back.any()
        self.judge(monkeypatch, lambda b, head: 0.2 * (b == 1) * (head == 2))
        found = self.run(tensors, plan, padding=mask)
        assert found.fallen_back.nonzero().tolist() == [[1, 2]]
        real = torch.ones(50, dtype=torch.bool) if mask is None else mask[1]
        exact = self.exact(*(x[1:, :, real] for x in tensors))
        assert worst(found.output[1, 2, real], exact[0, 2]) <= 1e-6
        assert worst(without.output[1, 2, real], exact[0, 2]) > 1e-2
        kept = torch.ones(2, 4, dtype=torch.bool)
        kept[1, 2] = False
        assert torch.equal(found.output[kept], without.output[kept])

    def test_heads_that_fall_back_are_the_same_on_any_number_of_threads(self, monkeypatch):
        tensors, plan = self.heads(n=300), plan_for(build(), LITTLE).heads[0]
        self.judge(monkeypatch, lambda b, head: 0.2 * (head > 1))
        before, found = torch.get_num_threads(), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                found.append(self.run(tensors, plan))
            finally:
                torch.set_num_threads(before)
        assert found[0].fallen_back.tolist() == [[False, False, True, True]] * 2
        assert torch.equal(found[0].output, found[1].output)
        assert torch.equal(found[0].output, found[2].output)

    def test_an_estimate_that_is_not_a_number_falls_back(self, monkeypatch):
        self.judge(monkeypatch, lambda b, head: float("nan"))
        found = self.run(self.heads(), plan_for(build(), LITTLE).heads[0])
        assert found.fallen_back.all()

    def test_each_head_gives_what_it_gives_among_heads_of_its_setting(self):
        little, all_of_it = (plan_for(build(), setting).heads[0] for setting in (LITTLE, EVERYTHING))
        tensors = self.heads()
        alone = [self.run(tensors, own, tolerance=None).output for own in (little, all_of_it)]
        for mixed in ([0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1]):
            heads = [(little, all_of_it)[own][head] for head, own in enumerate(mixed)]
            found = self.run(tensors, heads, tolerance=None).output
            for head, own in enumerate(mixed):
                assert torch.equal(found[:, head], alone[own][:, head])

    @pytest.mark.parametrize("costs", [*itertools.permutations((0.1, 0.2, 0.3, 0.4))])
    @pytest.mark.parametrize("recorded", [False, True])
    def test_each_head_gives_what_it_gives_alone_in_any_order(self, costs, recorded):
        """Four heads share keys; in which order they are attended to depends on what they cost."""
        windows = (5, 9, 17, 33)
        heads = [
            HeadPlan(HeadSetting(window=window, sinks=1, columns=2), 0.1, cost)
            for window, cost in zip(windows, costs, strict=True)
        ]
        query, key, value = (
            x[:, :heads_] for x, heads_ in zip(self.heads(1, 300), (4, 1, 1), strict=True)
        )
        query.requires_grad_(recorded)
        found = self.run((query, key, value), heads, last_rows=9, tolerance=0.7)
        for number, own in enumerate(heads):
            tensors = (query[:, number : number + 1], key, value)
            alone = self.run(tensors, [own], last_rows=9, tolerance=0.7)
            assert worst(found.output[:, number].detach(), alone.output[:, 0].detach()) <= 1e-5
            assert found.fallen_back[:, number].tolist() == alone.fallen_back[:, 0].tolist()

    @pytest.mark.parametrize(
        ("windows", "threads", "expected"),
        [
            ((5, 9, 17, 33), 2, [[2], [0], [3], [1]]),
            ((5, 5, 5, 9), 2, [[0, 1], [2], [3]]),
            ((5, 5, 5, 5), 2, [[2, 3], [0, 1]]),
            ((5, 5, 5, 5), 1, [[2, 3], [0, 1]]),
            ((5, 5, 5, 5), 4, [[2], [0], [3], [1]]),
        ],
    )
    def test_the_longest_work_begins_first(self, windows, threads, expected, monkeypatch):
        """Heads that share a key and a setting are one piece of work; each thread has one."""
        heads = [
            HeadPlan(HeadSetting(window=window, sinks=1, columns=2), 0.1, cost)
            for window, cost in zip(windows, (0.3, 0.15, 0.4, 0.2), strict=True)
        ]
        compute, order = prefill.attend_pieces, []

        def seen(query, key, value, pieces, *args, **options):
            order.extend(heads for _, heads, settings in pieces if settings is not None)
            return compute(query, key, value, pieces, *args, **options)

        monkeypatch.setattr(prefill, "attend_pieces", seen)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            self.run(self.heads(batch=1), heads)
        finally:
            torch.set_num_threads(before)
        assert order == expected


GROWING = HeadSetting(Size(16, 100, 1.0), 2, Size(2, 100, 1.0))


class TestPaddedPrompts:
    """Sizes, the crossover and counts are those of each prompt, whatever it is padded to."""

    def batch(self, side, short=70):
        """A prompt of 160 tokens, and a shorter one that is padded to it; and where that one is."""
        tokens = ids(160, 2)
        place = slice(0, short) if side == "right" else slice(160 - short, 160)
        mask = torch.ones_like(tokens)
        mask[1] = 0
        mask[1, place] = 1
        return tokens, mask, place

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_setting_that_grows_is_that_of_the_prompt_alone(self, side):
        model, _ = planned(setting=GROWING, dynamic=False)
        tokens, mask, place = self.batch(side)
        with torch.no_grad():
            found = model(tokens, attention_mask=mask).logits
            alone = model(tokens[1:, place]).logits
        assert worst(found[1, place], alone[0]) <= 1e-5

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_layer_of_exact_heads_makes_no_dense_mask(self, side, monkeypatch):
        model, reference = planned(plan={"exact_heads": range(4)})
        tokens, mask, _ = self.batch(side)
        with torch.no_grad():
            expected = reference(tokens, attention_mask=mask).logits
            monkeypatch.setattr(MaskSpec, "for_sdpa", None)
            found = model(tokens, attention_mask=mask).logits
        real = mask.bool()
        assert worst(found[real], expected[real]) <= 1e-5
        assert cb.plan_report(model) == (2, 0, 16, 0)

    def test_a_short_prompt_beside_a_long_one_is_exact(self):
        model, reference = planned(setting=GROWING, min_length=80, dynamic=False)
        tokens, mask, place = self.batch("right")
        with torch.no_grad():
            found, exact = (own(tokens, attention_mask=mask).logits for own in (model, reference))
        assert cb.plan_report(model) == (2, 8, 8, 0)
        assert worst(found[1, place], exact[1, place]) <= 1e-5
        assert worst(found[0], exact[0]) > 1e-3

    def test_fallbacks_are_known_by_head(self):
        model, _ = planned(setting=LITTLE, plan={"tolerance": 1e-9})
        assert fallbacks_by_head(model) == [[0] * 4] * 2
        logits(model, inputs(80))
        assert fallbacks_by_head(model) == [[2] * 4] * 2
        assert cb.plan_report(model).heads_fallen_back == 16


class TestNotFinite:
    @pytest.mark.parametrize("name", ["query", "key", "value"])
    def test_what_is_not_finite_is_named(self, name):
        model, _ = planned(setting=LITTLE)
        with torch.no_grad():
            getattr(model.model.layers[1].self_attn, f"{name[0]}_proj").weight[0, 0] = float("nan")
        with pytest.raises(cb.InputError, match=f"the {name} of layer 1 holds"):
            logits(model, inputs())

    @pytest.mark.parametrize("exact_heads", [(), (1, 3)])
    @pytest.mark.parametrize("options", [{}, {"dynamic": False}, {"chunked": True}])
    @pytest.mark.parametrize("setting", [LITTLE, EVERYTHING], ids=["little", "everything"])
    def test_logits_that_overflow(self, setting, options, exact_heads):
        """Queries and keys are finite, their products are not."""
        model, _ = planned(setting=setting, plan={"exact_heads": exact_heads}, **options)
        with torch.no_grad():
            for projection in ("q_proj", "k_proj"):
                getattr(model.model.layers[1].self_attn, projection).weight.mul_(1e20)
        with pytest.raises(cb.InputError, match="the output of layer 1 holds"):
            logits(model, inputs())

    @pytest.mark.parametrize("setting", [EVERYTHING, None], ids=["approximated", "exact"])
    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_the_layer_is_named(self, number, setting):
        model, _ = planned(setting=setting)
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight[0, 0] = number
        with pytest.raises(cb.InputError, match="the value of layer 1 holds"):
            logits(model, inputs())

    def test_while_decoding(self):
        model, _ = planned()
        cache = DynamicCache()
        with torch.no_grad():
            model(ids(80), past_key_values=cache)
            model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
            with pytest.raises(cb.InputError, match="the output of layer 0 holds"):
                model(ids(1), past_key_values=cache)


class TestWeights:
    def test_a_plan_for_other_weights_is_told(self):
        model, other = build(), build()
        plan = dataclasses.replace(plan_for(model), weights_sha256=weights_sha256(model))
        cb.apply_plan(model, plan)
        with torch.no_grad():
            other.model.layers[1].self_attn.q_proj.weight[-1] += 1.0
        with pytest.warns(cb.ConvBasisWarning, match="with other weights than this LlamaForCausalLM"):
            cb.apply_plan(other, plan)
        assert cb.plan_report(other).prefills == 0  # it holds all the same

    def test_the_same_weights_in_other_types(self):
        model = build()
        known, exactly = weights_sha256(model), weights_sha256(model, exact=True)
        assert weights_sha256(model.bfloat16()) == known
        assert weights_sha256(model, exact=True) != exactly
        assert weights_sha256(model.float()) == known

    def test_weights_that_are_not_at_hand(self):
        assert weights_sha256(build().to("meta")) is None


class TestApplyAndRemove:
    @pytest.mark.parametrize("before", ["sdpa", "eager", "conv_basis"])
    def test_removal_restores_what_was(self, before):
        model = build(implementation=before)
        expected = logits(model, inputs())
        cb.apply_plan(model, plan_for(model, LITTLE), dynamic=False)
        assert worst(logits(model, inputs()), expected) > 1e-2
        cb.apply_plan(model, plan_for(model), dynamic=False)  # replaces the first one
        assert worst(logits(model, inputs()), expected) <= 1e-5
        assert cb.plan_report(model).prefills == 2
        cb.remove_plan(model)
        assert model.config._attn_implementation == before
        assert torch.equal(logits(model, inputs()), expected)

    def test_refusals(self):
        model = build()
        with pytest.raises(cb.InputError, match=r"the plan is for .*Qwen2.*, not for this Llama"):
            cb.apply_plan(model, plan_for(build("qwen2")))
        with pytest.raises(cb.InputError, match="plan is a dict; a Plan is wanted"):
            cb.apply_plan(model, {})
        with pytest.raises(cb.InputError, match="min_length=-1 is not an integer >= 0"):
            cb.apply_plan(model, plan_for(model), min_length=-1)
        assert model.config._attn_implementation == "sdpa"
        for function in (cb.remove_plan, cb.plan_report):
            with pytest.raises(
                cb.InputError, match="this LlamaForCausalLM has no plan; apply_plan gives"
            ):
                function(model)

    def test_layers_without_attention(self):
        model = build()
        del model.model.layers[1].self_attn
        with pytest.raises(cb.InputError, match=r"no attention was found in layers \[1\]"):
            cb.apply_plan(model, plan_for(model))

    def test_a_model_beside_the_interface(self, monkeypatch):
        model = build()
        monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
        with pytest.raises(cb.InputError, match="does not attend through the attention interface"):
            cb.apply_plan(model, plan_for(model))
        with pytest.raises(cb.InputError, match="has no plan"):
            cb.plan_report(model)

    def test_the_plan_is_not_in_the_weights_or_the_configuration(self):
        model, reference = planned()
        assert model.state_dict().keys() == reference.state_dict().keys()
        assert model.config.to_dict() == reference.config.to_dict()

    def test_saved_and_read_beside_the_weights(self, tmp_path):
        model, reference = planned(setting=LITTLE, dynamic=False)
        model.save_pretrained(tmp_path)
        assert save_plan(model, tmp_path) == tmp_path / "conv_basis_plan.json"
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert worst(logits(again, inputs()), logits(reference, inputs())) <= 1e-5
        cb.apply_plan(again, load_plan(tmp_path), dynamic=False, last_rows=0)
        assert worst(logits(again, inputs()), logits(model, inputs())) <= 1e-5

    def test_no_plan_to_save_or_read(self, tmp_path):
        with pytest.raises(cb.InputError, match="has no plan"):
            save_plan(build(), tmp_path)
        with pytest.raises(cb.MissingPathError, match=r"there is no conv_basis_plan\.json in"):
            load_plan(tmp_path)

    def test_a_copy_counts_by_itself(self):
        model, _ = planned()
        copied = copy.deepcopy(model)
        logits(copied, inputs())
        assert cb.plan_report(copied) == (2, 16, 0, 0)
        assert cb.plan_report(model) == (0, 0, 0, 0)


class TestRealModel:
    def test_smollm2(self, smollm2):
        """Real heads under one setting: those within the tolerance stay, the others are exact again."""
        model = smollm2.model
        given = {"input_ids": token_ids(smollm2.tokenizer, sample_text(), 600)}
        setting = HeadSetting(window=128, sinks=4, columns=32)
        exact = logits(model, given)[0].log_softmax(-1)
        cb.apply_plan(model, plan_for(model, EVERYTHING, length=600))
        try:
            assert worst(logits(model, given)[0].log_softmax(-1), exact) <= 1e-3
            cb.apply_plan(model, plan_for(model, setting, tolerance=0.05, length=600))
            found = logits(model, given)[0].log_softmax(-1)
            report = cb.plan_report(model)
        finally:
            cb.remove_plan(model)
        divergence = (exact.exp() * (exact - found)).sum(-1).mean()
        assert 1e-6 < divergence < 0.01
        assert report.heads_approximated + report.heads_fallen_back == 270
        assert report.heads_approximated > 30
        assert report.heads_fallen_back > 30


class TestCompile:
    @pytest.mark.parametrize("side", [None, "left"])
    def test_a_planned_model(self, side):
        model, _ = planned(setting=LITTLE, dynamic=False)
        given = inputs(80, side)
        expected = logits(model, given)
        compiled = torch.compile(model, backend="eager")
        assert worst(logits(compiled, given), expected) <= 1e-5
        assert cb.plan_report(compiled) == (4, 32, 0, 0)

    @pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a compiler")
    def test_the_default_backend(self):
        model, _ = planned(setting=LITTLE, dynamic=False)
        expected = logits(model, inputs())
        assert worst(logits(torch.compile(model), inputs()), expected) <= 1e-4
        assert cb.plan_report(model) == (4, 32, 0, 0)

    def test_a_plan_for_a_compiled_model(self):
        model, _ = planned(setting=LITTLE, dynamic=False)
        expected = logits(model, inputs())
        cb.remove_plan(model)
        compiled = torch.compile(model, backend="eager")
        assert worst(logits(compiled, inputs()), expected) > 1e-2
        cb.apply_plan(compiled, plan_for(model, LITTLE), dynamic=False, last_rows=0)
        assert worst(logits(compiled, inputs()), expected) <= 1e-5
        cb.remove_plan(compiled)
        assert worst(logits(compiled, inputs()), expected) > 1e-2

    def test_a_sliding_window(self):
        model, _ = planned("mistral", LITTLE, dynamic=False)
        compiled = torch.compile(model, backend="eager", dynamic=False)
        for n in (80, WINDOW + 20):
            assert worst(logits(compiled, inputs(n)), logits(model, inputs(n))) <= 1e-5
        assert cb.plan_report(model) == (8, 32, 32, 0)

    def test_without_a_cache_a_mask_tells_that_nothing_is_packed(self, caplog):
        model, _ = planned(setting=LITTLE, dynamic=False)
        compiled = torch.compile(model, backend="eager")
        tokens = ids(80)
        logits(
            compiled, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, use_cache=False
        )
        assert cb.plan_report(model) == (1, 8, 0, 0)
        logits(compiled, {"input_ids": tokens}, use_cache=False)
        assert cb.plan_report(model) == (2, 8, 8, 0)
        assert "packed position_ids" in caplog.text


def test_families_are_all_tested():
    assert {*APPROXIMATED, *EXACT_ONLY} == set(CONFIGS)
