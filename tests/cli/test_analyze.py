"""convbasis analyze: figures against plain attention, every option, going on after a stop."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import one_hot
from typer.testing import CliRunner

import convbasis as cb
from convbasis.cli.app import app
from convbasis.cli.interruption import checkpoint_of
from convbasis.integrations.capture import CapturedLayer, capture_layers
from convbasis.integrations.profile import TOLERANCES, lengths, profile, profile_layers
from convbasis.integrations.views import lag_bands
from convbasis.plan import HeadSetting
from convbasis.plan.ladder import default_ladder

pytestmark = pytest.mark.usefixtures("steady")
LADDER = (HeadSetting(8, 1, 0), HeadSetting(512))
COSTS = [0.25, 0.5]


@pytest.fixture(scope="module")
def given(loaded):
    ids = torch.randint(3, 60, (1, 256), generator=torch.Generator().manual_seed(0))
    return capture_layers(loaded, ids, [1])[1]


@pytest.fixture(scope="module")
def weights(given):
    """Exact attention weights ``(heads, n, n)``."""
    key = given.key[0].repeat_interleave(2, 0)
    logits = given.query[0] @ key.mT * given.scale
    above = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(above, -torch.inf).softmax(-1)


def test_heads_seen_from_near_are_means_of_weights(given, weights):
    found = profile(given, LADDER, COSTS, 0, True)
    names = one_hot(torch.arange(256) // 4).float()
    expected = names.t() @ weights @ names / 4
    for head, view in enumerate(found.seen):
        assert view.setting == 1  # its window is the whole text
        torch.testing.assert_close(torch.tensor(view.exact), expected[head], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(torch.tensor(view.approximate), torch.tensor(view.exact))
        sums = torch.tensor(view.exact).sum(-1)
        torch.testing.assert_close(sums, torch.ones(64), rtol=0, atol=1e-4)
    narrow = profile(given, LADDER[:1], COSTS[:1], 0, True).seen[0]
    assert torch.tensor(narrow.approximate)[63, :60].abs().max() < torch.tensor(narrow.exact).max()
    assert narrow.approximate != narrow.exact
    assert profile(given, LADDER, COSTS, 0, False).seen == []


def test_masses_and_lags_are_those_of_the_weights(given, weights):
    found = profile(given, LADDER, COSTS, 0, False)
    assert found.costs == COSTS
    sizes = lengths(256)
    assert sizes == (256, 32, 16)
    lag = torch.arange(256)[:, None] - torch.arange(256)
    near = (weights * ((lag >= 0) & (lag < sizes.near))).sum(-1).mean(-1)
    torch.testing.assert_close(torch.tensor(found.near), near, rtol=0.2, atol=0.02)
    far = 1 - near
    assert all(0 < mass <= rest + 0.1 for mass, rest in zip(found.columns, far.tolist(), strict=True))
    firsts = lag_bands(256)
    assert firsts[:3] == [0, 1, 2]
    assert firsts == sorted(set(firsts))
    assert firsts[-1] < 256
    at_zero = weights.diagonal(dim1=-2, dim2=-1).mean(-1)
    own = torch.tensor([row[0] for row in found.lag_weights])
    torch.testing.assert_close(own, at_zero, rtol=0.3, atol=0.02)


def test_a_head_that_looks_at_one_column_shows_it():
    n = 256
    query = torch.ones(1, 1, n, 4)
    key = torch.zeros(1, 1, n, 4)
    key[0, 0, 40] = 20.0
    value = torch.randn(1, 1, n, 4)
    found = profile(CapturedLayer(query, key, value, 1.0), LADDER, COSTS, 0, False)
    assert found.columns[0] > 0.6
    assert found.near[0] < 0.4
    # Two segments: everything before the column and the rest, each of one value at each lag.
    assert found.ranks[0][0] <= 3
    assert [row[0] for row in found.ranks] == sorted((row[0] for row in found.ranks), reverse=True)


def by_title(content, word):
    (found,) = [own for own in content["maps"] if word in own["title"]]
    return found["values"]


def test_a_report_of_all_heads(run, folder, text):
    content = run("analyze", folder, "--text", text, "--length", 128)
    suits = by_title(content, "suits")
    assert [len(row) for row in suits] == [4, 4]
    assert len(content["maps"]) == 4 + len(TOLERANCES)
    assert len(content["heads"]) == 8
    head = content["heads"][0]
    assert (head["layer"], head["head"]) == (0, 0)
    assert len(head["exact"]) == len(head["approximate"]) == 64
    assert len(head["lags"]) == len(head["lag_weights"])
    (line,) = content["charts"][0]["lines"]
    assert len(line["labels"]) == len(default_ladder(128))
    assert [line["name"] for line in content["charts"][1]["lines"]] == ["layer 0", "layer 1"]
    assert content["provenance"]["model"] == "tiny"
    assert content["provenance"]["sources"][0]["name"] == "random.txt"
    assert content["provenance"]["sources"][0]["tokens"] == 128
    assert dict(content["summary"])["tokens"] == 128


def test_every_option_changes_the_result(run, folder, text, tmp_path):
    words = ["analyze", folder, "--text", text, "--length", 128, "--layers", "1"]
    base = run(*words)
    base.pop("provenance")

    def changed(*options):
        found = run(*words, *options)
        found.pop("provenance")
        return found

    assert changed() == base
    assert by_title(base, "suits")[0] == [None] * 4
    other = changed("--layers", "0-1")
    assert by_title(other, "suits")[0] != [None] * 4
    assert changed("--length", 200) != base
    assert changed("--seed", 1) != base
    assert dict(base["summary"])["heads looked at"] == 4
    long = by_title(changed("--length", 900, "--tolerance", 0.9), "suits")[1]
    assert all(word.startswith("window") for word in long)
    strict = by_title(changed("--length", 900, "--tolerance", 1e-9), "suits")[1]
    assert strict == ["exact: none is good enough"] * 4
    prose = run("analyze", folder, "--length", 128, "--layers", "1")
    assert prose["provenance"]["sources"][0]["name"] == "prose of the standard library"


def test_three_layers_are_seen_from_near_and_all_have_kernels(run, save, tmp_path):
    content = run("analyze", save(tmp_path / "deep", num_hidden_layers=5), "--length", 64)
    assert [row.count(None) for row in by_title(content, "suits")] == [0] * 5
    near = {head["layer"] for head in content["heads"] if head["exact"] is not None}
    assert near == {0, 2, 4}
    for head in content["heads"]:
        assert (head["approximate"] is None) == (head["layer"] not in near)
        assert ("No picture of this layer" in head["caption"]) == (head["layer"] not in near)
    places = [(head["layer"], head["head"]) for head in content["heads"]]
    assert places == [(layer, head) for layer in range(5) for head in range(4)]
    assert len({tuple(head["lag_weights"]) for head in content["heads"]}) == 20
    assert len(content["charts"][1]["lines"]) == 3


def test_a_page_is_asked_for(run, folder, text, tmp_path, pages):
    run("analyze", folder, "--text", text, "--length", 64, "--report", tmp_path / "r.html")
    ((report, place),) = pages
    assert place == tmp_path / "r.html"
    assert len(report.heads) == 8


@pytest.mark.parametrize("stopped", [["costs"], ["costs", "0"]], ids=["costs", "a layer"])
def test_a_stopped_analysis_goes_on_and_gives_the_same(
    fail, run, folder, text, tmp_path, monkeypatch, stopped
):
    words = ["analyze", folder, "--text", text, "--length", 128]
    whole = run(*words)
    place = tmp_path / "r.json"
    real = profile
    calls = []

    def stop(*inputs):
        calls.append(inputs)
        if len(calls) == len(stopped):
            raise KeyboardInterrupt
        return real(*inputs)

    monkeypatch.setattr("convbasis.integrations.profile.profile", stop)
    line = fail(*words, "--json", place, code=130)
    assert str(checkpoint_of(place)) in line
    assert not place.exists()
    assert list(json.loads(checkpoint_of(place).read_text())["measured"]) == stopped

    def again(*_, **__):
        raise AssertionError("times are measured once")

    monkeypatch.setattr("convbasis.plan.ladder._seconds", again)
    assert CliRunner().invoke(app, [*map(str, words), "--json", str(place)]).exit_code == 0
    assert len(calls) == 3  # the stopped layer twice, no other again
    found = json.loads(place.read_text())
    found.pop("provenance"), whole.pop("provenance")
    assert found == whole
    assert list(tmp_path.iterdir()) == [place]


KILLED = """
import os, signal, sys
import transformers
import convbasis.plan.ladder as ladder
import convbasis.integrations.profile as profiling
from convbasis.cli.app import app

ladder._seconds = lambda run, *i, **o: 2.0 if o.get("is_causal") else 1.0
real, calls = profiling.profile, []
*words, first, second = sys.argv[1:]

def profile(*inputs):
    calls.append(inputs)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*inputs)

profiling.profile = profile
for last, output in ((1, first), (2, second)):
    child = os.fork()
    if child == 0:
        app([*words, "--json", output])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_after_a_kill_it_goes_on_and_gives_the_same(run, folder, text, tmp_path, monkeypatch):
    """Killed after the times, and after the first layer."""
    words = ["analyze", folder, "--text", text, "--length", 128]
    whole = run(*words)
    whole.pop("provenance")
    killed = [tmp_path / "after times.json", tmp_path / "after a layer.json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, *map(str, words), *map(str, killed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 2, done.stderr
    held = [list(json.loads(checkpoint_of(place).read_text())["measured"]) for place in killed]
    assert held == [["costs"], ["costs", "0"]]
    assert sorted(tmp_path.iterdir()) == sorted(map(checkpoint_of, killed))

    def again(*_, **__):
        raise AssertionError("times are measured once")

    monkeypatch.setattr("convbasis.plan.ladder._seconds", again)
    calls = []
    monkeypatch.setattr(
        "convbasis.integrations.profile.profile", lambda *i: calls.append(i) or profile(*i)
    )
    for place in killed:
        done = CliRunner().invoke(app, [*map(str, words), "--json", str(place)])
        assert done.exit_code == 0, done.output
        found = json.loads(place.read_text())
        found.pop("provenance")
        assert found == whole
    assert len(calls) == 2 + 1  # no layer that was measured is measured again
    assert sorted(tmp_path.iterdir()) == sorted(killed)


def test_input_that_cannot_be_used(fail, folder, text, loaded):
    assert "0 to 1" in fail("analyze", folder, "--text", text, "--length", 64, "--layers", "2")
    assert "1500 tokens; 2000 are wanted" in fail("analyze", folder, "--text", text, "--length", 2000)
    assert "tolerance=nan" in fail("analyze", folder, "--tolerance", "nan")
    assert "there is no folder" in fail("analyze", folder, "--json", "/no/such/place/r.json")
    with pytest.raises(cb.InputError, match="choose one or more of"):
        profile_layers(loaded, torch.zeros(1, 64, dtype=torch.int64), [2])
    with pytest.raises(cb.InputError, match="at least 64"):
        profile_layers(loaded, torch.zeros(1, 63, dtype=torch.int64), [0])


def test_a_layer_that_does_not_attend_through_the_interface(loaded, monkeypatch):
    monkeypatch.setattr("convbasis.integrations.profile.observe_layers", lambda *_: None)
    with pytest.raises(cb.InputError, match="layer 0 of the model does not attend through"):
        profile_layers(loaded, torch.zeros(1, 64, dtype=torch.int64), [0])
