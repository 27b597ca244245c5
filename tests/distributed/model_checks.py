"""Checks that run in the ranks of one launch: layers, DTensors, FSDP2, tensor parallelism, plans."""

import socket
from pathlib import Path

import pytest
import tiny_models
import torch
from comparison import assert_close
from sharded_checks import inputs, mesh_of, own, run_all, split
from tiny_models import EVERYTHING, LITTLE, build, plan_for
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import convbasis as cb
from convbasis import distributed
from convbasis.distributed.failure import name_of

NEAR = {"whole": 1e-5, "row": 1e-5}


def layer(**changes):
    torch.manual_seed(3)
    made = cb.nn.ConvBasisAttention(
        24, 4, **{"num_kv_heads": 2, "segment_length": 7, "output_gate": True, **changes}
    )
    for part in (made.key_gate.weight, made.lag_bias.table):  # else they are 0 at first
        nn.init.normal_(part, std=0.3)
    return made


def reference(made, hidden, **options):
    """Return the output of one process, and the gradients of a loss that weighs every entry."""
    hidden = hidden.clone().requires_grad_()
    output = made(hidden, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    (output * weights).sum().backward()
    return output.detach(), weights, hidden.grad, {k: p.grad for k, p in made.named_parameters()}


def same_gradients(expected, found):
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        # That of the gate's bias is 0 but for rounding: it shifts all logits alike.
        size = expected[name.replace("key_gate.bias", "key_gate.weight")].norm()
        error = (found[name] - gradient).norm() / size
        assert error < 1e-5, f"{name}: {error}"


def layers(rank, ranks):
    """Parameters that all ranks hold: their gradients add up to those of one process."""
    mesh, lengths = mesh_of(ranks), split(83, ranks)
    hidden = torch.randn(2, 83, 24, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 83, dtype=torch.bool)
    mask[1, :9] = False
    for changes, options in (
        ({}, {}),
        ({"segment_growth": 2.0}, {"document_lengths": [30, 53]}),
        ({}, {"key_padding_mask": mask}),
    ):
        want, weights, of_hidden, expected = reference(layer(**changes), hidden, **options)
        made = layer(**changes, mesh=mesh)
        if "key_padding_mask" in options:
            options = {"key_padding_mask": own(mask, lengths, rank, 1)}
        mine = own(hidden, lengths, rank, 1).requires_grad_()
        output = made(mine, **options)
        (output * own(weights, lengths, rank, 1)).sum().backward()
        assert_close(own(want, lengths, rank, 1), output.detach(), whole=1e-5, row=2e-5)
        assert_close(own(of_hidden, lengths, rank, 1), mine.grad, whole=1e-5, row=1e-3)
        for parameter in made.parameters():
            torch.distributed.all_reduce(parameter.grad)
        same_gradients(expected, {k: p.grad for k, p in made.named_parameters()})
    with pytest.raises(cb.InputError, match="a layer with a mesh takes whole sequences"):
        made(mine, cache=cb.nn.ConvBasisCache())


def fsdp(rank, ranks):
    """Parameters and tokens over the same ranks: FSDP2 averages, so the loss counts `ranks` times."""
    mesh, lengths = mesh_of(ranks), split(61, ranks)
    hidden = torch.randn(1, 61, 24, generator=torch.Generator().manual_seed(4))
    want, weights, _, expected = reference(layer(), hidden)
    made = fully_shard(layer(mesh=mesh), mesh=mesh)
    output = made(own(hidden, lengths, rank, 1))
    (output * own(weights, lengths, rank, 1)).sum().mul(ranks).backward()
    assert_close(own(want, lengths, rank, 1), output.detach(), whole=1e-5, row=2e-5)
    assert all(isinstance(p.grad, DTensor) for p in made.parameters())
    same_gradients(expected, {k: p.grad.full_tensor() for k, p in made.named_parameters()})


def tensor_parallel(rank, ranks):
    """Heads over two ranks; with four, tokens over the other two."""
    if ranks == 3:
        with pytest.raises(cb.InputError, match="cannot be divided over 3 ranks"):
            distributed.parallelize_heads(layer(), mesh_of(ranks))
        with pytest.raises(cb.InputError, match="a ConvBasisAttention is wanted"):
            distributed.parallelize_heads(nn.Linear(2, 2), mesh_of(ranks))
        with pytest.raises(cb.InputError, match="which every rank would draw for itself"):
            distributed.parallelize_heads(layer(dropout=0.1), mesh_of(ranks))
        return
    shape = (max(1, ranks // 2), min(ranks, 2))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("tokens", "heads"))
    place, lengths = mesh["tokens"].get_local_rank(), split(61, shape[0])
    hidden = torch.randn(1, 61, 24, generator=torch.Generator().manual_seed(4))
    want, weights, _, expected = reference(layer(), hidden)
    made = layer(mesh=mesh["tokens"] if ranks == 4 else None)
    made = distributed.parallelize_heads(made, mesh["heads"])
    output = made(own(hidden, lengths, place, 1))
    (output * own(weights, lengths, place, 1)).sum().backward()
    assert_close(own(want, lengths, place, 1), output.detach(), whole=1e-5, row=2e-5)
    found = {}
    for name, parameter in made.named_parameters():
        gradient = parameter.grad.full_tensor()
        torch.distributed.all_reduce(gradient, group=mesh["tokens"].get_group())
        found[name] = gradient
    same_gradients(expected, found)
    frozen = layer(lag_bias=True).requires_grad_(False)
    frozen = distributed.parallelize_heads(frozen, mesh["heads"])
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    decoded(mesh["heads"])


def decoded(mesh):
    """A layer whose heads are spread decodes as the whole one does, with and without biases by lag."""
    hidden = torch.randn(1, 12, 24, generator=torch.Generator().manual_seed(4))
    for by_lag in (True, False):
        torch.manual_seed(3)
        sizes = {"num_kv_heads": 2, "segment_length": 7, "lag_bias": by_lag}
        made = cb.nn.ConvBasisAttention(24, 4, **sizes).requires_grad_(False)
        want = made(hidden)
        distributed.parallelize_heads(made, mesh)
        cache = cb.nn.ConvBasisCache()
        found = [made(part, cache=cache) for part in hidden.split([5, 1, 6], dim=1)]
        assert_close(want, torch.cat(found, dim=1), whole=1e-5, row=2e-5)


def dtensors(rank, ranks):
    mesh = mesh_of(ranks)
    tensors = inputs(1, 3, 3, 103, 8, 6)
    want = cb.conv_basis_attention(*tensors, segment_length=12)
    spread = [distribute_tensor(x, mesh, [Shard(2)]).requires_grad_() for x in tensors]
    found = distributed.conv_basis_attention(*spread, segment_length=12)
    assert found.placements == (Shard(2),)
    assert found.shape == want.shape
    assert_close(want, found.full_tensor().detach(), **NEAR)
    found.sum().backward()
    whole = [x.clone().requires_grad_() for x in tensors]
    cb.conv_basis_attention(*whole, segment_length=12).sum().backward()
    assert_close(whole[0].grad, spread[0].grad.full_tensor(), whole=1e-5, row=1e-3)
    near = distributed.hybrid_attention(*spread, window=20, columns=3)
    assert near.placements == (Shard(2),)
    everywhere = [x.redistribute(mesh, [Replicate()]) for x in spread]
    with pytest.raises(cb.InputError, match="Shard\\(2\\), over the tokens, is wanted"):
        distributed.conv_basis_attention(*everywhere, segment_length=12)
    with pytest.raises(cb.InputError, match="query is a DTensor but key is none"):
        distributed.conv_basis_attention(spread[0], *tensors[1:], segment_length=12)
    if ranks == 4:  # heads over one dimension, tokens over the other
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("heads", "tokens"))
        tensors = inputs(1, 4, 2, 50, 8, 8)
        spread = [distribute_tensor(x, both, [Shard(1), Shard(2)]) for x in tensors]
        found = distributed.conv_basis_attention(*spread, segment_length=9, enable_gqa=True)
        want = cb.conv_basis_attention(*tensors, segment_length=9, enable_gqa=True)
        assert_close(want, found.full_tensor(), **NEAR)
        tensors = inputs(1, 4, 1, 50, 8, 8)
        spread = [distribute_tensor(x, both, [Shard(1), Shard(2)]) for x in tensors]
        with pytest.raises(cb.InputError, match="key has 1 heads, spread over 2 ranks by Shard"):
            distributed.conv_basis_attention(*spread, segment_length=9, enable_gqa=True)
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "tokens"))
        tensors = inputs(3, 2, 2, 51, 8, 8)
        spread = [distribute_tensor(x, both, [Shard(0), Shard(2)]) for x in tensors]
        found = distributed.conv_basis_attention(*spread, segment_length=9)
        want = cb.conv_basis_attention(*tensors, segment_length=9)
        assert found.shape == want.shape
        assert_close(want, found.full_tensor(), **NEAR)


def plans(rank, ranks):
    mesh = mesh_of(ranks)
    last = ranks - 1
    plan = plan_for(build(), LITTLE) if rank == last else None
    assert distributed.share_plan(plan, mesh, source=last) == plan_for(build(), LITTLE)
    kind = cb.InputError if rank == 0 else distributed.DistributedError
    with pytest.raises(kind, match="plan is None in rank 0, the source"):
        distributed.share_plan(None, mesh)
    with pytest.raises(cb.InputError, match="source=9 is no rank"):
        distributed.share_plan(plan, mesh, source=9)
    assert distributed.token_lengths(rank + 1, mesh) == list(range(1, ranks + 1))


def meshes(rank, ranks):
    tensors = inputs(1, 1, 1, 8, 4, 4)
    for mesh, words in (
        (None, "mesh is None; a DeviceMesh of one dimension is wanted"),
        (init_device_mesh("cpu", (1, ranks)), "mesh has the dimensions"),
    ):
        with pytest.raises(cb.InputError, match=words):
            distributed.conv_basis_attention(*tensors, mesh=mesh, segment_length=3)
    with pytest.raises(cb.InputError, match="timeout=0 leaves no time"):
        distributed.hybrid_attention(*tensors, mesh=mesh_of(ranks), timeout=0)
    with pytest.raises(cb.InputError, match="layout='rows' is not known"):
        distributed.hybrid_attention(*tensors, mesh=mesh_of(ranks), layout="rows")
    with pytest.raises(cb.InputError, match="layout='tokens' with blocks=1"):
        distributed.hybrid_attention(*tensors, mesh=mesh_of(ranks), layout="tokens", blocks=1)
    with pytest.raises(cb.InputError, match="layout='rows' is not known"):
        distributed.conv_basis_attention(*tensors, mesh=mesh_of(ranks), layout="rows", segment_length=3)
    for options, words in (
        ({"exchange": "keys", "segment_length": 3}, "exchange='keys' is not known"),
        ({"exchange": "logits", "num_bases": 3}, "exchange='logits' needs segment_length"),
    ):
        with pytest.raises(cb.InputError, match=words):
            distributed.conv_basis_attention(*tensors, mesh=mesh_of(ranks), **options)
    with pytest.raises(cb.InputError, match="is_causal=False"):
        distributed.conv_basis_attention(
            *tensors, mesh=mesh_of(ranks), is_causal=False, segment_length=3
        )


def names(rank, ranks):
    """A rank of a part of all processes is also called what launchers call it."""
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "tokens"))["tokens"]
        first = rank // 2 * 2
        told = "rank 1" if first == 0 else "rank 1 of its mesh (rank 3 of all)"
        assert name_of(mesh.get_group(), 1) == told


def pretrained(rank, ranks):
    """A transformers model, its prompt's tokens over ranks: by a plan, exactly, with a window."""
    mesh, n = mesh_of(ranks), 131
    lengths = split(n, ranks)
    first = sum(lengths[:rank])
    ids = tiny_models.ids(n, batch=2)
    places = torch.arange(first, first + lengths[rank])[None]
    mask = torch.ones(2, n, dtype=torch.int64)
    mask[1, -20:] = 0
    for family, setting, padding in (
        ("llama", LITTLE, None),
        ("llama", LITTLE, mask),
        ("mistral", EVERYTHING, None),
    ):
        model = build(family)
        plan = plan_for(model, setting, tolerance=0.3, exact_heads=(1,))
        arguments = {} if padding is None else {"attention_mask": padding}
        cb.apply_plan(model, plan)
        with torch.no_grad():
            want = model(input_ids=ids, use_cache=False, **arguments).logits
        report = cb.plan_report(model)
        cb.apply_plan(model, distributed.share_plan(plan, mesh), mesh=mesh, timeout=60)
        if padding is not None:
            arguments = {"attention_mask": own(padding, lengths, rank, 1)}
        with torch.no_grad():
            found = model(
                input_ids=own(ids, lengths, rank, 1), position_ids=places, use_cache=False, **arguments
            ).logits
        want = own(want, lengths, rank, 1)
        if padding is not None:
            real = own(padding, lengths, rank, 1).bool()
            want, found = want[real], found[real]
        assert_close(want, found, whole=1e-5, row=1e-4)
        assert cb.plan_report(model) == report
    with pytest.raises(cb.InputError, match="attends to whole prompts alone"), torch.no_grad():
        model(input_ids=ids[:, :2], past_key_values=filled(model), position_ids=places[:, :2])


def pretrained_gradients(rank, ranks):
    """Those of a planned model's weights are the sums over the ranks of a prompt."""
    n = 131
    lengths = split(n, ranks)
    places = torch.arange(n)[None]
    ids = tiny_models.ids(n)
    up = torch.randn(1, n, 60, generator=torch.Generator().manual_seed(5))
    found = []
    for spread in (False, True):
        model = build("llama")
        options = {"mesh": mesh_of(ranks), "timeout": 60} if spread else {}
        cb.apply_plan(model, plan_for(model, LITTLE), dynamic=False, last_rows=20, **options)
        tensors = [own(x, lengths, rank, 1) if spread else x for x in (ids, places, up)]
        logits = model(input_ids=tensors[0], position_ids=tensors[1], use_cache=False).logits
        (logits * tensors[2]).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        if spread:
            for gradient in gradients.values():
                torch.distributed.all_reduce(gradient)
        found.append(gradients)
    same_gradients(*found)


def chunked_model(chunk):
    """A model whose first layer attends within chunks of the prompt."""
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=32, intermediate_size_mlp=32, num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 1],
        attention_chunk_size=chunk, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def spread_prompt(rank, ranks, model, n, mask=None):
    """Return what a model says of this rank's tokens of a prompt."""
    lengths = split(n, ranks)
    first = sum(lengths[:rank])
    places = torch.arange(first, first + lengths[rank])[None]
    arguments = {} if mask is None else {"attention_mask": own(mask, lengths, rank, 1)}
    with torch.no_grad():
        return model(
            input_ids=own(tiny_models.ids(n), lengths, rank, 1), position_ids=places, use_cache=False,
            **arguments,
        ).logits  # fmt: skip


def unequal_plans(rank, ranks):
    """Whatever differs in how ranks would follow a plan is named."""
    if ranks != 2:  # as good as more
        return
    mesh, odd = mesh_of(ranks), rank == ranks - 1
    model = build()
    plan = plan_for(model, exact_heads=(1,) if odd else ())
    for changes, training, words in (
        ({"plan": plan}, False, "plan differs"),
        ({"min_length": 17 if odd else 16}, False, "min_length differs"),
        ({"dynamic": odd}, False, "dynamic differs"),
        ({"training": odd}, False, "training differs"),
        ({}, odd, "training mode differs"),
    ):
        cb.apply_plan(model, **{"plan": plan_for(model), "mesh": mesh, "timeout": 60, **changes})
        model.train(training)
        with pytest.raises(distributed.DistributedError, match=words):
            spread_prompt(rank, ranks, model, 40)


def what_the_whole_prompt_rules_out(rank, ranks):
    """Each rank's tokens alone would allow it."""
    if ranks != 2:  # as good as more
        return
    mesh, n = mesh_of(ranks), 131
    chunk = n - 1  # longer than the tokens of any rank
    chunked = chunked_model(chunk)
    cb.apply_plan(chunked, plan_for(chunked), mesh=mesh)
    with pytest.raises(cb.InputError, match=f"longer than its local attention of {chunk} tokens"):
        spread_prompt(rank, ranks, chunked, n)
    mask = torch.ones(1, n, dtype=torch.int64)
    first = split(n, ranks)[0]
    mask[:, first - 3 : first] = 0  # at the end of rank 0's tokens
    mistral = build("mistral", sliding_window=100)
    cb.apply_plan(mistral, plan_for(mistral), mesh=mesh)
    with pytest.raises(cb.InputError, match="padding between tokens of a sliding window"):
        spread_prompt(rank, ranks, mistral, n, mask)
    for kind, more in (
        ("dynamic", {}),
        (
            "longrope",
            {
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
        ),
    ):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more}
        model = build("llama", rope_parameters=rope)
        with pytest.raises(cb.InputError, match=f"of the type '{kind}', which depend on the length"):
            cb.apply_plan(model, plan_for(model), mesh=mesh)


def filled(model):
    from transformers import DynamicCache

    cache, config = DynamicCache(), model.config
    size = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.zeros(2, 2, config.num_key_value_heads, 3, size), layer)
    return cache


def listening():
    """Return the sockets of this process that wait for connections."""
    own = set()
    for place in Path("/proc/self/fd").iterdir():
        try:
            own.add(str(place.readlink()))
        except OSError:  # that of the listing itself
            continue
    lines = [
        line.split()
        for family in ("tcp", "tcp6")
        for line in (Path("/proc/self/net") / family).read_text().splitlines()[1:]
    ]
    return {inode for *_, state, inode in ((x[3], x[9]) for x in lines) if state == "0A"} & {
        name.removeprefix("socket:[").removesuffix("]") for name in own
    }


def sockets(rank, ranks):
    """Nothing but torch's group listens."""
    mesh = mesh_of(ranks)
    torch.distributed.barrier()
    before = listening()
    tensors = [x.requires_grad_() for x in inputs(1, 2, 2, 30, 8, 8)]
    distributed.conv_basis_attention(*tensors, mesh=mesh, segment_length=9).sum().backward()
    distributed.hybrid_attention(*tensors, mesh=mesh, window=9).sum().backward()
    distributed.share_plan(plan_for(build()), mesh)
    assert listening() == before
    if ranks > 1:
        own = socket.create_server(("127.0.0.1", 0))
        assert len(listening()) == len(before) + 1  # it would be seen
        own.close()


def page(rank, ranks):
    """The script of the page about several machines, with fewer tokens; the group is there already."""
    text = (Path(__file__).parents[2] / "docs" / "several-machines.md").read_text()
    code = text.split("```text\n")[1].split("```")[0]
    assert "100_000" in code
    code = code.replace("100_000", "1_000").replace("25_000", "500")
    for of_its_own in ('dist.init_process_group("gloo")', "dist.destroy_process_group()"):
        assert of_its_own in code
        code = code.replace(of_its_own, "")
    names = {}
    exec(compile(code, "several-machines.md", "exec"), names)
    assert names["out"].shape == (1, 8, 1000, 64)


CHECKS = (
    layers,
    fsdp,
    tensor_parallel,
    dtensors,
    plans,
    meshes,
    names,
    pretrained,
    pretrained_gradients,
    unequal_plans,
    what_the_whole_prompt_rules_out,
    sockets,
    page,
)


def everything(rank, ranks):
    run_all(CHECKS, rank, ranks)
    return True
