"""The paper's experiment: error and cost against k, in the authors' setting and in the real one.

The authors' published curve was made with the logits scaled by 1/d instead of 1/sqrt(d) and with all
position ids zero; both are in their code. Here every combination of the two is run on all heads of
SmolLM2-135M, next to one another. "The paper's" search is the binary one with T = 1 and a tiny delta,
as in their run; "recovered" is the linear scan with the largest delta that finds k starts; "uniform"
takes equal segments.

    python benchmarks/paper.py [--length 2048] [--layers 30] [--threads N]

Prints tables, and writes benchmarks/results/paper.json and docs/figures/paper.png. Finished layers are
kept in the cache folder (CONVBASIS_CACHE), so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
from pathlib import Path

import torch
from rich.progress import Progress
from torch.nn.functional import scaled_dot_product_attention as sdpa

import convbasis as cb
from convbasis.integrations.capture import CapturedLayer, cached_layers, default_cache
from convbasis.integrations.smollm2 import NAME, load_smollm2, load_tokenizer, sample_text, token_ids
from convbasis.report.figures import Curve, error_figure
from convbasis.timing import interleaved_medians

ROOT = Path(__file__).parent.parent
KS = (1, 2, 5, 16, 64, 256, 512)
COST_KS = (1, 5, 16, 64, 256)
# name: position ids are zero, logits are scaled by 1/d
SETTINGS = {
    "authors': 1/d, positions zero": (True, True),
    "1/sqrt(d), positions zero": (True, False),
    "1/d, real positions": (False, True),
    "real: 1/sqrt(d), real positions": (False, False),
}


def ways(n: int, k: int) -> dict[str, dict[str, object]]:
    return {
        "paper": {"num_bases": k, "delta": 1e-9, "search": "binary"},
        "recovered": {"num_bases": k},
        "uniform": {"segment_length": -(-n // k)},
    }


def layer_errors(layer: CapturedLayer, scale: float, tick) -> dict[str, dict[str, list[float]]]:
    """Return, by way and k, the relative error of each head's output."""
    heads = layer.query, layer.key, layer.value
    n = layer.query.shape[-2]
    exact = sdpa(*heads, is_causal=True, enable_gqa=True, scale=scale)
    size = torch.linalg.vector_norm(exact, dim=(-1, -2))
    found: dict[str, dict[str, list[float]]] = {}
    for k in KS:
        for way, options in ways(n, k).items():
            # Direct evaluation: its cost does not grow with k, and the error is the same.
            output = cb.conv_basis_attention(
                *heads, enable_gqa=True, scale=scale, backend="reference", **options
            )
            error = torch.linalg.vector_norm(output - exact, dim=(-1, -2)) / size
            found.setdefault(way, {})[str(k)] = error.flatten().tolist()
            tick()
    return found


def mean_errors(layer: CapturedLayer, scale: float) -> list[float]:
    """Return each head's error when attention is replaced by the plain mean of all values so far."""
    heads = layer.query, layer.key, layer.value
    exact = sdpa(*heads, is_causal=True, enable_gqa=True, scale=scale)
    count = torch.arange(1, layer.value.shape[-2] + 1)[:, None]
    mean = (layer.value.cumsum(-2) / count).repeat_interleave(exact.shape[1] // layer.value.shape[1], 1)
    size = torch.linalg.vector_norm(exact, dim=(-1, -2))
    return (torch.linalg.vector_norm(mean - exact, dim=(-1, -2)) / size).flatten().tolist()


def costs(layer: CapturedLayer, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Return, by way and k, the time of SDPA divided by ours (FFT backend), interleaved medians."""
    heads = layer.query, layer.key, layer.value
    found: dict[str, dict[str, float]] = {}
    for k in COST_KS:
        for way, options in ways(layer.query.shape[-2], k).items():
            times = interleaved_medians(
                {
                    "sdpa": lambda: sdpa(*heads, is_causal=True, enable_gqa=True),
                    "ours": lambda o=options: cb.conv_basis_attention(
                        *heads, enable_gqa=True, backend="fft", **o
                    ),
                },
                repeats,
            )
            found.setdefault(way, {})[str(k)] = times["sdpa"] / times["ours"]
    return found


def code_version() -> str:
    """Return a digest of the library's and this script's source, so that no old result is reused."""
    digest = hashlib.sha256(torch.__version__.encode())
    for source in [*sorted(Path(cb.__file__).parent.rglob("*.py")), Path(__file__)]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p10": ordered[len(ordered) // 10],
        "p90": ordered[(9 * len(ordered)) // 10],
        "heads": len(ordered),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/paper.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/figures/paper.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    ids = token_ids(load_tokenizer(), sample_text(), options.length)
    layers = list(range(options.layers))
    kept = default_cache() / f"paper-{options.length}-{code_version()}.json"
    done = json.loads(kept.read_text()) if kept.is_file() else {}
    kept.parent.mkdir(parents=True, exist_ok=True)
    pooled: dict[str, dict[str, dict[str, list[float]]]] = {}
    means: dict[str, list[float]] = {}
    cost: dict[str, dict[str, float]] = {}
    with Progress() as progress:
        task = progress.add_task("heads", total=len(SETTINGS) * len(layers) * len(KS) * 3)
        for name, (zero, over_d) in SETTINGS.items():
            positions = torch.zeros_like(ids) if zero else None
            captured = cached_layers(
                lambda: load_smollm2().model, NAME, ids, layers, position_ids=positions
            )
            for number, layer in captured.items():
                key = f"{name}/{number}"
                scale = 1.0 / layer.query.shape[-1] if over_d else layer.scale
                means.setdefault(name, []).extend(mean_errors(layer, scale))
                if key not in done:
                    done[key] = layer_errors(layer, scale, lambda: progress.advance(task))
                    part = kept.with_suffix(".part")
                    part.write_text(json.dumps(done))
                    part.replace(kept)
                else:
                    progress.advance(task, len(KS) * 3)
                for way, by_k in done[key].items():
                    for k, errors in by_k.items():
                        pooled.setdefault(name, {}).setdefault(way, {}).setdefault(k, []).extend(errors)
            if not zero and not over_d:
                cost = costs(captured[layers[len(layers) // 2]])

    results = {
        name: {way: {k: summary(e) for k, e in by_k.items()} for way, by_k in by_way.items()}
        for name, by_way in pooled.items()
    }
    for name, by_way in results.items():
        print(f"\n{name}: relative error |ours - exact| / |exact| of a head's output, median (p10-p90)")
        print("| k | " + " | ".join(by_way) + " |")
        print("|---|" + "---|" * len(by_way))
        for k in KS:
            cells = [by_way[way][str(k)] for way in by_way]
            shown = [f"{c['median']:.3g} ({c['p10']:.3g}-{c['p90']:.3g})" for c in cells]
            print(f"| {k} | " + " | ".join(shown) + " |")
        print(f"the mean of all values so far, no attention: {statistics.median(means[name]):.3g}")
    print("\nspeed, time of SDPA / time of ours by FFT, search included, one layer of 9 heads")
    print("| k | " + " | ".join(cost) + " |")
    print("|---|" + "---|" * len(cost))
    for k in COST_KS:
        print(f"| {k} | " + " | ".join(f"{cost[way][str(k)]:.2f}x" for way in cost) + " |")

    content = {
        "model": NAME,
        "n": options.length,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "errors": results,
        "errors_of_the_mean": {name: summary(values) for name, values in means.items()},
        "speed_against_sdpa": cost,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    part = options.output.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(options.output)
    panels = {
        name: [Curve(way, KS, [by_k[str(k)]["median"] for k in KS]) for way, by_k in by_way.items()]
        for name, by_way in results.items()
    }
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    error_figure(panels, options.figure)


if __name__ == "__main__":
    main()
