"""convbasis decompose: tables, JSON, files, and what it refuses."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import random_basis
from rich.console import Console

import convbasis as cb
from convbasis.cli.decompose import run_decompose
from convbasis.cli.results import screen
from convbasis.report.file import read_report


def planted(n=60, k=4, noise=0.0):
    generator = torch.Generator().manual_seed(3)
    kernels, starts = random_basis(n, k, generator)
    matrix = cb.ConvBasis(kernels, starts).to_dense()
    change = torch.rand(n, n, generator=generator, dtype=torch.float64) * 2 - 1
    return (matrix + noise * change.tril()).numpy(), starts.tolist()


def run(source, output=None, tol=0.0, key=None, json_output=None, page=None):
    """Return what the screen shows."""
    console = Console(file=io.StringIO(), width=150)
    run_decompose(source, output, tol, key, json_output, page, console)
    return console.file.getvalue()


def test_tells_the_size_and_the_segments(tmp_path):
    matrix, starts = planted()
    np.save(tmp_path / "m.npy", matrix)
    shown = run(tmp_path / "m.npy", json_output=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["format"], found["version"]) == ("convbasis.report", 1)
    summary = dict(found["summary"])
    assert summary["n"] == 60
    assert summary["k, bases of the matrix"] == 4
    assert summary["largest error of an entry"] == 0.0
    assert summary["bytes of the basis"] == 4 * 60 * 8 + 4 * 8
    assert summary["bytes of the dense matrix"] == 60 * 60 * 8
    segments, tolerances = found["tables"]
    assert [row[1] for row in segments["rows"]] == starts
    assert sum(row[2] for row in segments["rows"]) == 60 - starts[0]
    assert [row[0] for row in tolerances["rows"]] == [0.0, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1]
    for _, tol, k, ratio, largest, _ in tolerances["rows"]:
        basis = cb.decompose(matrix, tol=tol)
        assert k == basis.k
        assert ratio == pytest.approx((k * 60 * 8 + k * 8) / (60 * 60 * 8))
        assert largest <= tol
        assert largest == float(np.abs(np.asarray(basis) - matrix).max())
    assert "Conv basis of m.npy" in shown
    assert "What a tolerance saves" in shown
    assert all(f"{start:,}" in shown for start in starts)


def test_tolerance_changes_k_and_the_error(tmp_path):
    matrix, starts = planted(noise=1e-3)
    np.save(tmp_path / "m.npy", matrix)
    ks = {}
    for tol in (0.0, 1e-3):
        run(tmp_path / "m.npy", tol=tol, json_output=tmp_path / "found.json")
        summary = dict(json.loads((tmp_path / "found.json").read_text())["summary"])
        assert summary["tolerance of an entry"] == tol
        assert summary["largest error of an entry"] <= tol
        ks[tol] = summary["k, bases of the matrix"]
    assert ks == {0.0: 60, 1e-3: len(starts)}


def test_many_segments_are_cut_short(tmp_path):
    np.save(tmp_path / "m.npy", planted(k=40)[0])
    shown = run(tmp_path / "m.npy")
    assert "Segments: the first 16 of 40" in shown


def test_writes_the_basis(tmp_path):
    matrix, starts = planted()
    np.save(tmp_path / "m.npy", matrix)
    shown = run(tmp_path / "m.npy", output=tmp_path / "basis.safetensors")
    assert str(tmp_path / "basis.safetensors") in shown.replace("\n", "")
    basis = cb.ConvBasis.load(tmp_path / "basis.safetensors")
    assert basis.starts.tolist() == starts
    assert np.array_equal(np.asarray(basis), matrix)


def test_key_chooses_the_array(tmp_path):
    np.savez(tmp_path / "m.npz", a=planted()[0], b=planted(k=7)[0])
    with pytest.raises(cb.InputError, match="give one of them as key"):
        run(tmp_path / "m.npz")
    for key, k in (("a", 4), ("b", 7)):
        run(tmp_path / "m.npz", key=key, json_output=tmp_path / "found.json")
        summary = dict(json.loads((tmp_path / "found.json").read_text())["summary"])
        assert summary["k, bases of the matrix"] == k


def test_standard_output_gets_json_alone(tmp_path, capsys):
    np.save(tmp_path / "m.npy", planted()[0])
    stdout = Path("-")
    run_decompose(tmp_path / "m.npy", None, 0.0, None, stdout, None, screen(stdout))
    found = json.loads(capsys.readouterr().out)
    assert found["title"] == "Conv basis of m.npy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.npy"]


def test_a_page_and_what_it_is_made_of(tmp_path, pages):
    np.save(tmp_path / "m.npy", planted(noise=1e-3)[0])
    run(tmp_path / "m.npy", json_output=tmp_path / "found.json", page=tmp_path / "m.html")
    ((report, place),) = pages
    assert place == tmp_path / "m.html"
    assert read_report(tmp_path / "found.json") == report
    (line,) = report.charts[0].lines
    rows = report.tables[1].rows
    assert line.x == tuple(row[0] for row in rows[1:])
    assert line.y == tuple(row[3] for row in rows[1:])
    assert line.labels[0] == "k = 60"
    assert report.provenance.versions["numpy"] == np.__version__


@pytest.mark.parametrize("size", [1e-200, 1e300])
def test_errors_of_entries_whose_squares_are_none(tmp_path, size):
    np.save(tmp_path / "m.npy", size * planted(noise=1e-3)[0])
    run(tmp_path / "m.npy", tol=1e-3 * size, json_output=tmp_path / "found.json")
    summary = dict(json.loads((tmp_path / "found.json").read_text())["summary"])
    assert summary["k, bases of the matrix"] == 4
    assert 1e-5 < summary["relative error of the matrix"] < 1e-2


@pytest.mark.parametrize("matrix", [np.zeros((5, 5)), np.ones((1, 1), dtype=np.float32)], ids=str)
def test_the_smallest_and_the_zero_matrix(tmp_path, matrix):
    np.save(tmp_path / "m.npy", matrix)
    run(tmp_path / "m.npy", json_output=tmp_path / "found.json")
    summary = dict(json.loads((tmp_path / "found.json").read_text())["summary"])
    assert summary["k, bases of the matrix"] == int(matrix.any())
    assert summary["relative error of the matrix"] == 0.0


def test_names_are_shown_as_they_are(tmp_path):
    np.save(tmp_path / "[red]m.npy", planted()[0])
    assert "Conv basis of [red]m.npy" in run(tmp_path / "[red]m.npy")


@pytest.mark.parametrize(
    ("matrix", "tol", "message"),
    [
        (np.ones((3, 3)), 0.0, "not lower triangular"),
        (np.full((2, 2), np.nan), 0.0, "NaN"),
        (np.eye(3), -1.0, "tol=-1.0"),
    ],
)
def test_refusals_leave_no_file(tmp_path, matrix, tol, message):
    np.save(tmp_path / "m.npy", matrix)
    with pytest.raises(cb.InputError, match=message):
        run(tmp_path / "m.npy", tmp_path / "basis", tol, None, tmp_path / "found.json")
    assert [path.name for path in tmp_path.iterdir()] == ["m.npy"]


def test_no_folder_for_the_outputs(tmp_path, pages):
    np.save(tmp_path / "m.npy", planted()[0])
    for name in ("output", "json_output", "page"):
        with pytest.raises(cb.MissingPathError, match="there is no folder"):
            run(tmp_path / "m.npy", **{name: tmp_path / "nowhere" / "file"})
