"""convbasis compare: figures against a plain computation, every option, texts kept after Ctrl-C."""

import json

import pytest
import tiny_models
import torch

import convbasis as cb
from convbasis.integrations.compare import compare_plan, timed_attention
from convbasis.integrations.transformers import attention_forward


@pytest.fixture
def words(folder, plan_file, text):
    return ["compare", folder, "--plan", plan_file, "--text", text, "--length", 200, "--scored", 50]


def figures(content, column=1):
    return {row[0]: row[column] for row in content["tables"][0]["rows"]}


@torch.no_grad()
def test_losses_are_those_of_the_model(loaded, plan_file):
    ids = tiny_models.ids(150)
    plan = cb.Plan.load(plan_file)
    found = compare_plan(loaded, plan, ids, scored=40, dynamic=False)
    logs = loaded(ids).logits[0, -41:-1].log_softmax(-1)
    loss = float(torch.nn.functional.nll_loss(logs, ids[0, -40:]))
    assert found.exact.loss == pytest.approx(loss, rel=1e-5)
    assert (found.exact.kl, found.exact.top1, found.exact.perplexity_ratio) == (0.0, 1.0, 1.0)
    cb.apply_plan(loaded, plan, dynamic=False)
    prompt = loaded(ids[:, :-40], use_cache=True)
    rest = loaded(ids[:, -40:], past_key_values=prompt.past_key_values)
    planned = torch.cat([prompt.logits[0, -1:], rest.logits[0, :-1]]).log_softmax(-1)
    report = cb.plan_report(loaded)
    cb.remove_plan(loaded)
    kl = float((logs.exp() * (logs - planned)).sum(-1).mean())
    assert kl > 1e-4
    assert found.planned.kl == pytest.approx(kl, rel=1e-3)
    assert found.planned.kl_standard_error > 0
    agree = float((planned.argmax(-1) == logs.argmax(-1)).float().mean())
    assert found.planned.top1 == pytest.approx(agree)
    assert found.report == report == cb.PlanReport(1, 6, 2, 0)
    for scored in (found.exact, found.planned):
        assert 0 < scored.attention_seconds < scored.prompt_seconds


def test_the_text_of_the_calibration_is_named(run, words, plan_file, tmp_path):
    first = run(*words, "--no-fallback")
    assert not any("calibrated on" in note for note in first["notes"])
    of_text = json.loads(plan_file.read_text())
    of_text["texts_sha256"] = first["provenance"]["sources"][0]["sha256"]
    own = tmp_path / "own.json"
    own.write_text(json.dumps(of_text))
    words[words.index("--plan") + 1] = own
    notes = run(*words, "--no-fallback")["notes"]
    assert any("random.txt is what the plan was calibrated on" in note for note in notes)


def test_the_model_is_as_before(loaded, plan_file):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = loaded.config._attn_implementation

    def fail():
        with timed_attention(loaded):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert loaded.config._attn_implementation == before
    assert ALL_ATTENTION_FUNCTIONS["conv_basis"] is attention_forward
    plan = cb.Plan.load(plan_file)
    for scored in (1, 100):
        with pytest.raises(cb.InputError, match=f"scored={scored}: at least 2 tokens"):
            compare_plan(loaded, plan, tiny_models.ids(100), scored=scored)
    cb.apply_plan(loaded, plan)
    with pytest.raises(cb.InputError, match="has a plan already"):
        compare_plan(loaded, plan, tiny_models.ids(100), scored=10)
    cb.remove_plan(loaded)


def test_every_option_changes_the_result(run, words, text, tmp_path, monkeypatch, pages):
    base = run(*words, "--no-fallback")
    assert base["provenance"]["model"] == "tiny"
    assert dict(base["summary"])["prompt, tokens"] == 150
    found = figures(base)
    assert found["KL(exact || plan), nats"] > 0
    assert (found["heads approximated"], found["heads exact"], found["heads fallen back"]) == (6, 2, 0)
    # Nothing is within the tiny tolerance of this plan: every head falls back.
    again = figures(run(*words))
    assert (again["heads approximated"], again["heads fallen back"]) == (0, 6)
    assert again["KL(exact || plan), nats"] < 1e-6
    short = run(*words, "--no-fallback", "--min-length", 150)
    assert figures(short)["heads exact"] == 8
    assert "All heads were exact" in short["notes"][1]
    assert dict(run(*words, "--scored", 60)["summary"])["prompt, tokens"] == 140
    assert dict(run(*words, "--length", 240)["summary"])["prompt, tokens"] == 190
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[500:])
    both = run(*words, "--no-fallback", "--text", other)
    assert both["tables"][0]["columns"] == ["figure", "random.txt", "other.txt"]
    assert figures(both)["loss, exact"] == found["loss, exact"] != figures(both, 2)["loss, exact"]
    steps = []
    monkeypatch.setattr("convbasis.cli.compare.compare_plan", spy(steps))
    several = run(*words, "--repeats", 3)
    assert steps == [3]
    assert not any("--repeats" in note for note in several["notes"])
    assert any("--repeats" in note for note in base["notes"])
    assert any("No head was approximated" in note for note in short["notes"])
    assert not any("No head was approximated" in note for note in base["notes"])
    run(*words, "--report", tmp_path / "r.html")
    assert [place for _, place in pages] == [tmp_path / "r.html"]


def test_maps_and_error_against_cost(run, words, plan_file, tmp_path):
    content = run(*words, "--no-fallback")
    settings, errors, times = (own["values"] for own in content["maps"])
    assert settings == [["exact"] + ["window 8"] * 3] * 2
    assert errors == [[0.0] * 4] * 2
    assert times == [[1.0] * 4] * 2
    (chart,) = content["charts"]
    assert chart["marked"] is None  # this plan predicts no KL
    found = figures(content)
    (line,) = chart["lines"]
    ratio = found["attention, plan, s"] / found["attention, exact, s"]
    assert line["x"] == [pytest.approx(ratio, rel=1e-3)]
    assert line["y"] == [found["KL(exact || plan), nats"]]
    assert line["labels"] == ["random.txt"]
    heads = json.loads(plan_file.read_text())
    heads["predicted_kl"] = 0.25
    (tmp_path / "told.json").write_text(json.dumps(heads))
    chart = run(*words, "--plan", tmp_path / "told.json")["charts"][0]
    assert chart["marked"] == [1.0, 0.25, "predicted at 100 tokens"]


def spy(steps):
    def compare(*inputs, **options):
        if options["repeats"] > 1:
            steps.append(options["repeats"])
        return compare_plan(*inputs, **options)

    return compare


def test_without_a_text_it_is_the_prose(run, folder, plan_file):
    content = run("compare", folder, "--plan", plan_file, "--length", 64, "--scored", 9)
    assert content["provenance"]["sources"][0]["name"] == "prose of the standard library"


def test_after_ctrl_c_finished_texts_are_in_the_result(fail, words, text, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[500:])
    calls = []

    def stop(*inputs, **options):
        calls.append(inputs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare_plan(*inputs, **options)

    monkeypatch.setattr("convbasis.cli.compare.compare_plan", stop)
    place = tmp_path / "r.json"
    line = fail(*words, "--text", other, "--json", place, code=130)
    assert line == "interrupted; 1 of 2 texts are in the result"
    assert '"columns": ["figure", "random.txt"]' in place.read_text()
    place.unlink()
    calls[:] = [None]
    assert fail(*words, "--json", place, code=130) == "interrupted; no text was done"
    assert not place.exists()


def test_input_that_cannot_be_used(fail, words, tmp_path, loaded, folder):
    assert "there is no file" in fail(*words, "--plan", tmp_path / "none")
    (tmp_path / "bad.json").write_text("[]")
    assert "is not a plan" in fail(*words, "--plan", tmp_path / "bad.json")
    assert "scored=200" in fail(*words, "--scored", 200)
    other = tiny_models.plan_for(tiny_models.build(num_hidden_layers=1))
    other.save(tmp_path / "other.json")
    assert "the plan is for" in fail(*words, "--plan", tmp_path / "other.json")
    assert "there is no file" in fail(*words, "--text", tmp_path / "none.txt")
