"""read_matrix: every format, every kind of damage, nothing executed."""

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import convbasis as cb
from convbasis.matrices import read_matrix

MATRIX = np.tril(np.arange(1.0, 26.0).reshape(5, 5))


def save(path: Path, array=MATRIX):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, matrix=array)
    else:
        save_file({"matrix": torch.from_numpy(np.ascontiguousarray(array))}, path)
    return path


FORMATS = [".npy", ".npz", ".safetensors"]
every_format = pytest.mark.parametrize("suffix", FORMATS)


def one_line(error, path):
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert str(path) in text
    return text


@every_format
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_reads_what_was_written(tmp_path, suffix, dtype):
    found = read_matrix(save(tmp_path / f"m{suffix}", MATRIX.astype(dtype)))
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, torch.from_numpy(MATRIX.astype(dtype)))
    found += 1.0  # a copy, not the file
    assert torch.equal(read_matrix(tmp_path / f"m{suffix}"), found - 1.0)


@every_format
def test_integers_and_bools_become_float64(tmp_path, suffix):
    for array in (MATRIX.astype(np.int32), MATRIX > 0):
        found = read_matrix(str(save(tmp_path / f"m{suffix}", array)))
        assert found.dtype == torch.float64
        assert np.array_equal(found.numpy(), array)


def test_layouts_and_byte_orders_of_numpy(tmp_path):
    for array in (np.asfortranarray(MATRIX), MATRIX.astype(">f4")):
        np.save(tmp_path / "m.npy", array)
        assert np.array_equal(read_matrix(tmp_path / "m.npy").numpy(), MATRIX)


def test_bfloat16_of_safetensors_stays(tmp_path):
    save_file({"a": torch.eye(3, dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    assert read_matrix(tmp_path / "m.safetensors").dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_key_chooses_among_several(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    if suffix == ".npz":
        np.savez(path, a=MATRIX, b=2.0 * MATRIX)
    else:
        save_file({"a": torch.from_numpy(MATRIX), "b": torch.from_numpy(2.0 * MATRIX)}, path)
    assert np.array_equal(read_matrix(path, key="b").numpy(), 2.0 * MATRIX)
    with pytest.raises(cb.InputError, match=r"holds 2 arrays; give one of them as key: 'a', 'b'"):
        read_matrix(path)
    with pytest.raises(cb.InputError, match="has no array 'c'; it has 'a', 'b'"):
        read_matrix(path, "c")


def test_a_single_array_may_be_named(tmp_path):
    assert read_matrix(save(tmp_path / "m.npz"), "matrix").shape == (5, 5)
    with pytest.raises(cb.InputError, match=r"key='matrix'.*has no name"):
        read_matrix(save(tmp_path / "m.npy"), "matrix")


@every_format
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.98])
def test_truncated_files(tmp_path, suffix, part):
    path = save(tmp_path / f"m{suffix}", np.tril(np.random.default_rng(0).normal(size=(40, 40))))
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(cb.FileFormatError, match="damaged or not") as error:
        read_matrix(path)
    one_line(error, path)


def test_one_wrong_byte_in_an_npz(tmp_path):
    path = save(tmp_path / "m.npz")
    content = bytearray(path.read_bytes())
    content[100] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(cb.FileFormatError) as error:
        read_matrix(path)
    one_line(error, path)


class Trap:
    """Writes a file when somebody unpickles it."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.write_text, (self.target, "executed"))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_python_objects_are_refused_and_not_executed(tmp_path, suffix):
    array = np.array([[Trap(tmp_path / "trap"), None], [None, None]], dtype=object)
    path = save(tmp_path / f"m{suffix}", array)
    with pytest.raises(cb.FileFormatError) as error:
        read_matrix(path)
    assert "object" in one_line(error, path).lower()
    assert not (tmp_path / "trap").exists()


@every_format
def test_a_pickle_by_another_name_is_refused_and_not_executed(tmp_path, suffix):
    import pickle

    path = tmp_path / f"m{suffix}"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "trap")))
    with pytest.raises(cb.FileFormatError) as error:
        read_matrix(path)
    one_line(error, path)
    assert not (tmp_path / "trap").exists()


def test_a_pickle_inside_an_npz_is_no_array(tmp_path):
    import pickle

    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("matrix.npy", pickle.dumps(Trap(tmp_path / "trap")))
    with pytest.raises(cb.FileFormatError) as error:
        read_matrix(path)
    one_line(error, path)
    assert not (tmp_path / "trap").exists()


def test_a_header_that_claims_too_much_takes_no_memory(tmp_path):
    path = save(tmp_path / "m.npy")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(5, 5), }        ", b"(5000000, 5000000), }", 1)[: len(content)])
    with pytest.raises(cb.FileFormatError) as error:
        read_matrix(path)
    one_line(error, path)


def test_a_safetensors_header_that_claims_too_much(tmp_path):
    header = {"m": {"dtype": "F64", "shape": [4096, 4096], "data_offsets": [0, 8 * 4096**2]}}
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(cb.FileFormatError) as error:
        read_matrix(path)
    one_line(error, path)


@every_format
@pytest.mark.parametrize("shape", [(3, 4), (5,), (2, 3, 3), (0, 0)], ids=str)
def test_wrong_shapes(tmp_path, suffix, shape):
    path = save(tmp_path / f"m{suffix}", np.zeros(shape))
    with pytest.raises(cb.FileFormatError) as error:
        read_matrix(path)
    one_line(error, path)


@every_format
def test_complex_numbers(tmp_path, suffix):
    path = save(tmp_path / f"m{suffix}", np.eye(3).astype(np.complex64))
    with pytest.raises(cb.FileFormatError, match="complex64") as error:
        read_matrix(path)
    one_line(error, path)


def test_text_and_an_empty_archive(tmp_path):
    np.save(tmp_path / "m.npy", np.array([["a", "b"], ["c", "d"]]))
    with pytest.raises(cb.FileFormatError, match="dtype <U1"):
        read_matrix(tmp_path / "m.npy")
    np.savez(tmp_path / "m.npz")
    with pytest.raises(cb.FileFormatError, match="holds no array"):
        read_matrix(tmp_path / "m.npz")


def test_other_endings_and_missing_files(tmp_path):
    with pytest.raises(cb.FileFormatError, match=r"ends in '.pt'; a matrix is read from .npy, .npz"):
        read_matrix(tmp_path / "m.pt")
    with pytest.raises(cb.MissingPathError, match="there is no file"):
        read_matrix(tmp_path / "m.npy")
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    with pytest.raises(cb.MissingPathError, match="there is no file"):
        read_matrix(folder)
