"""Prompts that come in chunks: approximated as one call is, exact where they cannot be."""

import dataclasses
import logging

import pytest
import torch
from tiny_models import LITTLE, build, ids, padded, plan_for
from transformers import DynamicCache, StaticCache

import convbasis as cb
from convbasis.integrations.chunks import ChunkedLayer
from convbasis.plan import HeadPlan, HeadSetting

WEIGHED = HeadSetting(
    window=8, sinks=1, columns=4, blocks=1, far_field="segments", key_weights=True, correction=True
)
CONV = HeadSetting(window=8, sinks=1, columns=4, far_field="conv")


def chunked(family="llama", setting=LITTLE, plan=(), **options):
    reference, model = build(family), build(family)
    options = {"dynamic": False, "chunked": True, **options}
    cb.apply_plan(model, plan_for(model, setting, **{"length": 700, **dict(plan)}), **options)
    return model, reference


@torch.no_grad()
def in_chunks(model, tokens, bounds, cache=None, mask=None):
    """Logits of a prompt in several calls with one cache."""
    cache = DynamicCache() if cache is None else cache
    found = []
    for begin, end in bounds:
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        found.append(model(tokens[:, begin:end], past_key_values=cache, **given).logits)
    return torch.cat(found, 1)


def worst(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_within_the_window_chunks_are_exact(family):
    model, reference = chunked(family, HeadSetting(window=900))
    tokens = ids(700, 2)
    with torch.no_grad():
        expected = reference(tokens).logits
    bounds = [(0, 40), (40, 650), (650, 700)]
    assert worst(in_chunks(model, tokens, bounds), expected) <= 1e-4
    report = cb.plan_report(model)
    assert report.prefills == 6
    assert (report.heads_exact, report.heads_fallen_back) == (0, 0)


@pytest.mark.parametrize("setting", [LITTLE, WEIGHED, CONV], ids=["little", "weighed", "conv"])
@pytest.mark.parametrize("static", [False, True])
def test_chunks_of_any_size_give_what_one_call_gives(setting, static):
    tokens = ids(700, 2)
    results = []
    for bounds in ([(0, 700)], [(0, 470), (470, 700)], [(0, 530), (530, 535), (535, 700)]):
        model, reference = chunked(setting=setting)
        cache = StaticCache(config=model.config, max_cache_len=730) if static else None
        results.append(in_chunks(model, tokens, bounds, cache))
    assert worst(results[0], results[1]) <= 1e-5
    assert worst(results[0], results[2]) <= 1e-5
    with torch.no_grad():
        assert worst(results[0], reference(tokens).logits) > 1e-3


@torch.no_grad()
def test_generation_with_chunks_of_the_prompt():
    """Transformers' own option for prompts in chunks; decoding is exact on the cache that they left."""
    model, _ = chunked(setting=WEIGHED)
    tokens = ids(700)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    found = model.generate(tokens, attention_mask=mask, prefill_chunk_size=270, **options)
    report = cb.plan_report(model)
    assert report.prefills == 3
    assert report.heads_approximated == 3 * 8
    cache = DynamicCache()
    logits = in_chunks(model, tokens, [(0, 270), (270, 540), (540, 700)], cache)[:, -1:]
    cb.remove_plan(model)
    expected = tokens
    for _ in range(5):
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
        logits = model(expected[:, -1:], past_key_values=cache).logits
    assert torch.equal(found, expected)
    exact = model(tokens).logits[:, -1:]
    assert worst(in_chunks(model, tokens, [(0, 700)])[:, -1:], exact) <= 1e-4
    cb.apply_plan(model, plan_for(model, WEIGHED, length=700), dynamic=False, chunked=True)
    assert worst(in_chunks(model, tokens, [(0, 270), (270, 700)])[:, -1:], exact) > 1e-3


@torch.no_grad()
def test_heads_of_one_layer_have_settings_of_their_own():
    """Windows that hold the prompt are exact whatever the heads beside them do."""
    tokens = ids(700)
    found = []
    for others in (LITTLE, WEIGHED):
        model, _ = chunked()
        plan = plan_for(model, HeadSetting(window=900), length=700)
        heads = [list(layer) for layer in plan.heads]
        heads[-1][1::2] = [HeadPlan(others)] * len(heads[-1][1::2])
        cb.apply_plan(model, dataclasses.replace(plan, heads=heads), dynamic=False, chunked=True)
        seen = {}
        forward = ChunkedLayer.attend

        def attend(self, *inputs, seen=seen, forward=forward):
            done = forward(self, *inputs)
            seen.setdefault(self.length, []).append(done.output.clone())
            return done

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ChunkedLayer, "attend", attend)
            in_chunks(model, tokens, [(0, 600), (600, 700)])
        found.append(torch.cat([seen[600][-1], seen[700][-1]], 2))
    even, odd = (found[0][:, i::2] - found[1][:, i::2] for i in (0, 1))
    assert float(even.abs().max()) <= 1e-6
    assert float(odd.abs().max()) > 1e-4


def test_a_head_that_exceeds_the_tolerance_is_exact_in_its_chunk():
    model, reference = chunked(plan={"tolerance": 1e-9}, dynamic=True)
    tokens = ids(700)
    with torch.no_grad():
        expected = reference(tokens).logits
    assert worst(in_chunks(model, tokens, [(0, 600), (600, 700)]), expected) <= 1e-4
    report = cb.plan_report(model)
    assert report.heads_fallen_back == 16
    assert report.prefills == 2


def test_exact_heads_stay_exact():
    tokens = ids(700)
    found = []
    for exact_heads in ((), (0,)):
        model, _ = chunked(plan={"exact_heads": exact_heads})
        found.append(in_chunks(model, tokens, [(0, 600), (600, 700)]))
    assert worst(*found) > 1e-5


def test_without_asking_following_chunks_are_exact():
    tokens = ids(700)
    asked, _ = chunked(chunked=True)
    not_asked, _ = chunked(chunked=False)
    bounds = [(0, 600), (600, 700)]
    assert worst(in_chunks(asked, tokens, bounds), in_chunks(not_asked, tokens, bounds)) > 1e-4
    assert cb.plan_report(not_asked).prefills == 1


def test_a_chunk_after_decoded_tokens_is_exact(caplog):
    model, _ = chunked()
    tokens = ids(700)
    cache, expected = DynamicCache(), DynamicCache()
    in_chunks(model, tokens, [(0, 600), (600, 601)], cache)
    before = cb.plan_report(model)
    with caplog.at_level(logging.WARNING, "convbasis"):
        following = in_chunks(model, tokens, [(601, 700)], cache)
    assert "not attended to as chunks" in caplog.text
    after = cb.plan_report(model)
    assert after.heads_approximated == before.heads_approximated
    assert after.heads_exact > before.heads_exact
    # The same cache, read exactly.
    cb.remove_plan(model)
    other, _ = chunked()
    in_chunks(other, tokens, [(0, 600), (600, 601)], expected)
    assert worst(following, in_chunks(model, tokens, [(601, 700)], expected)) <= 1e-5


def test_a_new_prompt_begins_anew():
    model, _ = chunked()
    tokens = ids(700)
    bounds = [(0, 600), (600, 700)]
    first = in_chunks(model, tokens, bounds)
    in_chunks(model, tokens.flip(1), bounds[:1])
    assert torch.equal(first, in_chunks(model, tokens, bounds))


def test_a_chunk_of_another_prompt_is_exact(caplog):
    """Two prompts that take turns: nothing of the one is taken for the other's."""
    model, _ = chunked()
    one, two = ids(700), ids(700).flip(1)
    caches = DynamicCache(), DynamicCache()
    in_chunks(model, one, [(0, 600)], caches[0])
    in_chunks(model, two, [(0, 600)], caches[1])
    before = cb.plan_report(model).heads_approximated
    with caplog.at_level(logging.WARNING, "convbasis"):
        in_chunks(model, one, [(600, 700)], caches[0])
    assert "of another prompt" in caplog.text
    assert cb.plan_report(model).heads_approximated == before


def test_the_mask_of_a_long_chunk_takes_linear_memory(monkeypatch):
    model, reference = chunked(plan={"tolerance": 1e-9, "exact_heads": (1,)}, dynamic=True)
    monkeypatch.setattr("convbasis.integrations.prefill._ROWS", 30)
    monkeypatch.setattr("convbasis.integrations.chunks.serves_exactly", lambda *tensors: False)
    tokens = ids(700)
    with torch.no_grad():
        expected = reference(tokens).logits
    assert worst(in_chunks(model, tokens, [(0, 540), (540, 700)]), expected) <= 1e-4


def test_what_is_known_stays_with_its_heads():
    """Whether or not exact heads are pieces of the same work: with gradients they are not."""
    tokens = ids(700, 2)
    found = []
    for recorded in (False, True):
        model, _ = chunked(plan={"exact_heads": (0,)})
        cache = DynamicCache()
        with torch.no_grad():
            model(tokens[:, :600], past_key_values=cache)
        with torch.set_grad_enabled(recorded):
            logits = model(tokens[:, 600:], past_key_values=cache).logits
        assert logits.requires_grad == recorded
        found.append(logits.detach())
    assert worst(*found) <= 1e-5


def test_autocast(caplog):
    tokens = ids(700)
    model, _ = chunked(setting=WEIGHED)
    whole = in_chunks(model, tokens, [(0, 600), (600, 700)])
    with torch.autocast("cpu", torch.bfloat16), caplog.at_level(logging.WARNING, "convbasis"):
        found = in_chunks(model, tokens, [(0, 600), (600, 700)])
    assert "another prompt" not in caplog.text
    assert float((found - whole).norm() / whole.norm()) < 0.03
    assert cb.plan_report(model).heads_exact == 0


def test_weights_of_half_precision():
    tokens = ids(700)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = chunked(setting=WEIGHED, plan={"exact_heads": (1,)})
        results.append(in_chunks(model.to(dtype), tokens, [(0, 600), (600, 700)]).float())
    assert float((results[0] - results[1]).norm() / results[0].norm()) < 0.03


def test_padded_prompts_are_exact(caplog):
    model, reference = chunked()
    tokens, mask = padded(ids(700, 2), "left", (0, 13))
    with caplog.at_level(logging.WARNING, "convbasis"):
        found = in_chunks(model, tokens, [(0, 600), (600, 700)], mask=mask)
    with torch.no_grad():
        expected = reference(tokens, attention_mask=mask).logits
    assert worst(found[mask.bool()], expected[mask.bool()]) <= 1e-4
    assert "padding in a prompt that comes in chunks" in caplog.text


def test_sliding_windows_are_exact(caplog):
    model, reference = chunked("mistral")
    tokens = ids(700)
    with caplog.at_level(logging.WARNING, "convbasis"):
        found = in_chunks(model, tokens, [(0, 600), (600, 700)])
    with torch.no_grad():
        assert worst(found, reference(tokens).logits) <= 1e-4
