"""Checks that run in ranks: bytes that were sent are those that the model predicts."""

import torch
from sharded_checks import inputs, mesh_of, own, split

from convbasis import distributed
from convbasis.distributed.cost import attention_load, hybrid_load
from convbasis.distributed.ranks import state_of

N, D = 1200, 16


def sent(rank, ranks):
    """Return predicted and counted bytes of each case, forward and backward, of the busiest rank."""
    mesh, lengths = mesh_of(ranks), split(N, ranks)
    found = []
    for heads, kv_heads, segments, exchange in (
        (4, 4, 8, "auto"),
        (4, 2, 8, "logits"),
        (1, 1, 8, "auto"),
        (1, 1, 40, "auto"),
        (6, 3, 8, "logits"),
    ):
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": D, "segments": segments}
        load = attention_load(N, ranks, **sizes, exchange=exchange)
        length = -(-N // segments)
        options = {"segment_length": length, "enable_gqa": True, "exchange": exchange}
        call = distributed.conv_basis_attention
        found.append(measured(rank, lengths, mesh, (heads, kv_heads), call, options, load))
    load = hybrid_load(N, ranks, heads=4, kv_heads=2, head_dim=D, window=100, columns=12)
    options = {"window": 100, "columns": 12, "enable_gqa": True}
    call = distributed.hybrid_attention
    found.append(measured(rank, lengths, mesh, (4, 2), call, options, load))
    return found


def measured(rank, lengths, mesh, heads, call, options, load, n=N, heavy=8):
    tensors = inputs(1, *heads, n, D, D)
    # The first tokens are heavy: the rank that has them sends all columns.
    tensors[1][:, :, :16] *= heavy
    mine = [own(x, lengths, rank).requires_grad_() for x in tensors]
    group = state_of(mesh.get_group())
    counted = [group.sent]
    output = call(*mine, mesh=mesh, **options)
    counted.append(group.sent)
    output.sum().backward()
    counted.append(group.sent)
    most = torch.tensor(counted).diff()
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return [load.sent_forward, load.sent_backward, *most.tolist()]
