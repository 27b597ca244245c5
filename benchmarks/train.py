"""Language models trained with a conv basis, beside softmax attention and others.

    python benchmarks/train.py losses [--lengths 512 2048] [--seeds 3]    # hours; resumable
    python benchmarks/train.py time [--lengths 512 2048 8192] [--steps 50]

`losses`: the same model, data, steps and number of parameters with each mixer; loss on validation text
in nats per byte. What is done is not run again. `time`: seconds and peak memory of training
steps, each mixer in a process of its own for memory, all of them in turn in one process for time. Both
write JSON into benchmarks/results and a table to the screen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import platform
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from memory import resident_bytes  # noqa: E402
from train_lm import Config, Corpus, Trainer, read_corpus, run  # noqa: E402

from convbasis.report.figures import loss_figure  # noqa: E402

TOKENS = 4096  # of a batch, whatever the length
# name: (settings, whether every seed is run)
MIXERS: dict[str, tuple[dict[str, object], bool]] = {
    "softmax, output gate": ({"mixer": "softmax"}, True),
    "conv basis, output gate": ({"mixer": "conv"}, True),
    "softmax": ({"mixer": "softmax", "output_gate": False}, False),
    "conv basis": ({"mixer": "conv", "output_gate": False}, False),
    "conv basis, segments of 16, output gate": ({"mixer": "conv", "segment_length": 16}, False),
    "conv basis, growing segments, output gate": (
        {"mixer": "conv", "segment_length": 16, "segment_growth": 2.0},
        False,
    ),
    "linear attention, output gate": ({"mixer": "linear"}, False),
    "fixed convolution, output gate": ({"mixer": "fixed"}, False),
}


def config_of(name: str, length: int, seed: int, **more: object) -> Config:
    return dataclasses.replace(
        Config(length=length, batch=max(1, TOKENS // length), seed=seed), **MIXERS[name][0], **more
    )


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def versions() -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def losses(options: argparse.Namespace) -> None:
    jobs = [
        (name, length, seed)
        for only_once in (False, True)
        for length in options.lengths
        for seed in range(1 if only_once else options.seeds)
        for name, (_, every_seed) in MIXERS.items()
        if every_seed is not only_once
    ]
    found: dict[str, dict[str, object]] = {}
    if options.output.exists():
        found = json.loads(options.output.read_text())["runs"]
    wanted = {
        config.name(): (name, config, options)
        for name, length, seed in jobs
        for config in [config_of(name, length, seed, steps=options.steps)]
    }
    # Runs of other settings, more steps say, are not to be mixed with these.
    found = {key: result for key, result in found.items() if key in wanted}
    left = [job for key, job in wanted.items() if key not in found]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for key, result in pool.imap_unordered(_one_run, left):
            found[key] = result
            write(options.output, {**versions(), "steps": options.steps, "runs": found})
    table(found, options)


def _one_run(job: tuple[str, Config, argparse.Namespace]) -> tuple[str, dict[str, object]]:
    name, config, options = job
    torch.set_num_threads(max(1, options.threads // options.workers))
    about = f"{name}, n = {config.length}, seed {config.seed}"
    for trainer in run(config, read_corpus(config.text), options.folder):
        mean = statistics.fmean(trainer.losses[-50:])
        print(f"{about}: step {trainer.step} of {config.steps}, {mean:.3f}", flush=True)
    validation = trainer.validate()
    print(f"{about}: validation {validation:.4f}", flush=True)
    return config.name(), {
        "name": name,
        "n": config.length,
        "seed": config.seed,
        "validation": validation,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "losses": trainer.losses,
    }


def table(found: dict[str, dict[str, object]], options: argparse.Namespace) -> None:
    print("\n| mixer | n | validation, nats per byte | of gated softmax | seeds | parameters |")
    print("|---|---|---|---|---|---|")
    for length in options.lengths:
        by_name = {
            name: {
                run["seed"]: run["validation"]
                for run in found.values()
                if run["name"] == name and run["n"] == length
            }
            for name in MIXERS
        }
        base = by_name["softmax, output gate"]
        if not base:
            continue
        for name, values in by_name.items():
            if not values:
                continue
            mean = statistics.fmean(values.values())
            spread = f" ± {statistics.stdev(values.values()):.4f}" if len(values) > 1 else ""
            same = statistics.fmean(base[seed] for seed in values if seed in base)
            count = next(r["parameters"] for r in found.values() if r["name"] == name)
            print(
                f"| {name} | {length:,} | {mean:.4f}{spread} | {mean / same - 1:+.2%} | {len(values)} "
                f"| {count:,} |"
            )
        curves = {
            run["name"]: run["losses"]
            for run in found.values()
            if run["n"] == length and run["seed"] == 0
        }
        loss_figure(curves, ROOT / f"docs/figures/train-{length}.png")


def _peak(config: Config) -> float:
    """Return the peak resident memory of some steps, in a process of its own, in GB."""
    trainer = Trainer(config, Corpus(*(torch.randint(256, (1 << 20,)).byte() for _ in range(2))))
    for _ in range(3):
        trainer.train_step()
    return resident_bytes("VmHWM") / 1e9


def timing(options: argparse.Namespace) -> None:
    corpus = read_corpus("python")
    rows: list[dict[str, object]] = []
    settings = {**versions(), "batch": options.batch, "steps": options.steps}
    if options.output.exists():  # lengths that are done are not measured again
        known = json.loads(options.output.read_text())
        rows = known["rows"] if {**known, "rows": None} == {**settings, "rows": None} else []
    print("| mixer | n | gated softmax's step / this one's | step | peak memory of the process |")
    print("|---|---|---|---|---|")
    for length in options.lengths:
        if any(row["n"] == length for row in rows):
            continue
        names = [name for name in MIXERS if "output gate" in name]
        trainers = {
            name: Trainer(config_of(name, length, 0, batch=options.batch), corpus) for name in names
        }
        for trainer in trainers.values():
            trainer.train_step()
        for _ in range(options.steps):
            for trainer in trainers.values():
                trainer.train_step()
        times = {name: statistics.median(t.seconds[1:]) for name, t in trainers.items()}
        del trainers
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(_peak, (config_of(name, length, 0, batch=options.batch),))
            ratio = times["softmax, output gate"] / times[name]
            rows.append(
                {"mixer": name, "n": length, "seconds": times[name], "ratio": ratio, "peak_gb": peak}
            )
            print(
                f"| {name} | {length:,} | {ratio:.2f}x | {times[name] * 1e3:,.0f} ms | {peak:.2f} GB |",
                flush=True,
            )
        write(options.output, {**settings, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("losses")
    part.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    part.add_argument("--seeds", type=int, default=3)
    part.add_argument("--steps", type=int, default=300)
    part.add_argument("--workers", type=int, default=2, help="runs at a time")
    part.add_argument("--threads", type=int, default=2, help="of all workers together")
    part.add_argument("--folder", type=Path, default=Path("runs/train"))
    part.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/train-losses.json")
    part.set_defaults(job=losses)
    part = parts.add_parser("time")
    part.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    part.add_argument("--steps", type=int, default=50)
    part.add_argument("--batch", type=int, default=1)
    part.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/train-time.json")
    part.set_defaults(job=timing)
    options = parser.parse_args()
    options.job(options)


if __name__ == "__main__":
    main()
