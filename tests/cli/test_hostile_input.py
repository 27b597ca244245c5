"""Hostile input at the level of commands: one clear line, the exit code, nothing half written."""

import io
import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest

PLANNED = ("compare", "generate")


class Trap:
    """What opens a file when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


@pytest.fixture
def sprung(tmp_path_factory):
    """The file that is there if anything was unpickled."""
    return tmp_path_factory.mktemp("trap") / "sprung"


@pytest.fixture
def words(folder, text, plan_file, tmp_path):
    """Every command on a model, with all its outputs in one empty folder."""
    out = tmp_path / "out"
    out.mkdir()

    def of(command, model=folder, plan=plan_file, words=text):
        own = {
            "analyze": ["--text", words, "--length", 64, "--report", out / "r.html"],
            "calibrate": ["--text", words, "--length", 64, "-o", out / "p", "--report", out / "r.html"],
            "compare": ["--plan", plan, "--text", words, "--length", 64, "--report", out / "r.html"],
            "generate": ["--plan", plan, "--prompt-file", words],
        }
        return [command, model, *own[command], "--json", out / "r.json"]

    yield of
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("command", PLANNED)
@pytest.mark.parametrize(
    ("version", "message"),
    [(2, "version is 2"), ("1", "version is '1'"), (None, "version is None")],
)
def test_a_plan_of_another_version(fail, words, plan_file, tmp_path, command, version, message):
    content = json.loads(plan_file.read_text())
    content["version"] = version
    (tmp_path / "other.json").write_text(json.dumps(content))
    line = fail(*words(command, plan=tmp_path / "other.json"))
    assert message in line
    assert "other.json" in line


@pytest.mark.parametrize("command", ["analyze", "calibrate", "compare", "generate"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\0\0\1" * 100, "is a binary file"),
        ("naïve ".encode("latin-1") * 100, "is not UTF-8 text"),
        (b"", "is empty"),
    ],
)
def test_a_text_that_is_none(fail, words, tmp_path, command, content, message):
    (tmp_path / "book.txt").write_bytes(content)
    line = fail(*words(command, words=tmp_path / "book.txt"))
    assert message in line
    assert "book.txt" in line


def as_folder(folder, place, trap):
    copy = shutil.copytree(folder, place / "model")
    with zipfile.ZipFile(copy / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(trap))
    return copy


def as_bin(folder, place, trap):
    copy = shutil.copytree(folder, place / "model")
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(trap))
    return copy


def as_gguf(folder, place, trap):
    (place / "model.gguf").write_bytes(pickle.dumps(trap))
    return place / "model.gguf"


@pytest.mark.parametrize("command", ["analyze", "calibrate", "compare", "generate"])
@pytest.mark.parametrize(
    ("disguise", "message"),
    [
        (as_folder, "not a safetensors file, in spite of its name"),
        (as_bin, "can run code when it is read"),
        (as_gguf, "is not a GGUF file, in spite of its name"),
    ],
)
def test_a_pickle_disguised_as_a_model(
    fail, words, folder, tmp_path, sprung, command, disguise, message
):
    assert message in fail(*words(command, model=disguise(folder, tmp_path, Trap(sprung))))
    assert not sprung.exists()


def object_array(trap):
    """What NumPy writes for objects: a header of its own, then a pickle."""
    file = io.BytesIO()
    np.save(file, np.array([[trap]], dtype=object), allow_pickle=True)
    return file.getvalue()


def archive_of(trap):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m.npy", object_array(trap))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("m.npy", pickle.dumps),
        ("m.npy", object_array),
        ("m.npz", pickle.dumps),
        ("m.npz", archive_of),
        ("m.safetensors", pickle.dumps),
    ],
    ids=["npy", "npy of objects", "npz", "npz of objects", "safetensors"],
)
def test_a_pickle_disguised_as_an_array(fail, tmp_path, sprung, name, make):
    (tmp_path / name).write_bytes(make(Trap(sprung)))
    outputs = ["-o", tmp_path / "b", "--json", tmp_path / "r.json", "--report", tmp_path / "r.html"]
    line = fail("decompose", tmp_path / name, *outputs)
    assert name in line
    assert not sprung.exists()
    assert [place.name for place in tmp_path.iterdir()] == [name]


def test_a_report_of_another_version_or_none(fail, tmp_path, sprung):
    for content in (b'{"format": "convbasis.report", "version": 2}', pickle.dumps(Trap(sprung)), b""):
        (tmp_path / "r.json").write_bytes(content)
        line = fail("report", tmp_path / "r.json", "-o", tmp_path / "r.html", "--json", tmp_path / "t")
        assert "r.json" in line
        assert [place.name for place in tmp_path.iterdir()] == ["r.json"]
    assert not sprung.exists()
