"""Train a byte-level language model whose attention is a conv basis, on real text, on a CPU.

    python examples/train_lm.py                         # Python's own sources, under a minute
    python examples/train_lm.py --text FILE_OR_FOLDER --steps 2000 --output runs/mine

The hundred steps of the first show that it learns, no more; figures in docs/training.md are of 300.

Writes a checkpoint (safetensors), the losses (JSON) and their curve (PNG) into the output folder. Run
it again to go on where it stopped. `--mixer` takes what the conv basis is compared with in
benchmarks/train.py: softmax attention, a fixed long convolution, linear attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import convbasis as cb
from convbasis.nn.lag_bias import LagBias
from convbasis.nn.rotary import rotate

MIXERS = ("conv", "softmax", "fixed", "linear")


@dataclass(frozen=True)
class Config:
    """One training run; what changes the result, and nothing else."""

    mixer: str = "conv"
    length: int = 512
    batch: int = 8
    steps: int = 100
    seed: int = 0
    layers: int = 4
    width: int = 128
    heads: int = 4
    output_gate: bool = True
    segment_length: int = 64
    segment_growth: float = 0.0
    learning_rate: float = 2e-3
    warmup: int = 50
    text: str = "python"

    def name(self) -> str:
        """Return a short name for files, the same for the same run."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:8]
        gate = "-gated" if self.output_gate else ""
        return f"{self.mixer}{gate}-n{self.length}-seed{self.seed}-{digest}"


# ---- text ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Bytes of files, one after the other; whole files are kept for validation."""

    train: Tensor
    validation: Tensor


def read_corpus(text: str) -> Corpus:
    """Read the standard library's sources (``"python"``), a file, or all files of a folder.

    A tenth of the files, picked by a hash of their names, is for validation; of a single file it is the
    last tenth.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if text == "python" else Path(text)
    if root.is_file():
        data = root.read_bytes()
        cut = len(data) * 9 // 10
        return Corpus(_bytes([data[:cut]]), _bytes([data[cut:]]))
    if not root.is_dir():
        raise SystemExit(f"--text {text!r} is neither a file nor a folder")
    pattern = "*.py" if text == "python" else "*"
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root)
        if path.is_file() and not (text == "python" and skipped & set(name.parts)):
            held = hashlib.sha256(name.as_posix().encode()).digest()[0] < 26
            parts[held].append(path.read_bytes())
    if not all(parts):
        raise SystemExit(f"--text {text!r} has too few files to keep some for validation")
    return Corpus(_bytes(parts[0]), _bytes(parts[1]))


def _bytes(files: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\0".join(files)), dtype=torch.uint8)


def sample(data: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return random pieces of text, one token longer than a sequence, ``(count, length + 1)``."""
    if len(data) <= length + 1:
        raise SystemExit(f"the text has {len(data)} bytes, but sequences of {length} are wanted")
    first = torch.randint(len(data) - length - 1, (count,), generator=generator)
    return data[first[:, None] + torch.arange(length + 1)].long()


# ---- model --------------------------------------------------------------------------------------


class SoftmaxAttention(nn.Module):
    """Exact attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)
        self.output_gate = (
            nn.Linear(config.width, config.width, bias=False) if config.output_gate else None
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(self.qkv(x))
        query, key = rotate(query, 0, 10_000.0), rotate(key, 0, 10_000.0)
        return self.join(self.mix(query, key, value), x)

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        parts = projected.unflatten(-1, (-1, self.heads, projected.shape[-1] // (3 * self.heads)))
        return parts.permute(2, 0, 3, 1, 4).unbind()

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def join(self, mixed: Tensor, x: Tensor) -> Tensor:
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.output_gate is not None:
            mixed = mixed * torch.sigmoid(self.output_gate(x))
        return self.o_proj(mixed)


class LinearAttention(SoftmaxAttention):
    """Causal linear attention with features elu + 1, by chunks."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, chunk: int = 64) -> Tensor:
        query, key = nn.functional.elu(query) + 1, nn.functional.elu(key) + 1
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
        n = query.shape[-2]
        q, k, v = (
            nn.functional.pad(t, (0, 0, 0, -n % chunk)).unflatten(2, (-1, chunk))
            for t in (query, key, value)
        )
        states = (k.mT @ v).cumsum(2)
        before = nn.functional.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
        product = ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)[:, :, :n]
        return product[..., :-1] / product[..., -1:]


class FixedConvolution(nn.Module):
    """A learned weight by lag and a gate by key, no queries and keys: one kernel for every input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, width = config.heads, config.width
        self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key_gate = nn.Linear(width, config.heads)
        self.lag_bias = LagBias(config.heads)
        self.output_gate = nn.Linear(width, width, bias=False) if config.output_gate else None

    def forward(self, x: Tensor) -> Tensor:
        value = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query = torch.zeros_like(value[..., :2])
        mixed = cb.conv_basis_attention(
            query,
            query,
            value,
            starts=[0],
            key_bias=self.key_gate(x).transpose(1, 2),
            lag_bias=self.lag_bias(x.shape[1]),
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.output_gate is not None:
            mixed = mixed * torch.sigmoid(self.output_gate(x))
        return self.o_proj(mixed)


def make_mixer(config: Config) -> nn.Module:
    if config.mixer == "conv":
        return cb.nn.ConvBasisAttention(
            config.width,
            config.heads,
            segment_length=config.segment_length,
            segment_growth=config.segment_growth,
            output_gate=config.output_gate,
        )
    kinds = {"softmax": SoftmaxAttention, "linear": LinearAttention, "fixed": FixedConvolution}
    return kinds[config.mixer](config)


class Block(nn.Module):
    """Mixer and MLP, each with a norm before and a residual around."""

    def __init__(self, config: Config, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(config.width) for _ in range(2))
        self.mixer = make_mixer(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, hidden, bias=False),
            nn.GELU(),
            nn.Linear(hidden, config.width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out. All mixers get as many parameters, by the MLP's width."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        reference = dataclasses.replace(config, mixer="softmax", output_gate=True)
        target = _count(make_mixer(reference)) + 2 * config.width * 4 * config.width
        hidden = round((target - _count(make_mixer(config))) / (2 * config.width))
        self.embedding = nn.Embedding(256, config.width)
        self.blocks = nn.ModuleList(Block(config, hidden) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean loss in nats per byte."""
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# ---- training -----------------------------------------------------------------------------------


class Trainer:
    """A model, its optimiser and its losses; the same run again after an interruption."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        torch.manual_seed(config.seed)
        self.config, self.corpus = config, corpus
        self.model = LanguageModel(config)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.step = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def train_step(self) -> float:
        """Take one step; its data depend on seed and step alone."""
        config = self.config
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + self.step)
        tokens = sample(self.corpus.train, config.batch, config.length, generator)
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * self._share()
        loss = loss_of(self.model, tokens)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        self.losses.append(float(loss.detach()))
        self.seconds.append(time.perf_counter() - begin)
        return self.losses[-1]

    def _share(self) -> float:
        """Return the part of the learning rate: up in the beginning, then down along a cosine."""
        config = self.config
        if self.step < config.warmup:
            return (self.step + 1) / config.warmup
        done = (self.step - config.warmup) / max(1, config.steps - config.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    @torch.no_grad()
    def validate(self, tokens: int = 131_072) -> float:
        """Return the loss on validation text, in nats per byte; always the same text."""
        self.model.eval()
        config = self.config
        count = max(1, tokens // config.length)
        pieces = sample(self.corpus.validation, count, config.length, torch.Generator().manual_seed(7))
        losses = [float(loss_of(self.model, part)) * len(part) for part in pieces.split(config.batch)]
        self.model.train()
        return sum(losses) / count

    def save(self, path: Path) -> None:
        """Write everything that the run needs to go on; beside, then renamed."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{index}.{name}": value for name, value in state.items()})
        known = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "losses": self.losses,
            "seconds": self.seconds,
        }
        part = path.with_suffix(".part")
        own = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(own, str(part), metadata={"run": json.dumps(known)})
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same run."""
        with safe_open(str(path), framework="pt") as file:
            known = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if known["config"] != dataclasses.asdict(self.config):
            raise SystemExit(f"{path} is a checkpoint of another run: {known['config']}")
        prefix = "model."
        self.model.load_state_dict(
            {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        whole = self.optimiser.state_dict()
        self.optimiser.load_state_dict({**whole, "state": state})
        self.step, self.losses, self.seconds = known["step"], known["losses"], known["seconds"]


def run(config: Config, corpus: Corpus, folder: Path, every: int = 50) -> Iterator[Trainer]:
    """Train, or go on; yields the trainer every some steps, after writing a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, corpus)
    checkpoint = folder / f"{config.name()}.safetensors"
    if checkpoint.exists():
        trainer.load(checkpoint)
    while trainer.step < config.steps:
        trainer.train_step()
        if trainer.step % every == 0 or trainer.step == config.steps:
            trainer.save(checkpoint)
            yield trainer
    yield trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Config):
        name = "--" + field.name.replace("_", "-")
        if field.name == "output_gate":
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=True)
        elif field.name == "mixer":
            parser.add_argument(name, choices=MIXERS, default=field.default)
        else:
            parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument("--output", type=Path, default=Path("runs/train-lm"))
    options = vars(parser.parse_args())
    folder = options.pop("output")
    config = Config(**options)
    corpus = read_corpus(config.text)
    print(f"{len(corpus.train):,} bytes to train on, {len(corpus.validation):,} for validation")
    for trainer in run(config, corpus, folder):
        recent = trainer.losses[-50:]
        step = sorted(trainer.seconds[-50:])[len(recent) // 2]
        left = (config.steps - trainer.step) * step
        print(
            f"step {trainer.step:5d} of {config.steps}: {sum(recent) / len(recent):.3f} nats per byte, "
            f"{step * 1e3:.0f} ms a step, {left / 60:.1f} minutes left",
            flush=True,
        )
    validation = trainer.validate()
    print(f"validation: {validation:.4f} nats per byte ({validation / math.log(2):.3f} bits)")
    result = {
        "config": dataclasses.asdict(config),
        "validation": validation,
        "losses": trainer.losses,
        "parameters": _count(trainer.model),
    }
    part = folder / f"{config.name()}.json.part"
    part.write_text(json.dumps(result) + "\n")
    part.replace(folder / f"{config.name()}.json")
    try:
        from convbasis.report.figures import loss_figure

        loss_figure({config.name(): trainer.losses}, folder / f"{config.name()}.png")
    except cb.MissingExtraError as error:
        print(f"no curve: {error}", file=sys.stderr)
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
