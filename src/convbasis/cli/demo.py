"""`convbasis demo`: the whole system on planted input, where it is exact, and on real heads."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention import conv_basis_attention, conv_basis_attention_stats
from ..decompose import decompose
from ..errors import InputError
from ..integrations.capture import CapturedLayer, cached_layers
from ..integrations.smollm2 import NAME, load_smollm2, load_tokenizer, token_ids
from ..integrations.texts import read_text
from ..planted import PlantedQK, planted_qk
from ..recover import recover
from ..report.content import Chart, Line, Report, Table
from ..report.figures import Curve, Triple, attention_figure, require_matplotlib
from ..storage import save_text
from ..timing import interleaved_medians
from .progress import bars
from .results import STANDARD_OUTPUT, check_outputs, deliver, provenance, rounded
from .words import numbers

_PLANTED_LENGTHS = (2048, 16_384)
_PLANTED_BASES = 16
_CURVE = (1, 4, 16, 64, 256, 1024)
_TOLERANCES = (0.0, 0.5, 1.0, 2.0)  # nats
_PICTURE_TOKENS = 160
_DECOMPOSED_TOKENS = 256
_HEAD_DIM = 64
_LAYERS = 30


class Row(NamedTuple):
    """One line of the table of attention."""

    input: str
    segments: str
    n: int
    k: int
    heads: int
    median_error: float
    worst_error: float
    speed_against_sdpa: float


def run_demo(
    output: Path,
    length: int,
    text: Path | None,
    layers: str,
    seed: int,
    json_output: Path | None,
    console: Console,
) -> None:
    """Run the demo, print its tables, and write attention.png and results.json to `output`."""
    chosen = numbers("layers", layers, 0, _LAYERS - 1)
    if output == STANDARD_OUTPUT or output.is_file():
        raise InputError(f"--output {str(output)!r} is no folder; name one")
    require_matplotlib()
    output.mkdir(parents=True, exist_ok=True)
    picture, figures = output / "attention.png", output / "results.json"
    check_outputs(json_output, picture, figures, inputs=[text])
    torch.manual_seed(seed)
    with bars() as progress, torch.no_grad():
        captured = _capture(length, text, chosen, progress)
        ranks = _decompose_heads(captured, progress)
        rows, planted = _attend_planted(seed, progress)
        rows += _attend_real(captured, length, progress)
        curves = _curves(captured, planted, length, progress)
        triples = _pictures(captured, seed, progress)
    attention_figure(triples, curves, picture)
    _write_json(figures, rows, ranks, curves)
    deliver(_report(rows, ranks, curves), console, json_output, None)
    console.print(f"Picture: {picture}   Figures: {figures}", markup=False)


def _track(progress: Progress, name: str, total: int) -> Callable[[], None]:
    task = progress.add_task(name, total=total)
    return lambda: progress.advance(task)


def _capture(
    length: int, text: Path | None, layers: list[int], progress: Progress
) -> dict[int, CapturedLayer]:
    advance = _track(progress, f"tokens of {NAME}", 1)
    _, content = read_text(text)
    ids = token_ids(load_tokenizer(), content, length)
    advance()
    # One step for loading the model, one for each layer; none of them where captures are kept.
    task = progress.add_task(f"capturing heads, {length} tokens", total=_LAYERS + 1)

    def load() -> Any:
        model = load_smollm2().model
        progress.advance(task)
        return model

    captured = cached_layers(load, NAME, ids, layers, progress=lambda _layer: progress.advance(task))
    progress.update(task, completed=_LAYERS + 1)
    return captured


def _shared(layer: CapturedLayer) -> Tensor:
    """Return keys with a head for each query head."""
    return layer.key.repeat_interleave(layer.query.shape[1] // layer.key.shape[1], dim=1)


def _decompose_heads(
    captured: dict[int, CapturedLayer], progress: Progress
) -> dict[int, dict[float, float]]:
    """Return, by layer and tolerance, the median k of the decomposition of the heads' logits."""
    advance = _track(progress, "decomposing logits", len(captured) * len(_TOLERANCES))
    found: dict[int, dict[float, float]] = {}
    for number, layer in captured.items():
        n = min(_DECOMPOSED_TOKENS, layer.query.shape[-2])
        logits = layer.query[0, :, :n] @ _shared(layer)[0, :, :n].mT * layer.scale
        found[number] = {}
        for tolerance in _TOLERANCES:
            ranks = decompose(logits.tril(), tol=tolerance).ranks.tolist()
            found[number][tolerance] = statistics.median(ranks)
            advance()
    return found


def _error(exact: Tensor, output: Tensor) -> Tensor:
    """Return the relative error of each head's output, ``(heads,)``."""
    difference = torch.linalg.vector_norm(output - exact, dim=(-1, -2))
    return (difference / torch.linalg.vector_norm(exact, dim=(-1, -2))).flatten()


def _measure(
    name: str, segments: str, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Row:
    def ours() -> Tensor:
        return conv_basis_attention(query, key, value, enable_gqa=True, **options)

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True, scale=options.get("scale")
        )

    times = interleaved_medians({"ours": ours, "sdpa": sdpa}, repeats=3)
    stats = conv_basis_attention_stats(query, key, value, enable_gqa=True, **options)
    errors = _error(sdpa(), stats.output)
    return Row(
        name, segments, query.shape[-2], stats.basis.k, query.shape[1],
        float(errors.median()), float(errors.max()), times["sdpa"] / times["ours"],
    )  # fmt: skip


def _attend_planted(seed: int, progress: Progress) -> tuple[list[Row], PlantedQK]:
    advance = _track(progress, "attention, planted input", len(_PLANTED_LENGTHS))
    rows, kept = [], None
    for n in _PLANTED_LENGTHS:
        generator = torch.Generator().manual_seed(seed)
        planted = planted_qk(n, _HEAD_DIM, _PLANTED_BASES, generator=generator, dtype=torch.float32)
        kept = kept or planted
        value = torch.randn(1, 1, n, _HEAD_DIM, generator=generator)
        heads = planted.query[None, None], planted.key[None, None], value
        rows.append(_measure("planted", "recovered", *heads, {"num_bases": _PLANTED_BASES}))
        advance()
    assert kept is not None
    return rows, kept


def _attend_real(captured: dict[int, CapturedLayer], length: int, progress: Progress) -> list[Row]:
    advance = _track(progress, "attention, real heads", 4 * len(captured))
    rows = []
    for number, layer in captured.items():
        heads = layer.query, layer.key, layer.value
        for k in (16, 64):
            for segments, options in _ways(length, k).items():
                options["scale"] = layer.scale
                rows.append(_measure(f"layer {number}", segments, *heads, options))
                advance()
    return rows


def _ways(length: int, k: int) -> dict[str, dict[str, Any]]:
    """Return the options of `conv_basis_attention` for each way to choose k segments."""
    return {"uniform": {"segment_length": -(-length // k)}, "recovered": {"num_bases": k}}


def _curves(
    captured: dict[int, CapturedLayer], planted: PlantedQK, length: int, progress: Progress
) -> list[Curve]:
    """Return median errors over all heads against k; direct evaluation, so that k costs nothing."""
    ks = [k for k in _CURVE if k <= length // 2]
    advance = _track(progress, "error against k", len(ks) * (2 * len(captured) + 1))
    value = torch.randn(1, 1, len(planted.query), _HEAD_DIM)
    plain = planted.query[None, None], planted.key[None, None], value
    exact = scaled_dot_product_attention(*plain, is_causal=True)
    errors: dict[str, list[float]] = {
        "planted, recovered": [],
        "real, uniform": [],
        "real, recovered": [],
    }
    for k in ks:
        output = conv_basis_attention(*plain, num_bases=k, delta=planted.delta, backend="reference")
        errors["planted, recovered"].append(float(_error(exact, output).median()))
        advance()
        found: dict[str, list[Tensor]] = {"real, uniform": [], "real, recovered": []}
        for layer in captured.values():
            heads = layer.query, layer.key, layer.value
            target = scaled_dot_product_attention(
                *heads, is_causal=True, enable_gqa=True, scale=layer.scale
            )
            for segments, options in _ways(length, k).items():
                output = conv_basis_attention(
                    *heads, enable_gqa=True, scale=layer.scale, backend="reference", **options
                )
                found[f"real, {segments}"].append(_error(target, output))
                advance()
        for name, parts in found.items():
            errors[name].append(float(torch.cat(parts).median()))
    return [Curve(name, ks, values) for name, values in errors.items()]


def _pictures(captured: dict[int, CapturedLayer], seed: int, progress: Progress) -> list[Triple]:
    advance = _track(progress, "pictures", 2)
    generator = torch.Generator().manual_seed(seed)
    planted = planted_qk(_PICTURE_TOKENS, _HEAD_DIM, 4, generator=generator)
    triples = [_triple("planted", planted.query, planted.key, _HEAD_DIM**-0.5, 4)]
    advance()
    number, layer = next(iter(captured.items()))
    n = min(_PICTURE_TOKENS, layer.query.shape[-2])
    query, key = layer.query[0, 0, :n].double(), _shared(layer)[0, 0, :n].double()
    triples.append(_triple(f"layer {number}, head 0", query, key, layer.scale, 16))
    advance()
    return triples


def _triple(title: str, query: Tensor, key: Tensor, scale: float, num_bases: int) -> Triple:
    above = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    basis = recover(query, key, num_bases=num_bases, scale=scale)
    exact, approximate = (
        logits.masked_fill(above, -torch.inf).softmax(-1)
        for logits in (query @ key.mT * scale, basis.to_dense())
    )
    return Triple(f"{title}, k = {num_bases}", exact, approximate)


def _report(rows: list[Row], ranks: dict[int, dict[float, float]], curves: list[Curve]) -> Report:
    names = ("exact" if tolerance == 0 else f"within {tolerance:g} nats" for tolerance in _TOLERANCES)
    return Report(
        title=f"Planted input and heads of {NAME}",
        provenance=provenance(model=NAME),
        charts=(
            Chart(
                title="Error against k",
                x_title="number of bases k",
                y_title="relative error of the output, median over heads",
                lines=tuple(
                    Line(curve.label, tuple(map(float, curve.k)), tuple(map(rounded, curve.error)))
                    for curve in curves
                ),
                x_log=True,
                y_log=True,
                level=(1.0, "as large as the output"),
            ),
        ),
        tables=(
            Table(
                "Attention: conv basis against exact softmax",
                ("input", "segments", "n", "k", "heads", "error, median", "error, worst", "speed"),
                tuple((*row[:5], *(rounded(figure, 3) for figure in row[5:])) for row in rows),
            ),
            Table(
                f"Decomposition: median k of the heads' logits, first {_DECOMPOSED_TOKENS} tokens",
                ("layer", *names),
                tuple(
                    (number, *(found[tolerance] for tolerance in _TOLERANCES))
                    for number, found in ranks.items()
                ),
            ),
        ),
        notes=(
            "error: |ours - exact| / |exact| of a head's output (1 = as large as the output itself); "
            "speed: time of SDPA / time of ours, search included, medians of interleaved runs.",
            "On planted logits the conv basis is exact. On real heads the plain algorithm fails: "
            "their logits are no sum of few convolutions, and an error near or above 1 means that it "
            "must not be used there as it stands.",
        ),
    )


def _write_json(
    path: Path, rows: list[Row], ranks: dict[int, dict[float, float]], curves: list[Curve]
) -> None:
    content = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": NAME,
        "attention": [row._asdict() for row in rows],
        "decomposition": {str(k): {str(t): v for t, v in r.items()} for k, r in ranks.items()},
        "curves": [curve._asdict() for curve in curves],
    }
    save_text(path, json.dumps(content, indent=1) + "\n")
