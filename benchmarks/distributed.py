"""Attention over several processes: correctness, bytes against the model, overhead, memory.

    python benchmarks/distributed.py                    # 1 to 4 gloo processes on this machine
    python benchmarks/distributed.py --quick            # small sizes, half a minute
    python benchmarks/distributed.py predict            # the cost model's tables; nothing is run
    torchrun --nproc-per-node 8 benchmarks/distributed.py --backend nccl

With gloo, bytes are read from the counters of the operating system's TCP sockets (Linux), and memory is
the rise of the peak resident memory over the moment when the inputs exist. With NCCL, bytes are counted
where they are handed over, and memory is CUDA's. Times are processor times with gloo: processes share
the cores of one machine. Writes benchmarks/results/distributed.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import socket
import struct
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import convbasis as cb
from convbasis import distributed
from convbasis.distributed.cost import Machine, attention_load, hybrid_load, ring_load
from convbasis.distributed.cost_spectra import spectra_load
from convbasis.distributed.ranks import state_of

ROOT = Path(__file__).parent.parent
RANKS = (1, 2, 3, 4)
# heads, key-value heads, segments, what travels (spectra: a layout); hybrid attention where segments
# are 0.
CASES = {
    "heads, k = 16": (8, 8, 16, "queries"),
    "heads, k = 16, logits": (8, 8, 16, "logits"),
    "heads, GQA, k = 128": (8, 2, 128, "queries"),
    "columns, k = 16": (1, 1, 16, "logits"),
    "columns, k = 16, queries": (1, 1, 16, "queries"),
    "spectra, k = 16": (1, 1, 16, "spectra"),
    "hybrid, window 256": (8, 2, 0, ""),
}
# Layout and heads of four ranks: a head for each, or columns or spectra of one.
MEMORY = {"heads": 4, "columns": 1, "spectra": 1}
D, WINDOW, COLUMNS, SEGMENTS = 64, 256, 64, 16
# Peak memory beside the inputs, of what the model holds; backward holds the inner graph and gradients.
MOST = {"forward": 2.5, "backward": 5.0}
BLOCKS = 64 << 20  # bytes
_WORDS = ("case", "ranks", "n", "finite")
_SENT = 200  # place of tcpi_bytes_sent in the kernel's struct tcp_info; what was sent again follows


def sent_bytes(backend: str) -> int:
    """Return the bytes that this process has sent."""
    if backend != "gloo":
        return state_of(dist.group.WORLD).sent
    total = 0
    for place in list(Path("/proc/self/fd").iterdir()):
        try:
            if not str(place.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(place.name))) as own:
                if own.type == socket.SOCK_STREAM and own.family in (socket.AF_INET, socket.AF_INET6):
                    info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, again = struct.unpack_from("QQ", info, _SENT)
                    total += sent - again
        except OSError:
            continue
    return total


def inputs(case: str, n: int, device: torch.device) -> list[torch.Tensor]:
    heads, kv_heads, *_ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, own, n, D) for own in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def attend(case: str, tensors: list[torch.Tensor], n: int, mesh=None) -> torch.Tensor:
    *_, segments, exchange = CASES[case]
    more = {} if mesh is None else {"mesh": mesh}
    module = cb if mesh is None else distributed
    if segments:
        way = "layout" if exchange == "spectra" else "exchange"
        more |= {way: exchange} if more else {}
        length = -(-n // segments)
        return module.conv_basis_attention(*tensors, segment_length=length, enable_gqa=True, **more)
    return module.hybrid_attention(*tensors, window=WINDOW, columns=COLUMNS, enable_gqa=True, **more)


def predicted(case: str, n: int, ranks: int):
    heads, kv_heads, segments, exchange = CASES[case]
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": D}
    if exchange == "spectra":
        return spectra_load(n, ranks, segments=segments, **sizes)
    if segments:
        return attention_load(n, ranks, segments=segments, exchange=exchange, **sizes)
    return hybrid_load(n, ranks, window=WINDOW, columns=COLUMNS, **sizes)


def worst_row(want: torch.Tensor, found: torch.Tensor, scale: torch.Tensor) -> float:
    """Return the largest error of a row, relative to its norm, but at least to the mean norm of all."""
    norms = torch.linalg.vector_norm(want.double(), dim=-1)
    floor = torch.linalg.vector_norm(scale.double(), dim=-1).mean()
    error = torch.linalg.vector_norm(found.double() - want.double(), dim=-1)
    return float((error / norms.clamp(min=float(floor))).max())


def largest(value: float, device: torch.device) -> float:
    """Return the largest of all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def total(value: float, device: torch.device) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor)


def work_time(device: torch.device) -> float:
    """Return processor time of this process, or the time where the work is on an accelerator."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def of_case(case: str, n: int, repeats: int, backend: str, device: torch.device) -> dict[str, float]:
    """Return errors, bytes and times of one case, in this number of ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,))
    whole = [x.requires_grad_() for x in inputs(case, n, device)]
    alone = []
    for _ in range(repeats + 1):  # the first is a warm-up
        for x in whole:
            x.grad = None
        begin = work_time(device)
        want = attend(case, whole, n)
        weights = torch.cos(torch.arange(want.numel(), device=device)).view(want.shape)
        (want * weights).sum().backward()
        alone.append(work_time(device) - begin)
    # How far one process is from exact arithmetic.
    exact = [x.detach().double().requires_grad_() for x in whole]
    (attend(case, exact, n) * weights).sum().backward()
    rounding = [worst_row(y.grad, x.grad, y.grad) for x, y in zip(whole, exact, strict=True)]
    mine = [x.detach().tensor_split(ranks, 2)[rank].clone().requires_grad_() for x in whole]
    own_weights = weights.tensor_split(ranks, 2)[rank]
    spent, sent = [], []
    for _ in range(repeats + 1):
        for x in mine:
            x.grad = None
        dist.barrier()
        counts = [sent_bytes(backend)]
        begin = work_time(device)
        output = attend(case, mine, n, mesh)
        counts.append(sent_bytes(backend))
        (output * own_weights).sum().backward()
        spent.append(work_time(device) - begin)
        counts.append(sent_bytes(backend))
        sent.append([counts[1] - counts[0], counts[2] - counts[1]])
    errors = [worst_row(want.tensor_split(ranks, 2)[rank].detach(), output.detach(), want.detach())]
    for x, own in zip(whole, mine, strict=True):
        errors.append(worst_row(x.grad.tensor_split(ranks, 2)[rank], own.grad, x.grad))
    load = predicted(case, n, ranks)
    times = sorted(total(seconds, device) for seconds in spent[1:])
    alone = sorted(alone[1:])
    return {
        "ranks": ranks,
        "n": n,
        "output_error": largest(errors[0], device),
        "gradient_error": largest(max(errors[1:]), device),
        "gradient_rounding": max(rounding),
        "sent_forward": largest(sent[-1][0], device),
        "predicted_forward": load.sent_forward,
        "sent_backward": largest(sent[-1][1], device),
        "predicted_backward": load.sent_backward,
        "time_of_all_ranks": times[len(times) // 2],
        "time_of_one_process": largest(alone[len(alone) // 2], device),
    }


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def begin_memory(device: torch.device) -> int:
    """Let the peak start again from what is in use, and return that."""
    if device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed is still resident, and used again
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(device: torch.device) -> int:
    return resident("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated()


def memory(case: str, n: int, device: torch.device) -> dict[str, object]:
    """Return the added peak memory of forward and backward; a rank makes its own tokens alone."""
    ranks, heads = dist.get_world_size(), MEMORY[case]
    mesh = init_device_mesh(device.type, (ranks,))
    generator = torch.Generator().manual_seed(dist.get_rank())
    mine = [torch.randn(1, heads, n // ranks, D, generator=generator).to(device) for _ in range(3)]
    options = {"mesh": mesh, "segment_length": n // SEGMENTS, "layout": case}
    before = begin_memory(device)
    with torch.no_grad():
        output = distributed.conv_basis_attention(*mine, **options)
    forward = peak_memory(device) - before
    finite = bool(output.isfinite().all())
    del output
    for x in mine:
        x.requires_grad_()
    before = begin_memory(device)
    output = distributed.conv_basis_attention(*mine, **options)
    output.sum().backward()
    backward = peak_memory(device) - before
    sizes = {"heads": heads, "head_dim": D, "segments": SEGMENTS}
    load = spectra_load(n, ranks, **sizes) if case == "spectra" else attention_load(n, ranks, **sizes)
    return {
        "case": case,
        "ranks": ranks,
        "n": n,
        "forward": largest(forward, device),
        "backward": largest(backward, device),
        "tensor_bytes": 4 * n * heads * D / ranks,  # of a tensor of this rank's tokens
        "kernel_bytes": 4 * SEGMENTS * n,
        "predicted": 4 * load.numbers,
        "finite": finite and all(bool(x.grad.isfinite().all()) for x in mine),
    }


def of_rank(options: argparse.Namespace) -> dict[str, object]:
    device = torch.device("cpu")
    if options.backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    n, long = (1025, 8192) if options.quick else (options.length, options.long)
    rows = {}
    for case in options.cases:
        rows[case] = of_case(case, n, 1 if options.quick else 3, options.backend, device)
        tell(f"{case}, {dist.get_world_size()} ranks: done")
    found: dict[str, object] = {"cases": rows}
    if dist.get_world_size() == max(RANKS) or options.backend == "nccl":
        found["memory"] = []
        for case in MEMORY:
            for tokens in (long // 2, long):
                found["memory"].append(memory(case, tokens, device))
                tell(f"memory of {case} at {tokens:,} tokens: done")
    return found


def tell(line: str) -> None:
    if dist.get_rank() == 0:
        print(f"... {line}", flush=True)


def process(rank: int, ranks: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{ranks}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=30),
    )
    found = of_rank(options)
    if rank == 0:
        (Path(folder) / f"{ranks}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def launched(options: argparse.Namespace) -> list[dict[str, object]]:
    """Return what each number of gloo processes found."""
    context = multiprocessing.get_context("spawn")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS:
            started = [
                context.Process(target=process, args=(rank, ranks, folder, options))
                for rank in range(ranks)
            ]
            for one in started:
                one.start()
            for one in started:
                one.join()
                if one.exitcode:
                    raise SystemExit(f"a process ended with {one.exitcode}")
            found.append(json.loads((Path(folder) / f"{ranks}.json").read_text()))
    return found


def show(found: list[dict[str, object]]) -> None:
    names = (
        "case",
        "ranks",
        "worst row, output",
        "gradients",
        "those of one process against float64",
        "sent, forward",
        "of predicted",
        "sent, backward",
        "of predicted",
        "time of all ranks / of one process",
    )
    print(f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for case in found[0]["cases"]:
        for part in found:
            row = part["cases"][case]
            shares = [
                f"{row[f'sent_{way}'] / row[f'predicted_{way}']:.3f}" if row[f"predicted_{way}"] else ""
                for way in ("forward", "backward")
            ]
            print(
                f"| {case} | {row['ranks']} | {row['output_error']:.0e} | {row['gradient_error']:.0e} "
                f"| {row['gradient_rounding']:.0e} "
                f"| {row['sent_forward'] / 1e6:.2f} MB | {shares[0]} "
                f"| {row['sent_backward'] / 1e6:.2f} MB | {shares[1]} "
                f"| {row['time_of_all_ranks'] / row['time_of_one_process']:.2f} |"
            )
    for part in found:
        for row in part.get("memory", []):
            megabytes = {name: f"{row[name] / 1e6:.0f} MB" for name in row if name not in _WORDS}
            shares = [f"{row[way] / row['predicted']:.2f}" for way in ("forward", "backward")]
            print(
                f"\nmemory of a rank at n = {row['n']:,}, {row['ranks']} ranks, {row['case']}, "
                f"k = {SEGMENTS}: {megabytes['forward']} forward, {megabytes['backward']} with "
                f"backward, beside its inputs; that is {' and '.join(shares)} of the "
                f"{megabytes['predicted']} of the model; its queries take {megabytes['tensor_bytes']} "
                f"(n d / ranks of each head), k n numbers {megabytes['kernel_bytes']}"
            )


def check(found: list[dict[str, object]]) -> None:
    """Hold what must hold."""
    for part in found:
        for case, row in part["cases"].items():
            assert row["output_error"] < 1e-5, (case, row)
            # Rows with small gradients differ as much as one process does from float64.
            assert row["gradient_error"] < max(1e-5, 3 * row["gradient_rounding"]), (case, row)
            if row["predicted_forward"]:
                for way in ("forward", "backward"):
                    assert abs(row[f"sent_{way}"] / row[f"predicted_{way}"] - 1) < 0.1, (case, row)
        rows = part.get("memory", [])
        for row in rows:
            assert row["finite"], row
            for way, most in MOST.items():
                # Beside what grows with n, transforms work in blocks of some size.
                assert row[way] < most * row["predicted"] + BLOCKS, row
        for half, whole in zip(rows[::2], rows[1::2], strict=True):
            for way in MOST:
                assert whole[way] < 2.2 * half[way] + BLOCKS, (half, whole)
    errors = {row["ranks"]: part["cases"] for part in found for row in part["cases"].values()}
    if {2, 4} <= errors.keys():
        for case in errors[2]:
            two, four = errors[2][case], errors[4][case]
            for name in ("output_error", "gradient_error"):
                least = max(two[name], two["gradient_rounding"] if name == "gradient_error" else 1e-6)
                assert four[name] <= 2 * least, (case, two, four)


# Assumptions of the tables, for one GPU of a large cluster: operations a second in matrix products of
# bfloat16, and in transforms of float32, which memory holds up.
PRODUCTS, TRANSFORMS = 4e14, 5e12
MODEL = {"heads": 32, "kv_heads": 8, "head_dim": 128}
ONE_HEAD = {"heads": 1, "head_dim": 64, "segments": 16}


def predict(network: float) -> None:
    """Print what the model predicts for one layer, forward and backward."""
    products, transforms = Machine(PRODUCTS, network), Machine(TRANSFORMS, network)
    wide = Machine(TRANSFORMS / 2, network)  # float64
    print(
        f"one layer, {MODEL['heads']} heads, {MODEL['kv_heads']} key-value heads, d = 128, forward and "
        f"backward, exchanges hidden behind work; {PRODUCTS:.0e} and {TRANSFORMS:.0e} operations/s in "
        f"products and transforms, {network:.0e} bytes/s\n"
    )
    print("| tokens | GPUs | layout | GB sent, k = 64 | s, k = 64 | s, k = 1,024 "
          "| s, hybrid of 4,096 keys | s, exact ring | fastest |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for n in (1 << 12, 1 << 14, 1 << 17, 1_000_000, 10_000_000, 100_000_000):
        for ranks in (8, 32, 128, 512):
            loads = [attention_load(n, ranks, segments=k, itemsize=4, **MODEL) for k in (64, 1024)]
            layout = "heads" if ranks <= MODEL["heads"] else "columns"
            machine = transforms
            if layout == "columns":
                other = spectra_load(n, ranks, segments=64, **MODEL)
                fewer = other.sent_forward < loads[0].sent_forward
                if fewer and other.operations <= loads[0].operations:
                    loads[0], layout, machine = other, "spectra", wide
            near = hybrid_load(n, ranks, window=3584, columns=508, itemsize=2, **MODEL)
            ring = ring_load(n, ranks, itemsize=2, **MODEL)
            seconds = {
                "k = 64": machine.seconds(loads[0], backward=True)[1],
                "k = 1,024": transforms.seconds(loads[1], backward=True)[1],
                "hybrid": products.seconds(near, backward=True)[1] if n // ranks >= 3584 else None,
                "ring": products.seconds(ring, backward=True)[1],
            }
            known = {name: value for name, value in seconds.items() if value is not None}
            texts = ["" if value is None else f"{value:.2g}" for value in seconds.values()]
            sent = (loads[0].sent_forward + loads[0].sent_backward) / 1e9
            print(
                f"| {n:,} | {ranks} | {layout} | {sent:.2f} | {' | '.join(texts)} "
                f"| {min(known, key=lambda name: known[name])} |"
            )
    tokens = 1 << 20
    print(f"\nMB that a rank sends forward: one head, d = 64, k = 16, float32, {tokens:,} tokens\n")
    print("| ranks | columns | spectra | spectra / columns |\n|---|---|---|---|")
    for ranks in (2, 4, 8, 16, 32, 64, 128, 256):
        columns = attention_load(tokens, ranks, layout="columns", **ONE_HEAD).sent_forward
        spectra = spectra_load(tokens, ranks, **ONE_HEAD).sent_forward
        print(f"| {ranks} | {columns / 1e6:.1f} | {spectra / 1e6:.1f} | {spectra / columns:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "predict"), default="run")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--length", type=int, default=16_385)
    parser.add_argument("--long", type=int, default=524_288)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--network", type=float, default=5e10, help="bytes/s, of predictions")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/distributed.json")
    options = parser.parse_args()
    if options.what == "predict":
        predict(options.network)
        return
    if options.backend == "nccl":
        dist.init_process_group("nccl")
        found = [of_rank(options)]
        if dist.get_rank():
            return
    else:
        found = launched(options)
    show(found)
    content = {"torch": torch.__version__, "python": platform.python_version(), "quick": options.quick}
    content |= {"backend": options.backend, "found": found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    part = options.output.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(options.output)
    check(found)


if __name__ == "__main__":
    main()
