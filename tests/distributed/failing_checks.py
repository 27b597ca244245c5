"""What goes wrong in one rank, on purpose, and what the other ranks then say."""

import os
import signal
import time

import pytest
import torch
from sharded_checks import inputs, mesh_of, own, split
from torch.distributed.tensor import Shard, distribute_tensor

import convbasis as cb
from convbasis import distributed
from convbasis.distributed.ranks import ranks_of

TIMEOUT = 8.0  # seconds; half of it is for the exchange


def attend(rank, ranks, **changes):
    lengths = split(96, ranks)
    tensors = [own(x, lengths, rank) for x in inputs(1, 3, 3, 96, 8, 8)]
    options = {"mesh": mesh_of(ranks), "segment_length": 20, "timeout": TIMEOUT, **changes}
    return distributed.conv_basis_attention(*options.pop("tensors", tensors), **options)


def told(call):
    """Return the message of the error that a call raises, and how long it took."""
    begin = time.monotonic()
    try:
        call()
    except (distributed.DistributedError, ValueError) as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "no error", "", time.monotonic() - begin


def mismatches(rank, ranks):
    """What ranks were given differs; the group stays whole, so that all run in one launch."""
    found = {}
    odd = rank == 1
    found["heads"] = told(
        lambda: attend(rank, ranks, **({"tensors": inputs(1, 2, 2, 30, 8, 8)} if odd else {}))
    )
    found["dtype"] = told(
        lambda: attend(
            rank, ranks, **({"tensors": inputs(1, 3, 3, 32, 8, 8, torch.float64)} if odd else {})
        )
    )
    found["argument"] = told(lambda: attend(rank, ranks, segment_length=21 if odd else 20))
    bad = inputs(1, 3, 3, 32, 8, 8)
    bad[1][0, 0, 5, 0] = float("nan")
    found["nan"] = told(lambda: attend(rank, ranks, **({"tensors": bad} if odd else {})))
    found["hybrid"] = told(
        lambda: distributed.hybrid_attention(
            *inputs(1, 1, 1, 10, 8, 8), mesh=mesh_of(ranks), window=7 + odd
        )
    )
    mine = [own(x, split(96, ranks), rank) for x in inputs(1, 3, 3, 96, 8, 8)]
    count = mine[0].shape[2]
    for name, wrong, right in (
        (
            "bias of another shape",
            {"key_bias": torch.zeros(3, count + 1)},
            {"key_bias": torch.zeros(count)},
        ),
        ("no bias by key", {"key_bias": 1.0}, {"key_bias": torch.zeros(count)}),
        (
            "nan by key",
            {"key_bias": torch.zeros(count).index_fill(0, torch.tensor(2), float("nan"))},
            {"key_bias": torch.zeros(count)},
        ),
        (
            "inf by lag",
            {"lag_bias": torch.full((96,), float("inf"))},
            {"lag_bias": torch.zeros(96)},
        ),
        ("no bias by lag", {"lag_bias": [1.0]}, {"lag_bias": torch.zeros(96)}),
        ("timeout", {"timeout": 0}, {}),
    ):
        changes = wrong if odd else right
        found[name] = told(lambda changes=changes: attend(rank, ranks, **changes))
    spread = [distribute_tensor(x, mesh_of(ranks), [Shard(2)]) for x in inputs(1, 3, 3, 96, 8, 8)]
    if odd:
        spread[1] = mine[1]
    found["placed"] = told(
        lambda: distributed.conv_basis_attention(*spread, segment_length=20, timeout=TIMEOUT)
    )
    torch.manual_seed(0)
    layer = cb.nn.ConvBasisAttention(12, 2, mesh=mesh_of(ranks), timeout=TIMEOUT, segment_growth=1.0)
    hidden = torch.zeros(1, 4, 13 if odd else 12)
    found["layer"] = told(lambda: layer(hidden))
    hidden, documents = torch.zeros(1, 4, 12), [5 if odd else 4] * ranks
    found["documents"] = told(lambda: layer(hidden, document_lengths=documents))
    with torch.set_grad_enabled(not odd):
        bias = torch.zeros(count, requires_grad=True)
        found["gradient"] = told(lambda: attend(rank, ranks, key_bias=bias))
    nothing = inputs(1, 3, 3, 0, 8, 8)
    found["no tokens"] = told(lambda: attend(rank, ranks, tensors=nothing))
    found["after"] = told(lambda: attend(rank, ranks))
    return found


def out_of_step(rank, ranks):
    """One rank leaves out a backward pass, and goes on to the next call."""
    mine = [own(x, split(96, ranks), rank).requires_grad_() for x in inputs(1, 3, 3, 96, 8, 8)]
    output = attend(rank, ranks, tensors=mine)
    if rank == 1:
        return told(lambda: attend(rank, ranks))
    return told(lambda: output.sum().backward())


def late(rank, ranks):
    """One rank comes when the others have given up, but before the time is over."""
    attend(rank, ranks)
    if rank == 1:
        time.sleep(2.9)
    return told(lambda: attend(rank, ranks, timeout=4.0))


def refuses_while_another_hangs(rank, ranks):
    attend(rank, ranks)
    if rank == 2:
        hang()
    mine = [own(x, split(96, ranks), rank) for x in inputs(1, 3, 3, 96, 8, 8)]
    if rank == 0:
        mine[1] = mine[1].double()
    return told(lambda: attend(rank, ranks, tensors=mine, timeout=3.0))


def refuses_alone(rank, ranks):
    """One tensor is placed otherwise: found out before the handshake, in its own time limit."""
    spread = [distribute_tensor(x, mesh_of(ranks), [Shard(2)]) for x in inputs(1, 3, 3, 96, 8, 8)]
    if rank == 1:
        hang()
    spread[1] = spread[1].to_local()
    call = lambda: distributed.conv_basis_attention(*spread, segment_length=20, timeout=3.0)  # noqa: E731
    return told(call)


def hang():
    while True:
        signal.pause()


def stop_within(way):
    """Let this rank die or fail in the middle of attention."""
    from convbasis.distributed import attention, by_tokens

    def stop(*_, **__):
        if way.startswith("fails"):
            raise RuntimeError("no memory is left")
        os.kill(os.getpid(), signal.SIGKILL)

    attention.attention_of_one = by_tokens.heavy_columns = stop


def missing(rank, ranks, way):
    """One rank of some dies, hangs or fails, before the call, in it or in the backward pass."""
    odd = rank == (0 if way == "its store stops" else 2)
    attend(rank, ranks)
    tensors = [own(x, split(500, ranks), rank) for x in inputs(1, 2, 2, 500, 8, 8)]

    def call():
        if "hybrid" in way:
            return distributed.hybrid_attention(
                *tensors, mesh=mesh_of(ranks), window=8, timeout=TIMEOUT
            )
        if "layer" in way:
            layer = cb.nn.ConvBasisAttention(16, 2, mesh=mesh_of(ranks), timeout=TIMEOUT)
            return layer(torch.ones(1, 9, 16))
        return attend(rank, ranks, **({"tensors": tensors} if "backward" in way else {}))

    if odd and "before" in way:
        hang() if way.startswith("hangs") else os.kill(os.getpid(), signal.SIGKILL)
    if odd and way == "its store stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if "backward" in way:
        for x in tensors:
            x.requires_grad_()
        output = call()
        if odd:
            hang() if way.startswith("hangs") else os.kill(os.getpid(), signal.SIGKILL)
        return told(lambda: output.sum().backward())
    if odd:
        stop_within(way)
        try:
            call()
        except RuntimeError as error:
            # It does not wait for ranks that will not come.
            again = told(lambda: attend(rank, ranks))
            assert "has failed before" in again[1]
            assert again[2] < 1
            return type(error).__name__, str(error), 0.0
    first = told(call)
    again = told(lambda: attend(rank, ranks))
    assert "has failed before" in again[1]
    return first


def begun_again(rank, ranks, folder):
    """A group that failed is gone with its name, which torch gives to the next one."""
    group = torch.distributed.group.WORLD
    name = group.group_name
    with pytest.raises(KeyboardInterrupt), ranks_of(mesh_of(ranks), TIMEOUT).noted():
        raise KeyboardInterrupt
    assert "has failed before" in told(lambda: attend(rank, ranks))[1]
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/again", rank=rank, world_size=ranks
    )
    assert torch.distributed.group.WORLD.group_name == name
    return told(lambda: attend(rank, ranks))[0]
