"""What sampled rows say: masses and exact rows against dense attention, for any mixture of heads."""

import pytest
import torch
from oracle import qkv

import convbasis as cb
from convbasis.hybrid.exact import attend_exactly
from convbasis.hybrid.heads import pieces_of_work
from convbasis.hybrid.look import Look, first_sampled, in_order, rows_for_fits
from convbasis.hybrid.settings import Settings
from convbasis.hybrid.window import Window

N = 700


def settings(window, **options):
    plain = {"columns": 5, "far_field": "none", "key_weights": False, **options}
    return Settings(window, 2, plain["columns"], 0, plain["far_field"], 4, plain["key_weights"], 20, 3)


KINDS = {
    "one window": [settings(30)] * 3,
    "two windows": [settings(30), settings(64), settings(30)],
    "with key weights": [settings(30, far_field="segments", key_weights=True)] * 2 + [settings(40)],
    "one without fits": [settings(30), settings(100, columns=0), settings(60)],
    "none with fits": [settings(30, columns=0)] * 3,
}


def looked(tensors, kind, estimated=True, last_rows=0):
    query, key, value = (x[0] for x in tensors)
    look = Look(query, key, value, kind, 0.3, estimated, last_rows)
    return look.found([job() for job in look.jobs])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_rows_say_is_what_dense_attention_says(kind, dtype):
    tensors = qkv(N, heads=3, kv_heads=1, dtype=dtype)
    found = looked(tensors, kind, last_rows=70)
    query, key, value = (x[0].double() for x in tensors)
    later = torch.arange(N) > torch.arange(N)[:, None]
    logits = (0.3 * query @ key.mT).masked_fill(later, -torch.inf)
    weights = logits.softmax(-1)
    tight = 1e-12 if dtype == torch.float64 else 1e-5

    def close(ours, theirs):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours.double(), theirs, atol=tight, rtol=tight)

    close(found.exact, (weights @ value)[:, found.held])
    close(found.last, (weights @ value)[:, -70:])
    assert not set(found.held.tolist()) & set(found.fitted.tolist())
    fits = [own.columns > 0 or own.key_weights for own in kind]
    if not any(fits):
        assert not len(found.fitted)
        assert not found.before.numel()
        return
    if any(own.key_weights for own in kind):
        close(found.lse, logits.logsumexp(-1)[:, found.fitted])
    else:
        assert found.lse.shape == (3, 0)
    for head, own in enumerate(kind):
        window = Window(own.window, own.shared)
        assert torch.equal(found.fitted, rows_for_fits(window, N, 20, 3))
        first = window.first(found.fitted)
        seen = weights[head, found.fitted].masked_fill(torch.arange(N) >= first[:, None], 0.0)
        close(found.before[head], seen.sum(0) * fits[head])


def test_a_head_says_the_same_whatever_heads_are_beside_it():
    tensors = qkv(N, heads=3, kv_heads=1, dtype=torch.float32)
    mixed = looked(tensors, KINDS["with key weights"])
    for head, own in enumerate(KINDS["with key weights"]):
        alone = looked((tensors[0][:, head : head + 1], *tensors[1:]), [own])
        one = mixed.of(slice(head, head + 1))
        names = ("fitted", "before", "held", "exact")
        for name in (*names, "lse") if own.key_weights else names:
            assert torch.allclose(getattr(alone, name), getattr(one, name), atol=1e-5), name


def test_long_prompts_whose_masks_are_not_kept_say_the_same(monkeypatch):
    tensors = qkv(N, heads=3, kv_heads=1, dtype=torch.float64)
    kept = looked(tensors, KINDS["with key weights"])
    monkeypatch.setattr("convbasis.hybrid.look._LONGEST_KEPT", N - 1)
    for ours, theirs in zip(looked(tensors, KINDS["with key weights"]), kept, strict=True):
        assert torch.allclose(torch.as_tensor(ours), torch.as_tensor(theirs), atol=1e-12)


def test_nothing_is_looked_at_that_is_not_wanted():
    tensors = qkv(N, heads=3, kv_heads=1)
    look = Look(*(x[0] for x in tensors), KINDS["none with fits"], 0.3, False, 0)
    assert not look.jobs
    found = look.found([])
    assert found.exact.shape == found.last.shape == (3, 0, 16)
    assert not len(found.held)


@pytest.mark.parametrize("shared", [1, 64, 128])
def test_rows_begin_at_few_places_and_half_of_them_count(shared):
    places = set()
    for tokens in range(1, 4000, 37):
        window = Window(tokens, shared)
        if window.begin < 4000:
            first = first_sampled(window, 4000)
            places.add(first)
            assert 0 <= first <= window.begin
            assert 4000 - window.begin >= (4000 - first) // 2 - 1
    assert len(places) <= 15
    assert first_sampled(Window(100, shared), 8192) == first_sampled(Window(700, shared), 8192) == 0


@pytest.mark.parametrize("n", [1, 5, 700, 2049, 4200])
@pytest.mark.parametrize("heads", [1, 3])
def test_exact_heads_in_stretches(n, heads):
    query, key, value = (x[0] for x in qkv(n, heads=heads, kv_heads=1, dtype=torch.float32))
    room = torch.full((n, heads + 1, 16), 7.0).transpose(0, 1)
    output, lse = attend_exactly(query, key, value, 0.3, room[:heads])
    double = [x.double() for x in (query, key, value)]
    logits = 0.3 * double[0] @ double[1].mT
    logits.masked_fill_(torch.arange(n) > torch.arange(n)[:, None], -torch.inf)
    assert torch.allclose(lse.double(), logits.logsumexp(-1), atol=1e-5)
    assert torch.allclose(output.double(), logits.softmax(-1) @ double[2], atol=1e-5)
    assert torch.equal(room[:heads], output)
    assert bool((room[heads] == 7.0).all())


@pytest.mark.parametrize(("m", "n"), [(1, 700), (300, 700), (2500, 4200), (4199, 4200)])
def test_exact_heads_of_the_last_rows(m, n):
    query, key, value = (x[0] for x in qkv(n, heads=2, kv_heads=1, dtype=torch.float32))
    output, lse = attend_exactly(query[:, n - m :], key, value, 0.3)
    every, sums = attend_exactly(query, key, value, 0.3)
    assert torch.allclose(output, every[:, n - m :], atol=1e-5)
    assert torch.allclose(lse, sums[:, n - m :], atol=1e-5)


class TestInOrder:
    """Heads are picked without a copy where that is possible, and always in their order."""

    @pytest.mark.parametrize("heads", [[0], [3], [1, 2], [0, 2], [0, 2, 4], [1, 2, 3], [0, 3]])
    def test_evenly_spaced_heads_are_a_view(self, heads):
        every = torch.arange(5)
        picked = every[in_order(heads)]
        assert picked.tolist() == heads
        assert picked.untyped_storage().data_ptr() == every.untyped_storage().data_ptr()

    @pytest.mark.parametrize("heads", [[2, 1], [0, 1, 3], [0, 2, 3], [1, 1], [3, 0, 1]])
    def test_others_are_picked_one_by_one(self, heads):
        assert torch.arange(5)[in_order(heads)].tolist() == heads


class TestPieces:
    """Which heads are worked on together does not change what they give."""

    def heads(self):
        torch.manual_seed(0)
        return torch.randn(1, 8, 5000, 16), torch.randn(1, 2, 5000, 16), torch.randn(1, 2, 5000, 16)

    @pytest.mark.parametrize(
        "options",
        [
            {"columns": 9},
            {"columns": 9, "blocks": 2, "correction": True},
            {"columns": 9, "far_field": "segments", "key_weights": True},
            {"columns": 9, "blocks": 2, "far_field": "segments"},
            {"columns": 0, "sinks": 0},
        ],
    )
    def test_any_number_of_threads_gives_the_same_bits(self, options):
        tensors, found = self.heads(), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                cb.hybrid_attention_stats(*tensors, window=100, enable_gqa=True, seed=2, **options)
            )
        for other in found[1:]:
            for name in ("output", "lse", "error_estimate", "error_mean"):
                assert torch.allclose(
                    getattr(other, name), getattr(found[0], name), rtol=1e-5, atol=1e-6
                )
            assert other.dispatch.parts == found[0].dispatch.parts
            assert other.dispatch.keys_per_query == pytest.approx(found[0].dispatch.keys_per_query)

    @pytest.mark.parametrize(
        ("options", "threads", "sizes"),
        [
            ({}, 1, [4, 4]),
            ({}, 2, [4, 4]),
            ({}, 3, [2, 2, 2, 2]),
            ({}, 16, [1] * 8),
            ({"strict": True}, 2, [4, 4]),
            ({"strict": True}, 16, [4, 4]),
            ({"far_field": "conv"}, 2, [1] * 8),
        ],
    )
    def test_each_thread_has_one(self, options, threads, sizes):
        query, key, _ = self.heads()
        own = settings(30)._replace(**options)
        torch.set_num_threads(threads)
        pieces = pieces_of_work(query, key, 0, [own] * 8)
        assert [len(piece.heads) for piece in pieces] == sizes
        assert [head for piece in pieces for head in piece.heads] == [*range(8)]
