"""convbasis calibrate: the plan, every option, and going on after Ctrl-C and after a kill."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_models
import torch
from torch.nn.functional import one_hot
from typer.testing import CliRunner

import convbasis as cb
from convbasis.cli import app as commands
from convbasis.cli.app import app
from convbasis.cli.head_views import near_layers
from convbasis.cli.interruption import checkpoint_of
from convbasis.cli.words import in_words
from convbasis.integrations.capture import capture_layers
from convbasis.integrations.profile import profile
from convbasis.integrations.views import see_plan
from convbasis.plan import HeadPlan, HeadSetting, ModelShape
from convbasis.plan.ladder import default_ladder

pytestmark = pytest.mark.usefixtures("steady")


@pytest.fixture
def words(folder, text, tmp_path):
    place = tmp_path / "plan.json"
    return ["calibrate", folder, "--text", text, "--length", 400, "--budget", "inf", "-o", place]


@pytest.fixture
def no_times(monkeypatch):
    """Make measuring a time from now on a failure."""

    def refuse():
        def seconds(*_, **__):
            raise AssertionError("times are measured once")

        monkeypatch.setattr("convbasis.plan.ladder._seconds", seconds)

    return refuse


def measured(plan):
    """What the checkpoint of a plan holds."""
    return list(json.loads(checkpoint_of(plan).read_text())["measured"])


def heads(plan):
    return [head for layer in plan.heads for head in layer]


def test_a_plan_is_written_and_told(run, words, tmp_path):
    content = run(*words, "--tolerance", 0.9)
    plan = cb.Plan.load(tmp_path / "plan.json")
    assert plan.approximated == 8
    assert dict(content["summary"])["heads approximated"] == "8 of 8"
    assert dict(content["summary"])["predicted KL, nats"] is None
    assert [head.error for head in plan.heads[0]] == pytest.approx(
        content["maps"][1]["values"][0], 1e-4
    )
    assert content["maps"][2]["values"] == [[0.5] * 4] * 2
    assert any(str(tmp_path / "plan.json") in note for note in content["notes"])
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_every_option_changes_the_plan(run, words, tmp_path, text):
    def plan(*options):
        run(*words, *options)
        return cb.Plan.load(tmp_path / "plan.json")

    longer = ("--length", 900)  # than every window
    base = plan("--tolerance", 0.9)
    assert base == plan("--tolerance", 0.9)
    assert plan("--tolerance", 1e-9, *longer).approximated == 0
    worst = max(head.error for head in heads(base))
    assert plan("--tolerance", 2 * worst, "--margin", 1).approximated == 8
    assert plan("--tolerance", 2 * worst, "--margin", 0.4).approximated < 8
    # So near the tolerance it would be beyond it in many a prompt.
    assert plan("--tolerance", 1.0001 * worst, "--margin", 1).approximated < 8
    small = plan("--tolerance", 1.0001 * worst, "--margin", 0.01)
    assert max(head.error for head in heads(small)) <= 0.01 * small.tolerance < worst
    free = plan("--tolerance", 0.9, "--budget", 1e9)
    assert free.heads == base.heads
    assert free.predicted_kl > 0
    spared = plan("--tolerance", 0.9, "--budget", 0.5 * free.predicted_kl)
    assert spared.heads != base.heads
    assert spared.predicted_kl <= 0.5 * free.predicted_kl
    spared = plan("--tolerance", 0.9, "--budget", 0, *longer).heads
    assert all(head.setting is None for head in spared[0])  # a last layer reaches no later token
    assert plan("--tolerance", 0.9, "--length", 300).calibrated_length == 300
    errors = [head.error for head in heads(plan("--tolerance", 0.9, "--seed", 5))]
    assert errors != [head.error for head in heads(base)]
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[600:])
    both = plan("--tolerance", 0.9, "--text", other)
    assert both.texts_sha256 != base.texts_sha256
    moved = tmp_path / "moved.json"
    assert run(*words, "--output", moved)["title"] == "Plan for tiny"
    assert moved.is_file()


def test_its_defaults_are_those_of_the_function():
    command, function = (
        inspect.signature(call).parameters for call in (commands.calibrate, cb.calibrate)
    )
    for name in ("tolerance", "margin", "budget", "seed"):
        assert command[name].default == function[name].default


def test_without_a_text_it_is_the_prose(run, folder, tmp_path):
    content = run("calibrate", folder, "--length", 64, "-o", tmp_path / "p")
    assert content["provenance"]["sources"][0]["name"] == "prose of the standard library"


def test_error_against_cost_is_that_of_the_plans_measurements(run, words, tmp_path):
    words += ["--tolerance", 0.9, "--budget"]
    for budget in ("1e9", "inf"):
        content = run(*words, budget)
        (chart,) = content["charts"]
        plan = cb.Plan.load(tmp_path / "plan.json")
        settings, chosen = chart["lines"]
        assert len(settings["x"]) == len(default_ladder(400))
        assert set(settings["x"]) == {0.5}
        cost, error, name = chart["marked"]
        assert (cost, name) == (0.5, "this plan")
        flat = [head.error for head in heads(plan)]
        rms = (sum(e * e for e in flat) / len(flat)) ** 0.5
        expected = rms if budget == "inf" else plan.predicted_kl
        assert error == pytest.approx(expected, rel=1e-3)
        # The plan is one of the choices.
        assert any(error == pytest.approx(y, rel=1e-3) for y in chosen["y"])
        assert chosen["labels"][0].startswith("tolerance" if budget == "inf" else "budget")
        assert all(x <= 1 for x in chosen["x"])


def test_every_head_is_seen_beside_its_plan(run, words, tmp_path):
    # Some heads are left exact: their errors are above the tolerance, or near it.
    run(*words, "--tolerance", 0.9, "--length", 900)
    worst = max(head.error for head in heads(cb.Plan.load(tmp_path / "plan.json")))
    options = ("--tolerance", 0.99 * worst, "--margin", 1, "--length", 900)
    content = run(*words, *options)
    plan = cb.Plan.load(tmp_path / "plan.json")
    flat, views = heads(plan), content["heads"]
    assert [(view["layer"], view["head"]) for view in views] == [
        (i, j) for i in (0, 1) for j in range(4)
    ]
    for head, view in zip(flat, views, strict=True):
        assert (view["approximate"] is None) == (head.setting is None)
        assert in_words(head.setting, 900) in view["caption"].replace(
            "none, this head attends exactly", "exact"
        )
        assert len(view["exact"]) == 60
        assert view["tile"] == 15
        assert [sum(row) for row in view["exact"]] == pytest.approx([1.0] * 60, abs=1e-3)


def test_pictures_are_of_the_model_and_the_plan(loaded):
    """Beside dense attention, with a plan whose windows see everything or little, and an exact head."""
    ids = tiny_models.ids(128)
    shape = ModelShape.of(loaded)
    kinds = (HeadSetting(128), HeadSetting(8, 1, 0), None, HeadSetting(8, 1, 0))
    row = tuple(HeadPlan(kind) for kind in kinds)
    plan = cb.Plan(shape, "0" * 64, 0.3, 128, 0, (row, row))
    found = see_plan(loaded, ids, plan, near=[1], tiles=32)
    assert sorted(found) == [0, 1]
    assert found[0].heads == []
    given = capture_layers(loaded, ids, [1])[1]
    key = given.key[0].repeat_interleave(2, 0)
    above = torch.ones(128, 128, dtype=torch.bool).triu(1)
    weights = (given.query[0] @ key.mT * given.scale).masked_fill(above, -torch.inf).softmax(-1)
    names = one_hot(torch.arange(128) // 4).float()
    shares = names.t() @ weights @ names / 4
    seen = found[1].heads
    assert [head.setting for head in seen] == [0, 1, None, 1]
    for head, own in enumerate(seen):
        torch.testing.assert_close(torch.tensor(own.exact), shares[head], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(seen[0].approximate), shares[0], rtol=1e-3, atol=1e-5)
    assert seen[2].approximate is None
    lag = torch.arange(128)[:, None] - torch.arange(128)
    kept = (lag < 8) | (torch.arange(128) == 0)
    narrow = (weights[1] * kept).tril()
    narrow = names.t() @ (narrow / narrow.sum(-1, keepdim=True)) @ names / 4
    torch.testing.assert_close(torch.tensor(seen[1].approximate), narrow, rtol=1e-3, atol=1e-5)
    profiled = profile(given, kinds[:1], [0.5], 0, False)
    assert found[1].lag_weights == profiled.lag_weights


def test_layers_that_do_not_attend_through_the_interface_have_no_pictures(loaded, monkeypatch):
    monkeypatch.setattr("convbasis.integrations.views.observe_layers", lambda *_: None)
    with pytest.raises(cb.InputError, match=r"layers \[0, 1\] of the model do not attend through"):
        see_plan(loaded, tiny_models.ids(64), tiny_models.plan_for(loaded), near=[], tiles=8)


@pytest.mark.parametrize(
    ("layers", "heads_of_one", "near", "tiles"),
    [
        (2, 4, [0, 1], 64),
        (30, 9, list(range(30)), 32),
        (32, 32, [0, 4, 8, 12, 16, 19, 23, 27, 31], 32),
        (4, 400, [0], 32),
    ],
)
def test_pages_of_large_models_stay_small(layers, heads_of_one, near, tiles):
    assert near_layers(layers, heads_of_one) == (near, tiles)


def test_a_page_is_asked_for(run, words, tmp_path, pages):
    run(*words, "--report", tmp_path / "r.html")
    assert [place for _, place in pages] == [tmp_path / "r.html"]


@pytest.mark.parametrize(
    ("stopped", "held"),
    [(1, ["costs"]), (2, ["costs", "0.0"]), (3, ["costs", "0.0", "0.1"])],
    ids=["before errors", "between layers", "before sensitivities"],
)
def test_after_ctrl_c_it_goes_on_and_gives_the_same_bytes(
    run, fail, words, tmp_path, monkeypatch, no_times, stopped, held
):
    words += ["--budget", 1]
    run(*words)
    plan = tmp_path / "plan.json"
    whole = plan.read_bytes()
    plan.unlink()
    calls = []

    def stopping(real):
        def stop(*inputs, **options):
            calls.append(real)
            if len(calls) == stopped:
                raise KeyboardInterrupt
            return real(*inputs, **options)

        return stop

    for name in ("measure", "head_sensitivities"):
        whose = getattr(cb.integrations.calibrate, name)
        monkeypatch.setattr(f"convbasis.integrations.calibrate.{name}", stopping(whose))
    line = fail(*words, code=130)
    assert str(checkpoint_of(plan)) in line
    assert measured(plan) == held
    assert not plan.exists()
    no_times()
    run(*words)
    assert len(calls) == 4  # what was stopped twice, nothing else again
    assert plan.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [plan]


def test_ctrl_c_while_pictures_are_made_keeps_the_plan(
    run, fail, words, tmp_path, monkeypatch, no_times
):
    run(*words)
    plan, told = tmp_path / "plan.json", tmp_path / "told.json"
    whole = plan.read_bytes()
    plan.unlink()

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr("convbasis.cli.calibrate.see_plan", stop)
        assert str(checkpoint_of(plan)) in fail(*words, "--json", told, code=130)
    assert plan.read_bytes() == whole
    assert not told.exists()
    no_times()
    assert CliRunner().invoke(app, [*map(str, words), "--json", str(told)]).exit_code == 0
    assert len(json.loads(told.read_text())["heads"]) == 8
    assert sorted(tmp_path.iterdir()) == [plan, told]


def test_no_pictures_are_made_that_nobody_asked_for(words, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("no picture is wanted")

    monkeypatch.setattr("convbasis.cli.calibrate.see_plan", refuse)
    assert CliRunner().invoke(app, [*map(str, words)]).exit_code == 0


def test_ctrl_c_while_times_are_measured(run, fail, words, tmp_path, monkeypatch):
    from convbasis.plan import ladder

    run(*words)
    plan = tmp_path / "plan.json"
    whole = plan.read_bytes()
    plan.unlink()
    steady, calls = ladder._seconds, []

    def stop(*inputs, **options):
        calls.append(inputs)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return steady(*inputs, **options)

    monkeypatch.setattr("convbasis.plan.ladder._seconds", stop)
    assert fail(*words, code=130) == "interrupted"
    assert list(tmp_path.iterdir()) == []
    run(*words)
    assert plan.read_bytes() == whole


KILLED = """
import os, signal, sys
import transformers
import convbasis.plan.ladder as ladder
import convbasis.integrations.calibrate as calibrate
from convbasis.cli.app import app

ladder._seconds = lambda run, *i, **o: 2.0 if o.get("is_causal") else 1.0
real, calls = calibrate.measure, []
*words, first, second = sys.argv[1:]

def measure(*inputs):
    calls.append(inputs)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*inputs)

calibrate.measure = measure
for last, output in ((1, first), (2, second)):
    child = os.fork()
    if child == 0:
        app([*words, "-o", output])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_after_a_kill_it_goes_on_and_gives_the_same_bytes(run, words, tmp_path, no_times):
    """Killed after the times, and after the first layer."""
    run(*words)
    whole = (tmp_path / "plan.json").read_bytes()
    killed = [tmp_path / "after times.json", tmp_path / "after a layer.json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, *map(str, words[:-2]), *map(str, killed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 2, done.stderr
    assert [measured(plan) for plan in killed] == [["costs"], ["costs", "0.0"]]
    no_times()
    for plan in killed:
        run(*words, "-o", plan)
        assert plan.read_bytes() == whole
    assert sorted(tmp_path.iterdir()) == sorted([*killed, tmp_path / "plan.json"])


def test_another_runs_checkpoint_is_refused_and_kept(fail, words, tmp_path):
    place = checkpoint_of(tmp_path / "plan.json")
    place.write_text("{}")
    assert "no calibration checkpoint" in fail(*words)
    content = {"format": "convbasis.calibration", "seed": 3, "measured": {}}
    place.write_text(json.dumps(content))
    assert "is of another calibration" in fail(*words)
    assert place.is_file()


def test_a_disk_that_fills_up_keeps_what_was_measured(fail, words, tmp_path, monkeypatch):
    from convbasis import storage

    real, written = storage.write_beside, []

    def full(path, write):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr("convbasis.storage.write_beside", full)
    assert fail(*words, code=3) == "error: No space left on device"
    assert measured(tmp_path / "plan.json") == ["costs", "0.0"]
    assert list(tmp_path.iterdir()) == [checkpoint_of(tmp_path / "plan.json")]


def test_a_disk_that_is_full_at_the_end_keeps_what_was_measured(
    run, fail, words, tmp_path, monkeypatch, pages, no_times
):
    def full(report, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as changed:
        changed.setattr("convbasis.cli.results.write_page", full)
        line = fail(*words, "--report", tmp_path / "r.html", code=3)
    assert line == "error: No space left on device"
    assert measured(tmp_path / "plan.json") == ["costs", "0.0", "0.1"]
    no_times()
    run(*words, "--report", tmp_path / "r.html")
    assert [place for _, place in pages] == [tmp_path / "r.html"]
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tolerance", "0"], "tolerance=0 allows no approximation"),
        (["--tolerance", "nan"], "tolerance=nan"),
        (["--margin", "2"], "margin=2.0 is not in"),
        (["--budget", "-1"], "budget=-1.0 is not a finite number >= 0"),
        (["--length", "1501"], "random.txt: the text has 1500 tokens; 1501 are wanted"),
        (["--length", "5000"], "5000 tokens are more than the 4096 positions"),
        (["--text", "/no/such/file"], "there is no file '/no/such/file'"),
    ],
)
def test_input_that_cannot_be_used(fail, words, tmp_path, options, message):
    assert message in fail(*words, *options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_its_own_kind_is_named_in_one_line(words, tmp_path, folder, fail):
    copy = shutil.copytree(folder, tmp_path / "m")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "can run code when it is read" in fail("calibrate", copy, "-o", tmp_path / "p")
    assert CliRunner().invoke(app, ["calibrate", str(folder)]).exit_code == 2
