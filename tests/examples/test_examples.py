"""The examples run, at small sizes, and print what they promise."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def run(capsys):
    """Run an example with options and return what it prints."""

    def run(name, *options):
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main([str(option) for option in options])
        return capsys.readouterr().out

    return run


def number(pattern, text):
    """Return the number that a pattern captures."""
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found.group(1).replace(",", ""))


def test_every_example_says_what_it_shows_and_how_to_run_it():
    for path in FOLDER.glob("*.py"):
        text = path.read_text()
        assert text.startswith('"""')
        assert f"python examples/{path.name}" in text.split('"""')[1]


class TestDecomposeMatrix:
    def test_the_matrix_that_is_made(self, run):
        out = run("decompose_matrix", "-n", 200, "--segments", 3)
        rows = [line.split() for line in out.splitlines()[2:7]]
        assert [row[1] for row in rows][:3] == ["3", "3", "3"]
        assert float(rows[0][2]) == 0.0
        assert number(r"k = (\d+)", out) == 3
        assert number(r"difference (\S+),", out) < 1e-12

    def test_noise_needs_a_tolerance(self, run):
        out = run("decompose_matrix", "-n", 200, "--segments", 3, "--noise", 1e-3)
        assert out.splitlines()[2].split()[1] == "200"
        assert number(r"within the noise \(0.001\): k = (\d+)", out) == 3

    def test_a_file(self, run, tmp_path):
        np.savez(tmp_path / "m.npz", one=np.tri(50), other=np.eye(4))
        out = run("decompose_matrix", "--file", tmp_path / "m.npz", "--key", "one")
        assert out.startswith("50 x 50")
        assert number(r"k = (\d+)", out) == 1


def test_planted_attention(run):
    out = run("planted_attention", "--tokens", 600, "--bases", 3, "--head-dim", 16)
    planted, random = (line.split() for line in out.splitlines()[2:4])
    assert planted[:2] == ["planted", "3"]
    assert float(planted[2]) < 1e-5
    assert float(planted[3]) > 0.1
    assert random[0] == "random"
    assert float(random[2]) > 0.3
    assert "planted segments found: all" in out


def test_structured_operator(run):
    out = run("structured_operator", "-n", 300)
    assert number(r"dense solution: .* difference (\S+)", out) < 1e-6
    as_it_is = number(r"output as it is: +(\S+)", out)
    assert number(r"pulses found: +(\S+)", out) < 0.2 * as_it_is
    assert "dense solution" not in run("structured_operator", "-n", 300, "--no-check")
    damped = run("structured_operator", "-n", 300, "--damp", 3.0)
    assert number(r"pulses found: +(\S+)", damped) > number(r"pulses found: +(\S+)", out)
    noisy = run("structured_operator", "-n", 300, "--noise", 0.5)
    assert number(r"pulses found: +(\S+)", noisy) > number(r"pulses found: +(\S+)", out)


@pytest.mark.parametrize(("delay", "gain"), [(7, 0.5), (11, -0.4)])
def test_filter_bank(run, delay, gain):
    options = ("--points", 6000, "--period", 24, "--echo-delay", delay, "--echo-gain", gain)
    out = run("filter_bank", *options)
    assert number(r"echo: delay (\d+)", out) == delay
    assert abs(number(r"gain (\S+) \(", out) - gain) < 0.08
    errors = {line.split()[0]: line.split()[1:] for line in out.splitlines()[3:6]}
    assert set(errors) == {"dry", "trend", "season"}
    for before, behind in errors.values():
        assert float(behind) < min(0.2, 0.5 * float(before))
    assert number(r"first half by (\S+)", out) < 1e-9
    louder = run("filter_bank", *options, "--noise", 1.0)
    season = [line.split()[2] for line in louder.splitlines() if line.split()[0] == "season"]
    assert float(season[0]) > float(errors["season"][1])


def test_pretrained_plan(run, monkeypatch, smollm2, tmp_path):
    # A hand-made plan: at so few tokens nothing that calibration measures pays.
    import convbasis as cb
    from convbasis.plan import HeadPlan, HeadSetting, ModelShape

    shape = ModelShape.of(smollm2.model)
    head = HeadPlan(HeadSetting(window=32, columns=8), error=0.1, cost=0.5)
    heads = [[head] * shape.heads] * shape.layers
    cb.Plan(shape, "0" * 64, 0.2, 96, 64, heads).save(tmp_path / "plan.json")
    monkeypatch.setattr("convbasis.integrations.smollm2.load_smollm2", lambda: smollm2)
    options = ("--prompt", 128, "--new-tokens", 3, "--plan", tmp_path / "plan.json")
    out = run("pretrained_plan", *options)
    assert "270 of 270 heads approximated" in out
    total = sum(
        number(rf"(\d+) {what}", out) for what in ("approximated,", "exact by", "computed again")
    )
    assert total == 270
    assert 0.0 <= number(r"exact model (\S+) nats", out) < 1.0
    assert re.search(r"exact: '.*'\n +plan: '.*'", out)
    assert smollm2.model.config._attn_implementation != "conv_basis"


def test_pretrained_plan_calibrates(run, monkeypatch, smollm2, tmp_path):
    monkeypatch.setattr("convbasis.integrations.smollm2.load_smollm2", lambda: smollm2)
    (tmp_path / "text").write_text("The cat sat on the mat and looked at the other cat. " * 40)
    out = run(
        "pretrained_plan", "--calibrate", 64, "--prompt", 70, "--new-tokens", 2,
        "--plan", tmp_path / "plan.json", "--text", tmp_path / "text",
    )  # fmt: skip
    assert "calibrated at 64 tokens" in out
    assert "greedy tokens alike: the first" in out
    assert (tmp_path / "plan.json").exists()


def test_relative_attention(run):
    out = run("relative_attention", "--points", 900, "--period", 12, "--steps", 60)
    names = ("the last value", "one season ago", "attention, bias 0", "attention, bias learned")
    last, season, unlearned, learned = (number(rf"{name}: +(\S+)", out) for name in names)
    assert 0.25 < learned < 0.95 * min(last, season, unlearned)
    assert "strongest lags: 11, 23, 35" in out
    assert number(r"of 900 values: (\S+)", out) < 1e-9
