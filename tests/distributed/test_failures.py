"""Ranks that do not fit, die or hang: all others say so, and name the rank, within the time limit."""

from concurrent.futures import ThreadPoolExecutor

import failing_checks
import pytest
from processes import launch


def test_what_differs_is_named_in_every_rank():
    every = launch(3, failing_checks.mismatches, 3)
    for rank, found in enumerate(every):
        for name, words in {
            "heads": "number of query heads differs: rank 1 has 2, but rank 0 has 3",
            "dtype": 'dtype differs: rank 1 has "torch.float64", but rank 0 has "torch.float32"',
            "argument": "segment_length differs: rank 1 has 21, but rank 0 has 20",
            "hybrid": "window differs: rank 1 has 8, but rank 0 has 7",
            "gradient": 'key_bias differs: rank 1 has ["torch.float32", false], but rank 0 has',
        }.items():
            kind, message, _ = found[name]
            assert kind == "DistributedError"
            assert words in message
        kind, message, _ = found["nan"]
        assert kind == ("InputError" if rank == 1 else "DistributedError")
        assert "key holds 1 NaN or Inf" in message
        assert rank == 1 or message.startswith("rank 1 cannot go on: key holds")
        for name, words in {
            "bias of another shape": "key_bias has shape",
            "no bias by key": "key_bias is 1.0; a torch.Tensor is wanted",
            "no bias by lag": "lag_bias is a list; a torch.Tensor is wanted",
            "nan by key": "key_bias holds 3 NaN or Inf",
            "inf by lag": "lag_bias holds 96 NaN or Inf",
            "timeout": "timeout=0 leaves no time",
            "placed": "query is a DTensor but key is none",
            "layer": "hidden_states has shape (1, 4, 13)",
            "documents": "document_lengths add up to 15 tokens, but the sequence has 12",
        }.items():
            kind, message, seconds = found[name]
            assert kind == ("InputError" if rank == 1 else "DistributedError"), (name, message)
            assert words in message
            assert rank == 1 or message.startswith("rank 1 cannot go on: ")
            assert seconds < failing_checks.TIMEOUT / 2
        kind, message, _ = found["no tokens"]
        assert kind == "InputError"
        assert "query has shape (1, 3, 0, 8): none of the 3 ranks has tokens" in message
        assert found["after"][0] == "no error"


MISSING, FAILED = "rank 2 took no part", "rank 2 failed: RuntimeError: no memory is left"
WAYS = {
    "dies before": MISSING,
    "hangs before": MISSING,
    "dies within": MISSING,
    "fails within": FAILED,
    "dies within hybrid": MISSING,
    "fails within hybrid": FAILED,
    "dies within a layer": MISSING,
    "dies in backward": MISSING,
    "hangs in backward": MISSING,
    "dies before, with a TCP store": MISSING,
    "its store stops": "the store that would tell which rank is missing does not answer",
}
TCP = ("dies before, with a TCP store", "its store stops")


@pytest.fixture(scope="module")
def broken():
    """What the ranks of each way said; they wait at the same time."""

    def of(way):
        killed = () if way.startswith("fails") else (0 if way == "its store stops" else 2,)
        return launch(3, failing_checks.missing, 3, way, killed=killed, tcp=way in TCP)

    with ThreadPoolExecutor(len(WAYS)) as pool:
        return dict(zip(WAYS, pool.map(of, WAYS), strict=True))


@pytest.mark.parametrize(("way", "words"), WAYS.items())
def test_a_missing_rank_is_named(way, words, broken):
    found = [told for told in broken[way] if told is not None and told[0] != "RuntimeError"]
    assert len(found) == 2
    for kind, message, seconds in found:
        assert kind == "DistributedError"
        assert words in message
        assert seconds < failing_checks.TIMEOUT


def test_ranks_that_are_at_different_calls_say_which():
    first, second, third = launch(3, failing_checks.out_of_step, 3)
    for kind, message, seconds in (first, third):
        assert kind == "DistributedError"
        assert "rank 1 is at 'handshake', but rank" in message
        assert "at 'gradients of outputs': every rank must make the same calls" in message
        assert seconds < failing_checks.TIMEOUT / 2
    assert second[0] == "DistributedError"
    assert "rank 0 is at 'gradients of outputs', but rank 1 at 'handshake'" in second[1]


def test_a_rank_that_comes_too_late_is_named():
    for kind, message, _ in launch(3, failing_checks.late, 3):
        assert kind == "DistributedError"
        assert "rank 1 came to a collective when others had waited for 2" in message


def test_what_a_rank_refuses_itself_is_told_although_another_hangs():
    first, second, _ = launch(3, failing_checks.refuses_while_another_hangs, 3, killed=(2,))
    assert first[0] == "InputError"
    assert "dtype" in first[1]
    assert second[0] == "DistributedError"
    assert "rank 2 took no part" in second[1]
    first, _ = launch(2, failing_checks.refuses_alone, 2, killed=(1,))
    assert first[0] == "InputError"
    assert "key is none; give all or none as DTensors" in first[1]
    assert first[2] < 4


def test_a_group_of_the_same_name_begins_anew(tmp_path):
    assert launch(1, failing_checks.begun_again, 1, str(tmp_path)) == ["no error"]
