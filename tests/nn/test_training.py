"""Training as people do it: compiled, in bf16, with checkpointed activations, on two processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import convbasis as cb

ROOT = Path(__file__).parents[2]


def model(seed=0, **options):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        cb.nn.ConvBasisAttention(32, 4, num_kv_heads=2, segment_length=16, **options),
        torch.nn.LayerNorm(32),
        cb.nn.ConvBasisAttention(32, 4, num_kv_heads=2, segment_length=16, output_gate=True),
    )


def gradients(module, x, run=None):
    module.zero_grad()
    (module if run is None else run)(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


def test_compiled():
    module = model()
    x = torch.randn(2, 300, 32)
    plain = gradients(module, x)
    compiled = gradients(module, x, torch.compile(module, fullgraph=True, backend="aot_eager"))
    for one, other in zip(plain, compiled, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_autocast_to_bfloat16():
    module = model()
    x = torch.randn(2, 300, 32)
    plain = gradients(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    module.zero_grad()
    out.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    found, expected = (
        torch.cat([grad.flatten() for grad in grads])
        for grads in ([parameter.grad for parameter in module.parameters()], plain)
    )
    assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    module = model(dropout=0.2)
    x = torch.randn(2, 200, 32, requires_grad=True)
    torch.manual_seed(3)
    plain = gradients(module, x)
    torch.manual_seed(3)
    kept = gradients(module, x, lambda given: checkpoint(module, given, use_reentrant=use_reentrant))
    for one, other in zip(plain, kept, strict=True):
        assert torch.equal(one, other)


def test_distributed_data_parallel(tmp_path):
    """Two processes, each with half of the batch, get the gradients of one with all of it."""
    module = model()
    torch.manual_seed(7)
    x = torch.randn(4, 90, 32)
    expected = gradients(module, x)
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys, torch\n"
        "import torch.distributed as dist\n"
        "from torch.nn.parallel import DistributedDataParallel\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_training import model\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meeting',\n"
        "    rank=int(sys.argv[1]), world_size=2)\n"
        "module = DistributedDataParallel(model())\n"
        "torch.manual_seed(7)\n"
        "x = torch.randn(4, 90, 32).chunk(2)[int(sys.argv[1])]\n"
        "module(x).square().mean().backward()\n"
        "from safetensors.torch import save_file\n"
        "grads = {str(i): p.grad for i, p in enumerate(module.parameters())}\n"
        f"save_file(grads, '{tmp_path}/' + sys.argv[1])\n"
        "dist.destroy_process_group()\n"
    )
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank)], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, error = worker.communicate(timeout=120)
        assert worker.returncode == 0, error.decode()
    for rank in range(2):
        found = load_file(tmp_path / str(rank))
        assert len(found) == len(expected)
        for i, one in enumerate(expected):
            assert torch.allclose(one, found[str(i)], rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def train_lm():
    spec = importlib.util.spec_from_file_location("train_lm", ROOT / "examples/train_lm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_lm"] = module
    spec.loader.exec_module(module)
    return module


class TestLanguageModel:
    def config(self, train_lm, **options):
        small = {
            "length": 64,
            "batch": 2,
            "steps": 6,
            "layers": 1,
            "width": 32,
            "heads": 2,
            "warmup": 2,
        }
        return train_lm.Config(**{**small, **options})

    def corpus(self, train_lm):
        text = torch.arange(20_000) * 7 % 251
        return train_lm.Corpus(text.byte(), text.byte())

    @pytest.mark.parametrize("mixer", ["conv", "softmax", "fixed", "linear"])
    def test_learns_causally_and_with_as_many_parameters(self, train_lm, mixer):
        config = self.config(train_lm, mixer=mixer, steps=40, learning_rate=1e-2)
        trainer = train_lm.Trainer(config, self.corpus(train_lm))
        for _ in range(40):
            trainer.train_step()
        assert trainer.losses[-1] < 0.5 * trainer.losses[0]
        assert trainer.validate(640) < 0.5 * trainer.losses[0]
        softmax = train_lm.Trainer(self.config(train_lm, mixer="softmax"), self.corpus(train_lm))
        sizes = [sum(p.numel() for p in t.model.parameters()) for t in (trainer, softmax)]
        assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[1]
        tokens = torch.randint(256, (1, 64))
        changed = tokens.clone()
        changed[0, 40] += 1
        before, after = trainer.model(tokens), trainer.model(changed % 256)
        assert torch.allclose(before[:, :40], after[:, :40], atol=1e-4)
        assert not torch.allclose(before[:, 40:], after[:, 40:], atol=1e-4)

    def test_an_interrupted_run_goes_on_as_if_nothing_had_been(self, train_lm, tmp_path):
        config, corpus = self.config(train_lm), self.corpus(train_lm)
        *_, whole = train_lm.run(config, corpus, tmp_path / "whole", every=2)
        interrupted = train_lm.run(config, corpus, tmp_path / "parts", every=2)
        next(interrupted)
        interrupted.close()
        *_, resumed = train_lm.run(config, corpus, tmp_path / "parts", every=2)
        assert resumed.step == 6
        assert resumed.losses == whole.losses
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other)
        assert not list(tmp_path.rglob("*.part"))

    def test_a_checkpoint_of_another_run_is_refused(self, train_lm, tmp_path):
        config, corpus = self.config(train_lm, steps=1), self.corpus(train_lm)
        *_, trainer = train_lm.run(config, corpus, tmp_path)
        other = train_lm.Trainer(self.config(train_lm, steps=2), corpus)
        with pytest.raises(SystemExit, match="checkpoint of another run"):
            other.load(tmp_path / f"{config.name()}.safetensors")
        assert trainer.step == 1

    def test_defaults_take_less_than_a_minute(self, train_lm):
        """By their tokens: two cores train on about 11,000 a second."""
        config = train_lm.Config()
        assert config.steps * config.batch * config.length <= 100 * 4096
        assert (config.layers, config.width) == (4, 128)
        assert config.warmup < config.steps

    def test_text_is_split_by_file(self, train_lm, tmp_path):
        for i in range(40):
            (tmp_path / f"{i}.txt").write_bytes(bytes([i]) * 10)
        corpus = train_lm.read_corpus(str(tmp_path))
        train, held = set(corpus.train.tolist()) - {0}, set(corpus.validation.tolist()) - {0}
        assert len(train | held) >= 39
        assert not train & held
        assert 0 < len(held) < len(train)
        single = tmp_path / "0.txt"
        single.write_bytes(bytes(range(100)))
        corpus = train_lm.read_corpus(str(single))
        assert (len(corpus.train), len(corpus.validation)) == (90, 10)
        with pytest.raises(SystemExit, match="neither a file nor a folder"):
            train_lm.read_corpus("no such thing")

    def test_the_command(self, tmp_path):
        text = tmp_path / "text.txt"
        text.write_text("to be or not to be, that is the question. " * 500)
        small = [
            "--length",
            "32",
            "--batch",
            "2",
            "--steps",
            "3",
            "--layers",
            "1",
            "--width",
            "32",
            "--heads",
            "2",
        ]
        command = [sys.executable, str(ROOT / "examples/train_lm.py"), *small]
        done = subprocess.run(
            [*command, "--text", str(text), "--output", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "nats per byte" in done.stdout
        (result,) = (tmp_path / "out").glob("*.json")
        assert len(json.loads(result.read_text())["losses"]) == 3
        assert len(list((tmp_path / "out").glob("*.png"))) == 1
