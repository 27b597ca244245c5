"""Checks that run in the ranks of one launch: sharded attention against that of one process."""

import pytest
import torch
from comparison import assert_close
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import convbasis as cb
from convbasis import distributed


def mesh_of(ranks):
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tokens",))


def split(n, ranks, kind="even"):
    """Return the tokens of each rank: as torch.chunk, or uneven, the first ranks with few."""
    if kind == "even" or ranks == 1:
        return [len(x) for x in torch.arange(n).tensor_split(ranks)]
    sizes = [3 + 2 * rank for rank in range(ranks - 1)]
    return [*sizes, n - sum(sizes)] if kind == "uneven" else [0, *split(n, ranks - 1)]


def own(tensor, lengths, rank, dim=2):
    return tensor.split(lengths, dim)[rank].detach().clone()


def inputs(batch, heads, kv_heads, n, d, d_v, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n, d), (batch, kv_heads, n, d), (batch, kv_heads, n, d_v))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def compare(rank, lengths, single, sharded, tensors, dims, everywhere=(), limit=1e-5):
    """Compare output and gradients of one process with those of this rank.

    Args:
        single: takes whole tensors.
        sharded: takes this rank's.
        tensors: whole ones, which are split along dims.
        everywhere: tensors that every rank has.
    """
    whole = [x.clone().requires_grad_(x.is_floating_point()) for x in (*tensors, *everywhere)]
    expected = single(*whole)
    up = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=expected.dtype)
    expected.backward(up)
    mine = [own(x, lengths, rank, dim) for x, dim in zip(tensors, dims, strict=True)]
    mine = [x.requires_grad_(x.is_floating_point()) for x in (*mine, *(x.clone() for x in everywhere))]
    output = sharded(*mine)
    output.backward(own(up, lengths, rank))
    near = {"whole": limit, "row": limit}
    expected = expected.detach()
    pairs = [(own(expected, lengths, rank), output.detach(), expected)]
    for index, dim in enumerate(dims):
        if whole[index].grad is not None:
            pairs.append(
                (own(whole[index].grad, lengths, rank, dim), mine[index].grad, whole[index].grad)
            )
    for want, found, of in pairs:
        assert want.shape == found.shape
        if want.numel():
            # A row whose gradient all but cancels is held against the mean row.
            rows = torch.linalg.vector_norm(of.double(), dim=-1) if of.ndim == 4 else of.double().abs()
            floor = rows.mean()
            scale = (
                torch.linalg.vector_norm(want.double(), dim=-1)
                if want.ndim == 4
                else want.double().abs()
            )
            if want.ndim != 4:
                want, found = want[..., None], found[..., None]
            assert_close(want, found, **near, row_scale=scale.clamp(min=floor))
    for index in range(len(dims), len(whole)):
        total = mine[index].grad.clone()
        torch.distributed.all_reduce(total)
        assert_close(whole[index].grad, total, whole=limit, row=10 * limit)


def starts_of_heads(batch, heads, n):
    """Return starts of each head, ``(B, H, 3)``; one has fewer than others."""
    second = torch.arange(batch * heads).view(batch, heads) + 10
    third = (2 * second + 30).index_fill(1, torch.tensor([0]), n)
    return torch.stack([torch.zeros_like(second), second, third], dim=-1)


def conv_basis(rank, ranks):
    mesh = mesh_of(ranks)
    cases = [
        # batch, heads, kv_heads, n, d, d_v, split, options
        (1, 4, 4, 333, 16, 16, "even", {"segment_length": 37}),
        (2, 4, 2, 93, 8, 6, "uneven", {"segment_length": 7, "exchange": "logits"}),
        (2, 4, 2, 257, 8, 12, "uneven", {"segment_length": 16}),  # queries and keys
        (1, 1, 1, 301, 16, 8, "even", {"segment_length": 50}),  # one head: columns
        (2, 2, 1, 129, 4, 7, "empty", {"segment_length": 9, "gradient": "attention"}),
        (1, 5, 1, 200, 16, 3, "even", {"num_bases": 3, "delta": 0.5}),
        (1, 6, 3, 97, 8, 8, "uneven", {"starts": [0, 20, 77], "layout": "columns"}),
        (1, 3, 3, 64, 8, 5, "even", {"segment_length": 11, "backend": "partitioned"}),
        (1, 1, 1, 90, 8, 4, "even", {"segment_length": 40, "layout": "heads"}),  # ranks without work
        (2, 4, 2, 90, 8, 4, "even", {"starts": starts_of_heads(2, 4, 90)}),
        (2, 2, 1, 90, 8, 4, "even", {"starts": starts_of_heads(2, 2, 90), "layout": "columns"}),
    ]
    for batch, heads, kv_heads, n, d, d_v, kind, options in cases:
        tensors = inputs(batch, heads, kv_heads, n, d, d_v)
        lengths = split(n, ranks, kind)
        one = {name: x for name, x in options.items() if name not in ("layout", "exchange")}
        compare(
            rank,
            lengths,
            lambda *x, one=one: cb.conv_basis_attention(*x, enable_gqa=True, **one),
            lambda *x, options=options: distributed.conv_basis_attention(
                *x, mesh=mesh, enable_gqa=True, timeout=60, **options
            ),
            tensors,
            (2, 2, 2),
        )


def long_in_float64(rank, ranks):
    """Where float32 loses digits in rows with small gradients, float64 does not."""
    n = 4097
    for heads, exchange in ((2, "logits"), (1, "auto")):
        compare(
            rank,
            split(n, ranks),
            lambda *x: cb.conv_basis_attention(*x, segment_length=257),
            lambda *x, exchange=exchange: distributed.conv_basis_attention(
                *x, mesh=mesh_of(ranks), segment_length=257, exchange=exchange
            ),
            inputs(1, heads, heads, n, 16, 8, torch.float64),
            (2, 2, 2),
            limit=1e-8,
        )


def biases_and_padding(rank, ranks):
    mesh = mesh_of(ranks)
    n, lengths = 201, split(201, ranks)
    real = torch.ones(2, n, dtype=torch.bool)
    real[0, :30] = real[1, 180:] = real[1, 90:95] = False
    for kv_heads, length, exchange in ((2, 20, "queries"), (4, 60, "logits")):
        q, k, v = inputs(2, 4, kv_heads, n, 8, 6)
        by_key, by_lag = torch.randn(2, 4, n), torch.randn(4, n)
        options = {"segment_length": length, "enable_gqa": True, "exchange": exchange}
        biased(rank, mesh, lengths, [q, k, v, by_key], by_lag, None, options)
        q[0, :, :30] = float("nan")  # never used
        biased(rank, mesh, lengths, [q, k, v, by_key], by_lag, real, options)


def biased(rank, mesh, lengths, tensors, by_lag, mask, options):
    own_mask = None if mask is None else own(mask, lengths, rank, 1)

    def single(q, k, v, by_key, by_lag):
        more = {"key_bias": by_key, "lag_bias": by_lag, "key_padding_mask": mask}
        one = {name: x for name, x in options.items() if name != "exchange"}
        return cb.conv_basis_attention(q, k, v, **more, **one)

    def sharded(q, k, v, by_key, by_lag):
        more = {"key_bias": by_key, "lag_bias": by_lag, "key_padding_mask": own_mask}
        return distributed.conv_basis_attention(q, k, v, mesh=mesh, **more, **options)

    compare(rank, lengths, single, sharded, tensors, (2, 2, 2, 2), [by_lag])


def documents(rank, ranks):
    mesh = mesh_of(ranks)
    n, lengths = 150, split(150, ranks, "uneven")
    packed = {"segment_length": 16, "document_lengths": [40, 1, 69, 40], "enable_gqa": True}
    compare(
        rank,
        lengths,
        lambda *x: cb.conv_basis_attention(*x, **packed),
        lambda *x: distributed.conv_basis_attention(*x, mesh=mesh, **packed),
        inputs(1, 2, 1, n, 8, 5),
        (2, 2, 2),
    )


def sharded_and_whole(rank, ranks, tensors, more=(), exchange="auto", **options):
    """Return this rank's part of one process's output, and what this rank computes."""
    mesh, lengths = mesh_of(ranks), split(tensors[0].shape[2], ranks)
    options = {"segment_length": 20, "enable_gqa": True, **options}
    by_key = dict(more)
    want = cb.conv_basis_attention(*tensors, **by_key, **options)
    mine = (own(x, lengths, rank) for x in tensors)
    by_key = {name: own(x, lengths, rank) for name, x in by_key.items()}
    found = distributed.conv_basis_attention(*mine, mesh=mesh, exchange=exchange, **by_key, **options)
    return own(want, lengths, rank), found


def half_types(rank, ranks):
    tensors = inputs(1, 4, 2, 100, 8, 8, torch.bfloat16)
    want, found = sharded_and_whole(rank, ranks, tensors)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, want)
    # Logits travel in float32: as bfloat16 they would be rounded once more than in one process.
    large = [8 * tensors[0], *tensors[1:]]
    want, found = sharded_and_whole(rank, ranks, large, exchange="logits")
    assert found.dtype == torch.bfloat16
    assert float((found.float() - want.float()).abs().max()) < 2**-7 * float(want.float().abs().max())
    assert float((found != want).float().mean()) < 0.02


def mixed_types(rank, ranks):
    """Biases of another dtype than the query's; queries and keys of two under autocast."""
    by_key = torch.randn(1, 4, 100, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = inputs(1, 4, 2, 100, 8, 8, dtype)
        for bias in (by_key, by_key.float(), by_key.bfloat16()):
            want, found = sharded_and_whole(rank, ranks, tensors, {"key_bias": bias})
            assert found.dtype == want.dtype == dtype
            limit = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 2**-7}[dtype]
            assert_close(want.float(), found.float(), whole=limit, row=limit)
    query, key, value = inputs(1, 4, 2, 100, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, found = sharded_and_whole(rank, ranks, [query, key.bfloat16(), value])
    assert found.dtype == want.dtype == torch.bfloat16
    assert torch.equal(found, want)


def second_backward(rank, ranks):
    mesh, lengths = mesh_of(ranks), split(40, ranks)
    mine = [own(x, lengths, rank).requires_grad_() for x in inputs(1, 2, 2, 40, 4, 4)]
    output = distributed.conv_basis_attention(*mine, mesh=mesh, segment_length=9)
    output.sum().backward(retain_graph=True)
    with pytest.raises(cb.ConvBasisError, match="a second backward pass over the same output"):
        output.sum().backward()


def checkpointed(rank, ranks):
    """A region that is computed again in the backward pass, with attention last and within."""
    lengths = split(96, ranks)
    near = {"window": 7, "columns": 3}
    for heads, call, options in (
        (1, distributed.conv_basis_attention, {"segment_length": 20, "layout": "heads"}),
        (1, distributed.conv_basis_attention, {"segment_length": 20, "layout": "columns"}),
        (1, distributed.conv_basis_attention, {"segment_length": 20, "layout": "spectra"}),
        (2, distributed.hybrid_attention, {**near, "layout": "tokens"}),
        (1, distributed.hybrid_attention, {**near, "layout": "heads"}),
    ):
        tensors = inputs(1, heads, heads, 96, 8, 8)

        def attend(*x, call=call, options=options):
            return call(*(t.sin() for t in x), mesh=mesh_of(ranks), **options)

        def within(*x, attend=attend):
            return attend(*x).square().cos()

        for region in (attend, within):
            found = []
            for early, reentrant in ((None, None), (True, False), (False, False), (True, True)):
                mine = [own(x, lengths, rank).requires_grad_() for x in tensors]
                if early is None:
                    output = region(*mine)
                    output.square().sum().backward()
                else:
                    with set_checkpoint_early_stop(early):
                        output = checkpoint(region, *mine, use_reentrant=reentrant)
                        output.square().sum().backward()
                found.append([x.grad for x in mine])
            for other in found[1:]:
                for one, two in zip(found[0], other, strict=True):
                    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def changed_in_place(rank, ranks):
    """What backward needs must not be written to, as with one process."""
    mine = [own(x, split(96, ranks), rank).requires_grad_() for x in inputs(1, 4, 4, 96, 8, 8)]
    query = mine[0] * 1.0
    output = distributed.hybrid_attention(query, *mine[1:], mesh=mesh_of(ranks), window=7)
    with torch.no_grad():
        query.zero_()
    # All ranks stop at the same place, so that they are still in step.
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        output.sum().backward()


def hybrid(rank, ranks):
    mesh = mesh_of(ranks)
    cases = [
        # heads, kv_heads, n, split, options
        (4, 2, 401, "even", {"window": 32, "columns": 8}),
        (2, 2, 350, "even", {"window": 20, "columns": 6, "seed": 3}),
        (2, 1, 301, "uneven", {"window": 170, "columns": 5, "sinks": 2}),  # halos of several ranks
        (1, 1, 260, "empty", {"window": 40, "columns": 0}),
        (2, 2, 100, "even", {"window": 200}),
        (3, 3, 500, "even", {"window": 64, "columns": 4, "blocks": 1}),
        (1, 1, 450, "even", {"window": 64, "columns": 4, "far_field": "segments", "num_segments": 4}),
        (2, 1, 250, "even", {"window": 32, "columns": 4, "layout": "columns"}),
        (2, 2, 300, "uneven", {"window": 32, "columns": 4, "far_field": "conv", "num_segments": 3}),
        (2, 1, 300, "even", {"window": 32, "columns": 4, "correction": True, "blocks": 1}),
        (2, 2, 300, "even", {"window": 32, "columns": 4, "strict": True}),
        (1, 1, 300, "even", {"window": 32, "far_field": "segments", "key_weights": True}),
    ]
    for heads, kv_heads, n, kind, options in cases:
        lengths = split(n, ranks, kind)
        one = {name: x for name, x in options.items() if name != "layout"}
        compare(
            rank,
            lengths,
            lambda *x, one=one: cb.hybrid_attention(*x, enable_gqa=True, **one),
            lambda *x, options=options: distributed.hybrid_attention(
                *x, mesh=mesh, enable_gqa=True, **options
            ),
            inputs(2, heads, kv_heads, n, 16, 8),
            (2, 2, 2),
        )


def hybrid_with_padding(rank, ranks):
    mesh = mesh_of(ranks)
    lengths = split(300, ranks)
    q, k, v = inputs(2, 2, 2, 300, 8, 8)
    real = torch.ones(2, 300, dtype=torch.bool)
    real[0, :60] = real[1, 250:] = False
    mask = own(real, lengths, rank, 1)
    compare(
        rank,
        lengths,
        lambda *x: cb.hybrid_attention(*x, window=40, key_padding_mask=real),
        lambda *x: distributed.hybrid_attention(*x, mesh=mesh, window=40, key_padding_mask=mask),
        [q, k, v],
        (2, 2, 2),
    )


def hybrid_of_half_types(rank, ranks):
    """Output and gradients are those of one process but for the last digits of bfloat16.

    A key's gradient is a sum of two ranks' parts. Each part, the sum, and the one process' own are
    rounded, by up to 2^-8 of their size each.
    """
    mesh, lengths = mesh_of(ranks), split(400, ranks)
    compare(
        rank,
        lengths,
        lambda *x: cb.hybrid_attention(*x, window=40, columns=4, enable_gqa=True),
        lambda *x: distributed.hybrid_attention(*x, mesh=mesh, window=40, columns=4, enable_gqa=True),
        inputs(1, 4, 2, 400, 8, 8, torch.bfloat16),
        (2, 2, 2),
        limit=3 * 2**-8,
    )


CHECKS = (
    conv_basis,
    long_in_float64,
    biases_and_padding,
    documents,
    half_types,
    mixed_types,
    second_backward,
    checkpointed,
    changed_in_place,
    hybrid,
    hybrid_with_padding,
    hybrid_of_half_types,
)


def run_all(checks, rank, ranks):
    """Run checks one after the other, each from the same seed."""
    for check in checks:
        torch.manual_seed(0)
        check(rank, ranks)


def everything(rank, ranks):
    run_all(CHECKS, rank, ranks)
    return True
