"""A tiny model with a tokenizer in a folder, a text, a plan for it, and a way to run commands."""

import json

import pytest
import tiny_models
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from convbasis.cli.app import app
from convbasis.plan import HeadSetting

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW \n.,0"


def tokenizer():
    """One token for each character."""
    names = [*SPECIAL, *CHARACTERS]
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


@pytest.fixture(scope="session")
def save():
    """Write a model and its tokenizer into a folder."""

    def write(place, **changes):
        tiny_models.build(max_position_embeddings=4096, **changes).save_pretrained(place)
        tokenizer().save_pretrained(place)
        return place

    return write


@pytest.fixture(scope="session")
def folder(save, tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(3)
    letters = torch.randint(len(CHARACTERS), (1500,), generator=generator).tolist()
    place = tmp_path_factory.mktemp("texts") / "random.txt"
    place.write_text("".join(CHARACTERS[i] for i in letters))
    return place


@pytest.fixture(scope="session")
def plan_file(loaded, tmp_path_factory):
    """Little of everything, so that results differ from exact ones."""
    setting = HeadSetting(window=8, sinks=1, columns=0)
    plan = tiny_models.plan_for(loaded, setting, tolerance=1e-6, exact_heads=(0,))
    place = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.save(place)
    return place


@pytest.fixture
def run():
    """Run a command that must succeed; return its result as JSON."""

    def invoke(*words):
        done = CliRunner().invoke(app, [*map(str, words), "--json", "-"])
        assert done.exit_code == 0, done.output
        content = json.loads(done.stdout)
        assert (content["format"], content["version"]) == ("convbasis.report", 1)
        return content

    return invoke


@pytest.fixture
def fail():
    """Run a command that must fail; return its exit code and its only line of error."""

    def invoke(*words, code=1):
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == code, done.output
        lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "interr"))]
        assert len(lines) == 1, done.stderr
        assert "Traceback" not in done.output
        return lines[0]

    return invoke


@pytest.fixture
def steady(monkeypatch):
    """Times that are the same in every run: settings take half as long as exact attention."""

    def seconds(run, *inputs, **options):
        return 2.0 if options.get("is_causal") else 1.0

    monkeypatch.setattr("convbasis.plan.ladder._seconds", seconds)


@pytest.fixture
def pages(monkeypatch):
    """What is written as pages, without writing them: ``(report, path)`` each."""
    written = []
    monkeypatch.setattr("convbasis.cli.results.require_pages", lambda: None)
    monkeypatch.setattr("convbasis.cli.results.write_page", lambda *given: written.append(given))
    return written
