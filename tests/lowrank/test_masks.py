"""Masks: what they hide, what they count, what they have in common, what they refuse."""

import itertools

import pytest
import torch
from lowrank_masks import KINDS, random_changes

import convbasis as cb
from convbasis.lowrank import (
    CausalMask,
    DistinctColumnsMask,
    DistinctRowsMask,
    DocumentMask,
    IntervalMask,
    RowChangeMask,
    ShiftedGroupMask,
    SlidingWindowMask,
)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n", [1, 2, 37])
def test_dense_form_and_counts(n, name):
    mask, dense = KINDS[name](n)
    assert mask.n == n
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(mask.visible_keys(), dense.sum(1))
    assert mask.count() == int(dense.sum())
    assert f"n={n}" in repr(mask)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_intersections_are_right_or_refused(first, second):
    n = 41
    (mask, dense), (other, more) = KINDS[first](n), KINDS[second](n)
    monotone = ("causal", "window", "far", "documents", "groups")
    intervals = (*monotone, "intervals")
    fits = (
        (first in intervals and second in intervals)
        or (first == second and first in ("changes", "rows", "columns"))
        or (first == "changes" and second in monotone)
        or (second == "changes" and first in monotone)
    )
    if fits:
        assert torch.equal((mask & other).to_dense(), dense & more)
    else:
        with pytest.raises(cb.InputError, match="has no structure with a fast product"):
            mask & other


def test_changes_of_two_kinds_meet():
    (one, dense), (other, more) = (
        (RowChangeMask(a, r), d) for a, r, d in (random_changes(50, seed) for seed in (1, 2))
    )
    both = one & other
    assert torch.equal(both.to_dense(), dense & more)
    assert torch.equal(both.visible_keys(), (dense & more).sum(1))
    assert both.count() > 0


def test_an_empty_interval_between_others_does_not_hide_that_ends_never_decrease():
    # Row 1 and row 3 see nothing; what the others see moves on.
    mask = IntervalMask([0, 0, 1, 4, 3], [0, -1, 2, 0, 4])
    additions, removals, dense = random_changes(5)
    found = mask & RowChangeMask(additions, removals)
    assert torch.equal(found.to_dense(), dense & mask.to_dense())


def test_other_things_are_no_masks():
    with pytest.raises(TypeError):
        CausalMask(3) & torch.ones(3, 3)
    with pytest.raises(cb.InputError, match="masks of 3 and of 4 tokens"):
        CausalMask(3) & CausalMask(4)


def test_intervals_may_look_ahead_and_say_so():
    assert CausalMask(4).is_causal
    assert IntervalMask([0, 0, 3], [0, -5, 1]).is_causal  # empty rows see nothing
    assert not IntervalMask([0, 0, 0], [0, 2, 2]).is_causal


def test_groups_are_shifted():
    plain = ShiftedGroupMask(6, 3, shift=0)
    assert torch.equal(plain.to_dense(), DocumentMask([3, 3]).to_dense())
    assert torch.equal(ShiftedGroupMask(6, 3).to_dense(), DocumentMask([1, 3, 2]).to_dense())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CausalMask(0), "n=0 is not a positive integer"),
        (lambda: SlidingWindowMask(5, 0), "window=0 is not a positive integer"),
        (lambda: ShiftedGroupMask(5, 2, 2), "shift=2 is not below group=2"),
        (lambda: DocumentMask([3, 0]), "one document at least, each of one token at least"),
        (lambda: DocumentMask([]), "one document at least"),
        (lambda: DocumentMask([1.5]), "lengths has dtype torch.float32; integers are wanted"),
        (lambda: DocumentMask("ab"), "lengths is 'ab'; a tensor or list of integers is wanted"),
        (lambda: DocumentMask([[1]]), "one dimension is wanted"),
        (lambda: DocumentMask([None]), "cannot be read as integers"),
        (lambda: IntervalMask([0, 0], [0]), "lower has 2 entries but upper has 1"),
        (lambda: IntervalMask([], []), "one row at least"),
        (lambda: IntervalMask([0, 0], [0, 2]), r"row 1 sees 0\.\.2, beyond the keys 0\.\.1"),
        (lambda: IntervalMask([-1, 0], [0, 0]), r"row 0 sees -1\.\.0, beyond the keys"),
        (lambda: RowChangeMask([[0], [0]], [[], []]), "row 1 adds key 0, which is already visible"),
        (lambda: RowChangeMask([[0], []], [[], [1]]), "row 1 removes key 1, which is not visible"),
        (lambda: RowChangeMask([[0], []], [[0], []]), "row 0 changes key 0 more than once"),
        (lambda: RowChangeMask([[0, 0]], [[]]), "row 0 changes key 0 more than once"),
        (lambda: RowChangeMask([[2], []], [[], []]), r"additions holds keys 2\.\.2"),
        (lambda: RowChangeMask([[0]], [[], []]), "additions has 1 rows but removals has 2"),
        (lambda: RowChangeMask([], []), "one row at least"),
        (
            lambda: RowChangeMask([[0.9]], [[]]),
            "additions of row 0 holds 0.9; integers, positions of keys",
        ),
        (lambda: RowChangeMask([["1"]], [[]]), "additions of row 0 holds '1'; integers"),
        (lambda: RowChangeMask(["1"], [[]]), "additions of row 0 holds '1'; integers"),
        (lambda: RowChangeMask([[]], [[True]]), "removals of row 0 holds True; integers"),
        (lambda: RowChangeMask([[torch.tensor(0.5)]], [[]]), "holds a torch.float32 tensor"),
        (lambda: RowChangeMask([1], [2]), "additions of row 0 is 1; a list of keys is wanted"),
        (lambda: RowChangeMask([[0]], [None]), "removals of row 0 is None; a list of keys is wanted"),
        (lambda: RowChangeMask(None, [[]]), "additions is None; a list of keys for each row is wanted"),
        (lambda: DistinctRowsMask(torch.ones(2, 3), [0, 1, 1]), "a bool tensor"),
        (lambda: DistinctRowsMask(torch.ones(2, 4).bool(), [0, 1, 1]), "is wanted, one token at least"),
        (lambda: DistinctRowsMask(torch.ones(2, 3).bool(), [0, 2, 1]), r"group ranges over 0\.\.2"),
        (lambda: DistinctColumnsMask(torch.ones(2, 3).bool(), [0, 1, 1]), r"\(3, r'\) is wanted"),
    ],
)
def test_bad_masks_are_refused(make, words):
    with pytest.raises(cb.InputError, match=words):
        make()
