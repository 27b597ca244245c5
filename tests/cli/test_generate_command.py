"""convbasis generate: the text is the model's own, every option, input that cannot be used."""

import json

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import convbasis as cb
from convbasis.cli.app import app
from convbasis.integrations.generate import generate


@pytest.fixture(scope="module")
def prompt(text, tmp_path_factory):
    place = tmp_path_factory.mktemp("prompts") / "prompt.txt"
    place.write_text(text.read_text()[:150])
    return place


@pytest.fixture
def words(folder, prompt):
    return ["generate", folder, "--prompt-file", prompt, "--max-new-tokens", 12]


@pytest.fixture(scope="module")
def expected(folder, loaded, prompt):
    """What the model itself goes on with."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(prompt.read_text(), return_tensors="pt").input_ids
    assert ids.shape == (1, 150)
    with torch.no_grad():
        for _ in range(12):
            following = loaded(ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, following], 1)
    return tokenizer.decode(ids[0, 150:], skip_special_tokens=True)


def test_exact_text_goes_to_standard_output_alone(words, expected):
    result = CliRunner().invoke(app, [*map(str, words), "--exact"])
    assert result.exit_code == 0, result.output
    assert result.stdout == expected + "\n"
    assert "time to first token, s" in result.stderr
    assert "heads approximated" not in result.stderr


def test_every_option_changes_the_result(run, words, plan_file, expected):
    exact = dict(run(*words, "--exact")["summary"])
    assert exact["text"] == expected
    assert (exact["prompt, tokens"], exact["new tokens"]) == (150, 12)
    assert 0 < exact["time to first token, s"] <= exact["whole time, s"]
    plan = ["--plan", plan_file]
    planned = dict(run(*words, *plan)["summary"])
    assert planned["prefills"] == 1
    # Nothing is within the tiny tolerance of this plan: every head falls back.
    assert (planned["heads exact"], planned["heads fallen back"]) == (2, 6)
    short = dict(run(*words, *plan, "--min-length", 150)["summary"])
    assert (short["heads exact"], short["heads fallen back"]) == (8, 0)
    both = dict(run(*words, *plan, "--against-exact")["summary"])
    assert both["first tokens that are the same"] == "12 of 12"
    assert both["time to first token, exact, s"] > 0
    assert both["first token, times faster"] == pytest.approx(
        both["time to first token, exact, s"] / both["time to first token, s"], rel=0.01
    )
    fewer = dict(run(*words, "--exact", "--max-new-tokens", 3)["summary"])
    assert fewer["text"] == expected[:3]


def test_a_plan_that_leaves_things_out_changes_the_text(run, words, plan_file, tmp_path):
    """And what was the same is counted up to the first difference."""
    content = json.loads(plan_file.read_text())
    content["tolerance"] = 100.0
    place = tmp_path / "loose.json"
    place.write_text(json.dumps(content))
    found = dict(run(*words, "--plan", place, "--against-exact")["summary"])
    assert found["heads approximated"] == 6
    same, _, of = found["first tokens that are the same"].partition(" of ")
    assert of == "12"
    assert 0 <= int(same) < 12


def test_after_ctrl_c_the_text_so_far_is_printed(words, expected, monkeypatch):
    def stop(model, ids, most, progress):
        def tell(new):
            progress(new)
            if len(new) == 5:
                raise KeyboardInterrupt

        return generate(model, ids, most, tell)

    monkeypatch.setattr("convbasis.cli.generate.generate", stop)
    result = CliRunner().invoke(app, [*map(str, words), "--exact"])
    assert result.exit_code == 130
    assert result.stdout == expected[:5] + "\n"
    assert "interrupted; 5 of 12 tokens are printed" in result.stderr
    result = CliRunner().invoke(app, [*map(str, words), "--exact", "--json", "-"])
    assert (result.exit_code, result.stdout) == (130, "")


def test_the_prompt_is_another_text(run, folder, tmp_path, expected):
    place = tmp_path / "other.txt"
    place.write_text("abc")
    content = run("generate", folder, "--prompt-file", place, "--exact", "--max-new-tokens", 12)
    assert dict(content["summary"])["prompt, tokens"] == 3
    assert content["provenance"]["sources"][0]["name"] == "other.txt"


def test_a_prompt_without_tokens_is_refused(fail, words, monkeypatch):
    monkeypatch.setattr("convbasis.cli.generate.read_text", lambda path: ("prompt", ""))
    assert "has no tokens; a prompt is wanted" in fail(*words, "--exact")


def test_input_that_cannot_be_used(fail, words, plan_file, tmp_path, folder):
    for options in (
        [],
        ["--plan", plan_file, "--exact"],
        ["--exact", "--against-exact"],
        ["--exact", "--min-length", 0],
    ):
        result = CliRunner().invoke(app, [*map(str, words), *map(str, options)])
        assert result.exit_code == 2
        assert "Error:" in result.stderr
    (tmp_path / "empty").write_text("")
    assert "is empty" in fail("generate", folder, "--exact", "--prompt-file", tmp_path / "empty")
    assert "4096 positions" in fail(*words, "--exact", "--max-new-tokens", 4000)
    assert "there is no file" in fail(*words, "--plan", tmp_path / "none")
    other = cb.Plan.load(plan_file)
    content = json.loads(plan_file.read_text())
    content["model"]["head_dim"] = 2 * other.model.head_dim
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert "the plan is for" in fail(*words, "--plan", tmp_path / "other.json")
