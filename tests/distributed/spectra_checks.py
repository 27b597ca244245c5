"""Checks that run in the ranks of one launch: spectra over ranks against one process in float64."""

import pytest
import torch
from cost_checks import measured
from sharded_checks import compare, inputs, mesh_of, own, run_all, split

import convbasis as cb
from convbasis import distributed
from convbasis.distributed import attention
from convbasis.distributed.cost_spectra import spectra_load
from convbasis.distributed.ranks import state_of

LOST = "rows are lost in the rounding of spectra over ranks"
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-8}


def against_float64(
    rank, ranks, tensors, kind, more=(), mask=None, lag_bias=None, lost=False, **options
):
    """Compare output and gradients, and check what ran.

    Args:
        more: a bias of keys, if any.
        lost: whether rows are lost, so that columns are spread.
    """
    n, dtype = tensors[0].shape[2], tensors[0].dtype
    lengths = split(n, ranks, kind)
    over = {"mesh": mesh_of(ranks), "layout": "spectra", "timeout": 60}
    one = {name: x for name, x in options.items() if name != "exchange"}
    own_mask = None if mask is None else own(mask, lengths, rank, 1)
    keyed = bool(more)

    def biases(rest):
        return {
            "key_bias": rest[0] if keyed else None,
            "lag_bias": rest[-1] if len(rest) > keyed else None,
        }

    def single(q, k, v, *rest):
        known = {name: None if x is None else x.double() for name, x in biases(rest).items()}
        wide = [x.double() for x in (q, k, v)]
        return cb.conv_basis_attention(*wide, enable_gqa=True, key_padding_mask=mask, **known, **one)

    def sharded(q, k, v, *rest):
        known = {"key_padding_mask": own_mask, **biases(rest), **over, **options}
        output = distributed.conv_basis_attention(q, k, v, enable_gqa=True, **known)
        ran = cb.last_dispatch()
        assert output.dtype == dtype
        assert (LOST in ran.reason) == lost, ran
        assert (ran.backend == "spectra") != lost, ran
        return output.double()

    everywhere = [] if lag_bias is None else [lag_bias]
    limit = LIMIT[dtype]
    whole = [*tensors, *more]
    compare(rank, lengths, single, sharded, whole, (2,) * len(whole), everywhere, limit=limit)


def shapes(rank, ranks):
    for batch, heads, kv_heads, n, d, d_v, kind, options in (
        (1, 1, 1, 301, 16, 8, "even", {"segment_length": 50}),
        (2, 4, 2, 157, 8, 6, "uneven", {"starts": [0, 20, 77]}),  # starts within shards
        (1, 2, 1, 129, 4, 7, "empty", {"segment_length": 9, "exchange": "logits"}),  # k > ranks
        (1, 3, 3, 64, 8, 1, "even", {"starts": [0]}),
    ):
        tensors = inputs(batch, heads, kv_heads, n, d, d_v)
        against_float64(rank, ranks, tensors, kind, **options)


def in_float64(rank, ranks):
    for heads, kv_heads, n, kind, length in ((1, 1, 1021, "even", 67), (2, 1, 3, "even", 2)):
        tensors = inputs(1, heads, kv_heads, n, 8, 4, torch.float64)
        against_float64(rank, ranks, tensors, kind, segment_length=length)


def biased_and_padded(rank, ranks):
    n = 141
    real = torch.ones(2, n, dtype=torch.bool)
    real[0, :30] = real[1, 120:] = real[1, 60:65] = False
    tensors = inputs(2, 4, 2, n, 8, 5)
    by_key, by_lag = torch.randn(2, 4, n), torch.randn(2, 4, n)
    against_float64(rank, ranks, tensors, "even", mask=real, segment_length=20)
    against_float64(rank, ranks, tensors, "uneven", [by_key], lag_bias=by_lag, segment_length=60)
    tensors[0][0, :, :30] = float("nan")  # never used
    against_float64(rank, ranks, tensors, "even", [by_key], real, by_lag, segment_length=20)


def logits_beyond_the_last_token(rank, ranks):
    """Those of padding do not count, however large they are beside the others."""
    query, key, value = inputs(1, 1, 1, 141, 8, 4, torch.float64)
    tensors = [0.1 * query + 7, 0.1 * key - 7, value]
    real = torch.arange(141)[None] < 100
    against_float64(rank, ranks, tensors, "even", mask=real, segment_length=20)


def values_that_begin_late(rank, ranks):
    """Rows that see zeros alone are zero, whatever a transform makes of them."""
    query, key, value = inputs(1, 1, 1, 90, 8, 4)
    value[:, :, :9] = 0.0
    tensors = [query, key, value]
    against_float64(rank, ranks, tensors, "even", segment_length=20)
    lengths = split(90, ranks)
    mine = [own(x, lengths, rank) for x in tensors]
    options = {"segment_length": 20, "layout": "spectra"}
    found = distributed.conv_basis_attention(*mine, mesh=mesh_of(ranks), **options)
    first = sum(lengths[:rank])
    assert bool((found[:, :, : max(0, 9 - first)] == 0).all())


def lost_rows(rank, ranks):
    query, key, value = inputs(1, 1, 1, 200, 8, 4, torch.float64)
    for factor in (1, 30):
        tensors = [factor * query, key, value]
        against_float64(rank, ranks, tensors, "even", lost=factor > 1, segment_length=25)


def half_types(rank, ranks):
    tensors = inputs(1, 1, 1, 100, 8, 8, torch.bfloat16)
    lengths = split(100, ranks)
    want = own(
        cb.conv_basis_attention(*(x.double() for x in tensors), segment_length=20), lengths, rank
    )
    mine = [own(x, lengths, rank) for x in tensors]
    options = {"segment_length": 20, "layout": "spectra"}
    found = distributed.conv_basis_attention(*mine, mesh=mesh_of(ranks), **options)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), want, rtol=2**-7, atol=2**-9)


def chosen(rank, ranks):
    """It is chosen where it is said to have fewer bytes than columns, and only where it can be used."""
    lengths = split(60, ranks)
    mine = [own(x, lengths, rank) for x in inputs(1, 1, 1, 60, 16, 4)]

    def ran(**more):
        options = {"segment_length": 20, **more}
        distributed.conv_basis_attention(*mine, mesh=mesh_of(ranks), **options)
        return cb.last_dispatch().backend

    assert ran() != "spectra"
    before = attention.spectra_pay
    attention.spectra_pay = lambda *_: True
    try:
        assert (ran() == "spectra") == (ranks > 1)  # one rank has a head for itself
        for more in (
            {"gradient": "attention"}, {"max_bytes": 1 << 20}, {"backend": "direct"},
            {"exchange": "queries"}, {"layout": "columns"}, {"document_lengths": [20, 40]},
        ):  # fmt: skip
            assert ran(**more) != "spectra", more
    finally:
        attention.spectra_pay = before


def fewer_bytes(rank, ranks):
    """Many segments and few value columns are enough for four ranks to have fewer bytes so."""
    mesh = mesh_of(ranks)
    mine = [own(x, split(1024, ranks), rank) for x in inputs(1, 1, 1, 1024, 64, 4)]
    sent = []
    for layout in ("columns", "auto"):
        before = state_of(mesh.get_group()).sent
        distributed.conv_basis_attention(*mine, mesh=mesh, segment_length=16, layout=layout)
        sent.append(state_of(mesh.get_group()).sent - before)
    most = torch.tensor(sent)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    assert (cb.last_dispatch().backend == "spectra") == (ranks == 4)
    assert (int(most[1]) < int(most[0])) == (ranks == 4)


def refused(rank, ranks):
    lengths = split(60, ranks)
    mine = [own(x, lengths, rank) for x in inputs(1, 1, 1, 60, 8, 4)]
    for more, words in (
        ({"segment_length": 20, "gradient": "attention"}, "gradient='attention'"),
        ({"segment_length": 20, "exchange": "queries"}, "exchange='queries'"),
        ({"segment_length": 20, "backend": "fft"}, "backend='fft'"),
        ({"segment_length": 20, "max_bytes": 4096}, "max_bytes=4096"),
        ({"segment_length": 20, "document_lengths": [20, 40]}, "segments that are recovered, packed"),
        ({"num_bases": 2}, "segments that are recovered, packed"),
    ):
        with pytest.raises(cb.InputError, match="layout='spectra' cannot be used with") as told:
            distributed.conv_basis_attention(*mine, mesh=mesh_of(ranks), layout="spectra", **more)
        assert words in str(told.value)


def second_backward(rank, ranks):
    lengths = split(40, ranks)
    mine = [own(x, lengths, rank).requires_grad_() for x in inputs(1, 2, 2, 40, 4, 4)]
    options = {"segment_length": 9, "layout": "spectra"}
    output = distributed.conv_basis_attention(*mine, mesh=mesh_of(ranks), **options)
    output.sum().backward(retain_graph=True)
    with pytest.raises(cb.ConvBasisError, match="a second backward pass over the same output"):
        output.sum().backward()


CHECKS = (
    shapes,
    in_float64,
    biased_and_padded,
    logits_beyond_the_last_token,
    values_that_begin_late,
    lost_rows,
    half_types,
    chosen,
    fewer_bytes,
    refused,
    second_backward,
)


def everything(rank, ranks):
    """Run all checks, and return bytes as predicted and as counted."""
    run_all(CHECKS, rank, ranks)
    return sent(rank, ranks)


def sent(rank, ranks):
    """Return predicted and counted bytes of each case, forward and backward, of the busiest rank."""
    n, d = 1201, 16
    found = []
    for heads, kv_heads, segments in ((1, 1, 16), (4, 2, 5)):
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": d}
        load = spectra_load(n, ranks, segments=segments, **sizes)
        options = {"segment_length": -(-n // segments), "layout": "spectra", "enable_gqa": True}
        arguments = distributed.conv_basis_attention, options, load, n, 1
        heads_of = (heads, kv_heads)
        found.append(measured(rank, split(n, ranks), mesh_of(ranks), heads_of, *arguments))
        assert cb.last_dispatch().backend == "spectra"
    return found


def not_finite(rank, ranks):
    """Return what is said of a bias that is not finite, and of logits that overflow."""
    mine = inputs(1, 1, 1, 20, 4, 4)
    bias = torch.zeros(1, 1, 20).index_fill(-1, torch.tensor([3]), float("nan"))
    options = {"mesh": mesh_of(ranks), "segment_length": 8, "layout": "spectra"}
    with pytest.raises(cb.InputError) as told:
        distributed.conv_basis_attention(*mine, lag_bias=bias, **options)
    return str(told.value)
