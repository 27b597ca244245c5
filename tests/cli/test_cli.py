"""The command line: the demo end to end, options, messages, exit codes."""

import json
import re
import struct
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import convbasis as cb
from convbasis.cli.app import app
from convbasis.integrations.capture import CapturedLayer
from convbasis.report.figures import (
    Curve,
    Series,
    Triple,
    attention_figure,
    error_figure,
    pareto_figure,
    times_figure,
)
from convbasis.timing import interleaved_medians

runner = CliRunner()


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_version():
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == cb.__version__


def test_help_names_the_commands():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.stdout


def test_module_runs_too():
    done = subprocess.run(
        [sys.executable, "-m", "convbasis.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == cb.__version__


@pytest.fixture
def loaded(monkeypatch, smollm2):
    """The demo takes the model that is loaded already."""
    loads = []

    def load():
        loads.append(1)
        return smollm2

    monkeypatch.setattr("convbasis.cli.demo.load_smollm2", load)
    return loads


def test_errors_are_one_line_and_exit_code_1(tmp_path, monkeypatch, loaded):
    monkeypatch.setenv("CONVBASIS_CACHE", str(tmp_path / "cache"))
    for options in (["--layers", "two"], ["--layers", "99"], ["--text", str(tmp_path / "none")]):
        result = runner.invoke(
            app, ["demo", "--length", "64", "--output", str(tmp_path / "o"), *options]
        )
        assert result.exit_code == 1
        message = result.output[result.output.index("error:") :]
        assert len(message.strip().splitlines()) == 1
        assert "Traceback" not in result.output


def test_wrong_options_are_exit_code_2(tmp_path):
    assert runner.invoke(app, ["demo", "--length", "3"]).exit_code == 2
    assert runner.invoke(app, ["nothing"]).exit_code == 2


def test_demo_end_to_end(tmp_path, monkeypatch, loaded):
    monkeypatch.setenv("CONVBASIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("convbasis.cli.demo._PLANTED_LENGTHS", (256, 512))
    for _ in range(2):  # the second time captures come from the cache
        words = ["demo", "--length", "128", "--layers", "3,14", "--output", str(tmp_path / "out")]
        result = runner.invoke(app, [*words, "--json", str(tmp_path / "result.json")])
        assert result.exit_code == 0, result.output
    assert len(loaded) == 1
    assert "Attention: conv basis against exact softmax" in result.output
    assert re.search(r"layer 14\s*│ recovered\s*│\s*128", result.output)
    width, height = png_size(tmp_path / "out" / "attention.png")
    assert width > 1000
    assert height > 500
    result = json.loads((tmp_path / "result.json").read_text())
    assert [len(table["rows"]) for table in result["tables"]] == [2 + 4 * 2, 2]
    assert len(result["charts"][0]["lines"]) == 3
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["input"], row["segments"], row["k"]): row for row in content["attention"]}
    assert len(content["attention"]) == 2 + 4 * 2
    assert all(row["median_error"] < 1e-5 for key, row in rows.items() if key[0] == "planted")
    assert rows[("layer 14", "recovered", 16)]["worst_error"] > 0.05
    assert all(row["speed_against_sdpa"] > 0 for row in rows.values())
    assert content["decomposition"]["14"]["0.0"] == 128
    curves = {curve["label"]: curve for curve in content["curves"]}
    assert curves["planted, recovered"]["error"][-1] < 1e-5
    assert curves["real, recovered"]["error"][0] > 0.1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["attention.png", "results.json"]


def test_text_and_seed_change_what_the_demo_finds(tmp_path, monkeypatch):
    """On heads made of the letters themselves, in place of a model's."""

    def ids_of(tokenizer, content, count):
        return torch.tensor([[ord(letter) for letter in content[:count]]])

    def layers_of(load, name, ids, layers, progress):
        heads = ids[:, None, :, None].double().add(torch.arange(1.0, 65.0)).sin().float()
        return {number: CapturedLayer(heads, heads, heads, 0.125) for number in layers}

    monkeypatch.setattr("convbasis.cli.demo.load_tokenizer", lambda: None)
    monkeypatch.setattr("convbasis.cli.demo.token_ids", ids_of)
    monkeypatch.setattr("convbasis.cli.demo.cached_layers", layers_of)
    monkeypatch.setattr("convbasis.cli.demo.attention_figure", lambda *_: None)
    monkeypatch.setattr("convbasis.cli.demo._PLANTED_LENGTHS", (256,))
    monkeypatch.setattr("convbasis.cli.demo._CURVE", (16,))

    texts = [tmp_path / "fox.txt", tmp_path / "lazy.txt"]
    texts[0].write_text("the quick brown fox jumps over the lazy dog\n" * 12)
    texts[1].write_text("all work and no play makes a dull toy\n" * 12)

    def errors(text, seed):
        words = ["demo", "--length", "64", "--layers", "3", "--output", str(tmp_path)]
        done = runner.invoke(app, [*words, "--text", str(text), "--seed", str(seed)])
        assert done.exit_code == 0, done.output
        rows = json.loads((tmp_path / "results.json").read_text())["attention"]
        return [
            [row["median_error"] for row in rows if row["input"] == x] for x in ("planted", "layer 3")
        ]

    planted, real = errors(texts[0], 0)
    seeded = errors(texts[0], 1)
    assert seeded[0] != planted
    assert seeded[1] == real
    other = errors(texts[1], 0)
    assert other[0] == planted
    assert other[1] != real


def test_figures_are_drawn_and_not_left_half_written(tmp_path, monkeypatch):
    curves = [Curve("a", [1, 2, 4], [1.0, 0.1, 0.0])]
    matrix = torch.rand(8, 8).tril()
    attention_figure([Triple("t", matrix, matrix * 0.9)], curves, tmp_path / "one.png")
    error_figure({"left": curves, "right": curves}, tmp_path / "two.png")
    assert png_size(tmp_path / "one.png") != png_size(tmp_path / "two.png")
    before = (tmp_path / "two.png").read_bytes()

    def fail(self, part, **options):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        error_figure({"left": curves}, tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_interleaved_medians_run_in_turn():
    order = []
    medians = interleaved_medians(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3
    )
    assert order == ["a", "b"] * 4
    assert set(medians) == {"a", "b"}
    assert all(m >= 0 for m in medians.values())


class TestTune:
    def test_it_measures_writes_and_says_where(self, tmp_path):
        path = tmp_path / "rates.json"
        command = [
            "tune",
            "--output",
            str(path),
            "--repeats",
            "1",
            "--longest",
            "256",
            "--threads",
            "1",
        ]
        result = runner.invoke(app, command)
        assert result.exit_code == 0, result.output
        assert list(json.loads(path.read_text())["rates"]) == ["cpu-1"]
        assert "rates.json" in result.output.replace("\n", "")
        assert "typical error" in result.output

    def test_an_unusable_device_is_one_line(self, tmp_path):
        command = ["tune", "--device", "nowhere", "--output", str(tmp_path / "rates.json")]
        result = runner.invoke(app, command)
        assert result.exit_code == 1
        assert "device 'nowhere' cannot be used" in result.output
        assert not (tmp_path / "rates.json").exists()


def test_times_are_drawn_with_what_was_extrapolated(tmp_path):
    measured = Series("ours", [(10, 1.0), (100, 10.0)])
    partly = Series("theirs", [(10, 1.0), (100, 100.0), (1000, 1e4)], extrapolated_from=1000)
    times_figure([measured, partly], "title", tmp_path / "times.png")
    assert min(png_size(tmp_path / "times.png")) > 300


def test_points_of_plans_are_drawn(tmp_path):
    points = {"plans": [(0.3, 0.002), (0.5, 0.001)], "one setting for all heads": [(0.2, 0.03)]}
    pareto_figure(points, "title", tmp_path / "pareto.png")
    assert min(png_size(tmp_path / "pareto.png")) > 300
