"""Trains one layer over the tokens of all ranks, checkpoint after checkpoint; started by launchers.

    train_script.py FOLDER [accelerate]

Rank 1 of a first attempt under torchrun kills itself before its fourth step.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import convbasis as cb
from convbasis.storage import load_tensors, save_tensors

STEPS, TOKENS, WIDTH = 6, 45, 16


def data():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 1, TOKENS, WIDTH, generator=generator).unbind()


def made(mesh=None):
    torch.manual_seed(1)
    return cb.nn.ConvBasisAttention(WIDTH, 2, segment_length=6, mesh=mesh)


def step(layer, optimizer, hidden, target, ranks=1):
    """Make one step on the mean loss over all tokens, and return it."""
    loss = (layer(hidden) - target).square().sum() / (TOKENS * WIDTH)
    optimizer.zero_grad()
    loss.backward()
    total = loss.detach().clone()
    if ranks > 1:
        for parameter in layer.parameters():
            dist.all_reduce(parameter.grad)
        dist.all_reduce(total)
    optimizer.step()
    return float(total)


def state(layer, optimizer):
    """Return parameters and momenta by name."""
    found = {f"layer.{name}": parameter for name, parameter in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        found[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    return found


def restore(layer, optimizer, place):
    """Read a checkpoint, if there is one, and return the number of steps that it has made."""
    if not place.is_file():
        return 0
    tensors, notes = load_tensors(place, "checkpoint", [])
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(tensors[f"layer.{name}"])
            optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"]
    return int(notes["steps"])


def main(folder, launcher="torchrun"):
    torch.set_num_threads(1)
    if launcher == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
    else:
        dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layer = made(init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    if launcher == "accelerate":
        optimizer = accelerator.prepare(optimizer)
    hidden, target = (x.tensor_split(ranks, dim=1)[rank] for x in data())
    place = Path(folder) / "checkpoint.safetensors"
    first = restore(layer, optimizer, place)
    for index in range(first, STEPS):
        if index == 3 and rank == 1 and first == 0 and launcher == "torchrun":
            os.kill(os.getpid(), signal.SIGKILL)
        loss = step(layer, optimizer, hidden, target, ranks)
        if rank == 0:
            with (Path(folder) / "losses.jsonl").open("a") as file:
                file.write(json.dumps({"step": index, "loss": loss, "first": first}) + "\n")
            save_tensors(
                place, state(layer, optimizer), {"format": "checkpoint", "steps": str(index + 1)}
            )
    dist.barrier()  # rank 0 holds the store: it goes last
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # A thread of gloo that still frees a tensor while the interpreter ends would abort the process.
    os._exit(0)
