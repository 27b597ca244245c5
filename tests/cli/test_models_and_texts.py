"""What people name: models of every kind that is read, and everything that is refused in one line."""

import json
import shutil
import zipfile

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, BertConfig, BertForMaskedLM, T5Config

import convbasis as cb
from convbasis.integrations.models import load_model
from convbasis.integrations.smollm2 import weights_file
from convbasis.integrations.texts import checked_ids, read_text, text_tokens


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def weights(place):
    return place / "model.safetensors"


def disguise(place):
    """What torch.save writes, under the name of a safetensors file."""
    with zipfile.ZipFile(weights(place), "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02c__builtin__\neval\n.")


def only_bin(place):
    weights(place).rename(place / "pytorch_model.bin")


def truncate(place):
    content = weights(place).read_bytes()
    weights(place).write_bytes(content[: len(content) // 2])


def lack_weights(place):
    kept = load_file(weights(place))
    kept.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(kept, weights(place), metadata={"format": "pt"})


def other_sizes(place):
    kept = load_file(weights(place))
    kept["model.norm.weight"] = torch.ones(7)
    save_file(kept, weights(place), metadata={"format": "pt"})


def no_tokenizer(place):
    (place / "tokenizer.json").unlink()


def damaged_tokenizer(place):
    (place / "tokenizer.json").write_text("{")


def damaged_config(place):
    (place / "config.json").write_text("{")


def own_code(place):
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (place / "config.json").write_text(json.dumps(config))
    (place / "mine.py").write_text(f"open({str(place / 'ran')!r}, 'w')\nclass Config: ...\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (disguise, "not a safetensors file, in spite of its name"),
        (only_bin, r"'pytorch_model.bin', a kind of file that can run code"),
        (truncate, "damaged"),
        (lambda place: weights(place).unlink(), "a folder without weights"),
        (lack_weights, r"lacks 1 of the model's weights, the first 'model.layers.1.self_attn.q_proj"),
        (other_sizes, "cannot be loaded"),
        (no_tokenizer, "has no tokenizer"),
        (damaged_tokenizer, "has no usable tokenizer"),
        (lambda place: (place / "config.json").unlink(), "has no config.json"),
        (damaged_config, "cannot be loaded"),
        (own_code, "cannot be loaded"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(copy, spoil, message):
    spoil(copy)
    with pytest.raises(cb.ConvBasisError, match=message) as caught:
        load_model(str(copy))
    assert "\n" not in str(caught.value)
    assert not (copy / "ran").exists()


def test_a_model_that_is_no_causal_one(tmp_path, folder):
    masked = BertForMaskedLM(
        BertConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16,
        )
    )  # fmt: skip
    both = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for name, model in (("masked", masked), ("both", both)):
        model.save_pretrained(tmp_path / name)
        shutil.copy(folder / "tokenizer.json", tmp_path / name)
        with pytest.raises(cb.InputError, match="not a causal language model"):
            load_model(str(tmp_path / name))


def test_a_folder_gives_the_model_that_was_saved(folder):
    found = load_model(str(folder))
    assert found.name == "tiny"
    assert not found.model.training
    ids = found.tokenizer("abc", return_tensors="pt").input_ids
    assert found.tokenizer.decode(ids[0]) == "abc"
    expected = tiny_models.build(max_position_embeddings=4096)(ids).logits
    torch.testing.assert_close(found.model(ids).logits, expected)


def test_files_that_are_no_models(tmp_path, folder):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(cb.FileFormatError, match="not a GGUF file, in spite of its name"):
        load_model(str(tmp_path / "model.gguf"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(cb.InputError, match="cannot be loaded"):
        load_model(str(tmp_path / "cut"))
    with pytest.raises(cb.InputError, match=r"a .safetensors file; give a GGUF file, or a folder"):
        load_model(str(weights(folder)))
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(cb.InputError, match="3 GGUF files; name one"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/such/folder", "~none/b", "a/b/c", "a b/c"])
def test_a_name_of_nothing_never_asks_the_network(name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(cb.MissingPathError, match="there is no folder or file"):
        load_model(name)


def test_a_hubs_name_asks_for_safetensors_alone(monkeypatch, loaded):
    asked = []

    def config(place, **options):
        assert options == {"trust_remote_code": False}
        asked.append(place)
        return loaded.config

    def model(place, **options):
        assert options["use_safetensors"] is True
        raise OSError("there is no file named model.safetensors\nand more")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", config)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", model)
    with pytest.raises(
        cb.InputError, match=r"cannot be loaded: there is no file named model.safet\S+$"
    ):
        load_model("owner/name")
    assert asked == ["owner/name"]


def test_a_gguf_file_alone_in_its_folder(monkeypatch, tmp_path):
    (tmp_path / "named.gguf").symlink_to(weights_file())
    asked = []

    class Model:
        def eval(self):
            return "model"

    def model(place, **options):
        asked.append((place, options["gguf_file"], options["local_files_only"]))
        return Model(), {"missing_keys": set()}

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", model)

    def tokenizer(place, **options):
        asked.append((place, options["gguf_file"], options["local_files_only"]))
        return "tokenizer"

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", tokenizer)
    assert load_model(str(tmp_path)) == ("model", "tokenizer", "named")
    assert asked == [(str(tmp_path), "named.gguf", True)] * 2


def test_smollm2_is_the_packaged_model(monkeypatch):
    monkeypatch.setattr("convbasis.integrations.models.load_smollm2", lambda: ("model", "tokenizer"))
    assert load_model("smollm2") == ("model", "tokenizer", "SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"text\0text", "binary file"),
        ("naïve".encode("latin-1"), r"not UTF-8 text: .* at byte 2; convert it"),
        ("text".encode("utf-16"), "binary file"),
        (None, "there is no file"),
        ("folder", "is a folder"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_line(tmp_path, content, message):
    place = tmp_path / "text"
    if content == "folder":
        place.mkdir()
    elif content is not None:
        place.write_bytes(content)
    with pytest.raises(cb.ConvBasisError, match=message):
        read_text(place)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffword".encode())
    assert read_text(tmp_path / "text") == ("text", "word")
    name, prose = read_text(None)
    assert name == "prose of the standard library"
    assert len(prose) > 100_000


def test_tokens_fit_text_and_model(folder, loaded):
    tokens = load_model(str(folder)).tokenizer
    assert text_tokens(loaded, tokens, "t", "abc", 3).tolist() == [[4, 5, 6]]
    with pytest.raises(cb.InputError, match="t: the text has 3 tokens; 4 are wanted"):
        text_tokens(loaded, tokens, "t", "abc", 4)
    with pytest.raises(cb.InputError, match="4097 tokens are more than the 4096 positions"):
        text_tokens(loaded, tokens, "t", "abc" * 5000, 4097)
    with pytest.raises(cb.InputError, match="gives token 60, but the model knows 60 only"):
        checked_ids(loaded, torch.tensor([[1, 60]]))
