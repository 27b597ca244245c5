"""convbasis calibrate: the plan, every option, and going on after Ctrl-C and after a kill."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import convbasis as cb
from convbasis.cli import app as commands
from convbasis.cli.app import app
from convbasis.cli.interruption import checkpoint_of

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
    assert plan("--tolerance", 1.0001 * worst, "--margin", 1).approximated == 8
    small = plan("--tolerance", 1.0001 * worst, "--margin", 0.01)
    assert max(head.error for head in heads(small)) <= 0.01 * small.tolerance < worst
    free = plan("--tolerance", 0.9, "--budget", 1e9)
    assert free.heads == base.heads
    assert free.predicted_kl > 0
    spared = plan("--tolerance", 0.9, "--budget", 0.5 * free.predicted_kl)
    assert spared.heads != base.heads
    assert spared.predicted_kl <= 0.5 * free.predicted_kl
    assert plan("--tolerance", 0.9, "--budget", 0, *longer).approximated == 0
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


def test_ctrl_c_while_times_are_measured(run, fail, words, tmp_path, monkeypatch):
    from convbasis.plan import ladder

    run(*words)
    plan = tmp_path / "plan.json"
    whole = plan.read_bytes()
    plan.unlink()
    steady, calls = ladder._seconds, []

    def stop(*inputs, **options):
        calls.append(inputs)
        if len(calls) == 20:
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
