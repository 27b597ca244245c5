"""A group of one process, in the process of the tests; and what is said of groups that failed."""

import json
import threading

import cost_checks
import model_checks
import pytest
import sharded_checks
import spectra_checks
import torch
import torch.distributed as dist
from sharded_checks import mesh_of

import convbasis as cb
from convbasis import distributed
from convbasis.distributed import failure, handshake


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


CHECKS = (*sharded_checks.CHECKS, *model_checks.CHECKS, *spectra_checks.CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_one_rank_is_one_process(check, group):
    check(0, 1)


def test_one_rank_sends_nothing(group):
    assert all(row[2:] == [0, 0] for row in cost_checks.sent(0, 1))


# Torch's compiler looks at a gradient that is none, and hides its own warning in vain.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_layer_attends_as_it_is(group):
    mesh = sharded_checks.mesh_of(1)
    layer = model_checks.layer(mesh=mesh)
    hidden = torch.randn(1, 30, 24)
    compiled = torch.compile(layer, backend="eager")
    assert torch.equal(compiled(hidden), layer(hidden))
    tensors = sharded_checks.inputs(1, 2, 2, 30, 8, 8)

    def near(query, key, value):
        return 2 * distributed.hybrid_attention(query, key, value, mesh=mesh, window=4) + query

    assert torch.equal(torch.compile(near, backend="eager")(*tensors), near(*tensors))


class Group:
    """Rank 0 of three, with a store."""

    group_name = "fake"

    def __init__(self, store=None):
        self.store = dist.HashStore() if store is None else store

    def rank(self):
        return 0

    def size(self):
        return 3

    def get_group_store(self):
        return self.store


def noted(**messages):
    group = Group()
    for rank, message in messages.items():
        waited = message if isinstance(message, float) else 3.0
        note = {"message": "" if waited is message else message, "waited": waited}
        group.store.set(f"convbasis/failed/{rank[1:]}", json.dumps(note))
    return str(failure.post_mortem(group, 0.2, "Connection closed\nat some line", 3.0))


def test_a_rank_without_a_note_is_missing():
    assert noted(r1="") == (
        "rank 2 took no part in a collective and left no note in 0.05 s after it failed: the process "
        "has died or hangs (Connection closed)"
    )
    assert noted().startswith("rank 1, rank 2 took no part")


def test_a_rank_that_failed_by_itself_is_told():
    assert noted(r1="", r2="RuntimeError: no memory") == "rank 2 failed: RuntimeError: no memory"


def test_ranks_that_are_all_alive_and_in_time():
    assert "although all ranks are alive and came in time: Connection closed" in noted(r1="", r2="")


def test_a_rank_that_came_too_late_is_named():
    told = noted(r1=0.1, r2=2.9)
    assert told.startswith("rank 1 came to a collective when others had waited for 3 s and given up")
    assert "give a larger timeout than 0.2 s" in told


def test_a_store_that_does_not_answer_is_told(monkeypatch):
    class Gone:
        def check(self, names):
            raise RuntimeError("Broken pipe")

    told = str(failure.post_mortem(Group(Gone()), 0.05, "", 0.0))
    assert "a collective failed (no message)" in told
    assert "does not answer (Broken pipe)" in told


class Stopped:
    """Of a process that lives but does nothing: torch then waits without end."""

    def wait(self, *_):
        threading.Event().wait()

    check = set = delete_key = wait


def test_a_store_that_hangs_is_told(monkeypatch):
    told = str(failure.post_mortem(Group(Stopped()), 0.2, "", 0.0))
    assert "does not answer (no answer in 0.09 s)" in told
    with pytest.raises(distributed.DistributedError, match="no answer in"):
        failure.forget_note(Group(Stopped()), 0.05)
    with pytest.raises(RuntimeError, match="no answer"):
        failure.leave_note(Group(Stopped()), "lost", 0.05)


def test_own_notes_are_forgotten():
    group = Group()
    failure.leave_note(group, "once")
    failure.forget_note(group)
    assert not group.store.check(["convbasis/failed/0"])


def test_the_odd_one_out_is_named():
    told = [{"heads": 2, "dtype": "a"}, {"heads": 2, "dtype": "b"}, {"heads": 2, "dtype": "b"}]
    assert handshake._difference(Group(), told, [False] * 3) == (
        'dtype differs: rank 0 has "a", but rank 1 has "b"; give every rank the same'
    )
    assert (
        handshake._difference(Group(), [{}, {"error": "no"}], [False, True])
        == "rank 1 cannot go on: no"
    )
    assert "different arguments" in handshake._difference(Group(), [{}, {}], [False, False])


def test_fingerprints_tell_tensors_apart():
    starts = torch.tensor([0, 3])
    assert handshake.fingerprint(starts) == handshake.fingerprint(starts.clone())
    assert handshake.fingerprint(starts) != handshake.fingerprint(starts + 1)
    assert handshake.fingerprint(starts) != handshake.fingerprint(starts.float())


def test_values_that_cancel_are_lost_though_little_is_left_of_them(group):
    """What a transform takes is larger than what it gives, and rounds as much."""
    n = 2000
    query = torch.zeros(1, 1, n, 4, dtype=torch.float64)
    value = torch.ones(1, 1, n, 2, dtype=torch.float64)
    value[:, :, 1::2] = -1 + 1e-5
    options = {"segment_length": n, "layout": "spectra"}
    output = distributed.conv_basis_attention(query, query, value, mesh=mesh_of(1), **options)
    assert "lost" in cb.last_dispatch().reason
    means = value.cumsum(2) / torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    assert (output - means).norm(dim=-1).div(means.norm(dim=-1)).max() < 1e-9
