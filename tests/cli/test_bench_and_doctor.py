"""convbasis bench, doctor, and the result of tune: contents and every option."""

import importlib

import pytest
import torch

import convbasis as cb
from convbasis.cli.bench import Timed, bench_report, crossover
from convbasis.cli.results import provenance
from convbasis.timing import interleaved_medians

SMALL = ["bench", "--lengths", "64,128", "--bases", "1,4", "--repeats", 1, "--head-dim", 8]


def test_bench_measures_every_method_at_every_length(run):
    content = run(*SMALL)
    ratios, times = content["tables"]
    assert ratios["columns"] == ["tokens", "conv basis, k = 1", "conv basis, k = 4", "hybrid"]
    assert [row[0] for row in ratios["rows"]] == [64, 128]
    assert times["columns"][1] == "SDPA"
    for ratio, time in zip(ratios["rows"], times["rows"], strict=True):
        assert ratio[1:] == pytest.approx([time[1] / own for own in time[2:]], rel=0.01)
    (chart,) = content["charts"]
    assert [line["name"] for line in chart["lines"]] == ratios["columns"][1:]
    assert chart["level"][0] == 1.0
    assert len(content["summary"]) == 4


def test_every_option_changes_what_is_measured(run, monkeypatch, tmp_path, pages):
    shapes, repeated = [], []

    def spy(functions, repeats):
        repeated.append(repeats)
        shapes.append((tuple(functions["hybrid"]().shape), torch.get_num_threads(), list(functions)))
        return interleaved_medians(functions, repeats=repeats)

    monkeypatch.setattr("convbasis.cli.bench.interleaved_medians", spy)

    def measured(*options):
        shapes.clear(), repeated.clear()
        run(*SMALL, *options)
        return list(shapes)

    before = torch.get_num_threads()
    names = ["SDPA", "conv basis, k = 1", "conv basis, k = 4", "hybrid"]
    assert measured() == [((1, 1, n, 8), before, names) for n in (64, 128)]
    assert repeated == [1, 1]
    assert [shape for shape, *_ in measured("--heads", 3)] == [(1, 3, n, 8) for n in (64, 128)]
    assert [shape for shape, *_ in measured("--head-dim", 16)] == [(1, 1, n, 16) for n in (64, 128)]
    assert [shape for shape, *_ in measured("--lengths", "80")] == [(1, 1, 80, 8)]
    assert [found for *_, found in measured("--bases", "2,100")] == [
        ["SDPA", "conv basis, k = 2", "hybrid"],
        ["SDPA", "conv basis, k = 2", "conv basis, k = 100", "hybrid"],
    ]
    assert {threads for _, threads, _ in measured("--threads", before + 1)} == {before + 1}
    assert torch.get_num_threads() == before
    measured("--repeats", 2)
    assert repeated == [2, 2]
    run(*SMALL, "--report", tmp_path / "r.html")
    assert [place for _, place in pages] == [tmp_path / "r.html"]


def test_after_ctrl_c_finished_lengths_are_in_the_result(fail, tmp_path, monkeypatch):
    calls = []

    def stop(functions, repeats):
        calls.append(functions)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return interleaved_medians(functions, repeats=repeats)

    monkeypatch.setattr("convbasis.cli.bench.interleaved_medians", stop)
    place = tmp_path / "r.json"
    line = fail(*SMALL, "--json", place, code=130)
    assert line == "interrupted; 1 of 2 lengths are in the result"
    assert '"rows": [[64, ' in place.read_text()
    place.unlink()
    calls[:] = [None]
    assert fail(*SMALL, "--json", place, code=130) == "interrupted; no length was done"
    assert not place.exists()


def test_crossover_lies_between_the_lengths_around_it():
    assert crossover([(100, 2.0), (200, 3.0)]) == 100
    assert crossover([(100, 0.5), (200, 0.9)]) is None
    assert crossover([(100, 0.5), (400, 2.0)]) == pytest.approx(200)
    assert crossover([(100, 2.0), (200, 0.5), (400, 0.5), (1600, 2.0)]) == pytest.approx(800)


def test_the_chart_marks_crossovers_between_measured_lengths():
    def timed(n, *seconds):
        return Timed(n, dict(zip(["SDPA", "always", "later", "never"], seconds, strict=True)))

    found = [timed(100, 1.0, 0.5, 2.0, 9.0), timed(400, 16.0, 0.5, 8.0, 99.0)]
    report = bench_report(found, 1, 8, provenance())
    assert report.charts[0].crossings == ((200.0, 1.0, "later: 200"),)
    told = dict(report.summary)
    assert told["later: faster from"] == "about 200 tokens"
    assert told["always: faster from"] == "100 tokens or fewer"
    assert told["never: faster from"] == "not among these lengths"


def test_bench_refuses_what_it_cannot_measure(fail):
    assert "lengths='10'" in fail("bench", "--lengths", "10")
    assert "bases='0'" in fail("bench", "--bases", "0")


def test_doctor_tells_what_is_here(run, monkeypatch, tmp_path):
    content = run("doctor")
    summary = dict(content["summary"])
    assert (summary["convbasis"], summary["torch"]) == (cb.__version__, torch.__version__)
    assert "the built-in ones" in summary["tuned rates"]
    extras, shapes = content["tables"]
    listed = [row[:2] for row in extras["rows"]]
    for pair in (["hf", "transformers"], ["report", "matplotlib"], ["report", "plotly"]):
        assert pair in listed
    assert ["scipy", "scipy"] in listed
    assert ["random", "scikit_learn"] in listed
    assert all(row[2] != "missing" for row in extras["rows"] if row[0] == "cli")
    backends = {tuple(row[:2]): row[2] for row in shapes["rows"]}
    assert backends[(512, 4)] == "direct"
    assert backends[(16384, 16)] == "partitioned"
    assert all("n = " in row[4] for row in shapes["rows"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert {row[2] for row in run("doctor")["tables"][0]["rows"]} == {"missing"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is damaged"),
        ('{"format": "convbasis-rates", "rates": {"cpu-99": %s}}', "has cpu-99, not cpu-"),
        ('{"format": "convbasis-rates", "rates": {"cpu-THREADS": %s}}', "cpu-THREADS of"),
    ],
)
def test_doctor_tells_which_rates_are_used(run, tmp_path, monkeypatch, content, told):
    threads = str(torch.get_num_threads())
    place = tmp_path / "rates.json"
    text = content.replace("%s", str([1e-9] * 10)).replace("THREADS", threads)
    place.write_text(text)
    monkeypatch.setenv("CONVBASIS_RATES", str(place))
    assert told.replace("THREADS", threads) in dict(run("doctor")["summary"])["tuned rates"]


def test_doctor_runs_on_the_device(run, fail):
    assert "device 'nowhere' cannot be used" in fail("doctor", "--device", "nowhere")
    assert "on cpu" in run("doctor", "--device", "cpu")["tables"][1]["title"]


def test_every_option_of_tune_changes_what_is_measured(run, monkeypatch, tmp_path):
    module = importlib.import_module("convbasis.tune")
    real, runs = module.conv_basis_fwd, []

    def spy(inputs, *choice, **options):
        runs.append(inputs.query.shape[-2])
        return real(inputs, *choice, **options)

    monkeypatch.setattr(module, "conv_basis_fwd", spy)
    monkeypatch.setattr(module, "fit_rates", lambda amounts, seconds: torch.ones(amounts.shape[1]))

    def measured(*options):
        runs.clear()
        words = ["tune", "--output", tmp_path / "rates.json", "--repeats", 1, "--longest", 256]
        count = dict(run(*words, *options)["summary"])["measurements"]
        assert len(runs) % count == 0
        return len(runs) // count, set(runs)

    assert measured() == (2, {256})  # the first run is no measurement
    assert measured("--repeats", 2) == (3, {256})
    assert measured("--longest", 600) == (2, {256, 512})


def test_tune_has_a_result(run, tmp_path):
    words = ["tune", "--output", tmp_path / "rates.json", "--repeats", 1, "--longest", 256]
    content = run(*words)
    assert dict(content["summary"])["measurements"] > 0
    assert len(content["tables"][0]["rows"]) == 10
