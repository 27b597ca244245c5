"""Ranks that exchange spectra compute what one process does; the checks are in spectra_checks.py."""

import pytest
import spectra_checks
from processes import launch

from convbasis.distributed.cost import attention_load
from convbasis.distributed.cost_spectra import spectra_load, spectra_pay
from convbasis.distributed.grid import Grid, grid_for
from convbasis.distributed.shares import Sizes
from convbasis.distributed.strips import Strip, numbers_between


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_are_one_process_and_send_what_is_predicted(ranks):
    every = launch(ranks, spectra_checks.everything, ranks)
    assert all(found == every[0] for found in every)
    for forward, backward, counted_forward, counted_backward in every[0]:
        assert counted_forward == pytest.approx(forward, rel=0.02)
        assert counted_backward == pytest.approx(backward, rel=0.02)


def test_a_bias_that_is_not_finite_is_told():
    (told,) = launch(1, spectra_checks.not_finite, 1)
    assert told.startswith("lag_bias holds 1 NaN or Inf, the first at [0, 0, 3]")


@pytest.mark.parametrize(("n", "ranks", "each"), [(1000, 4, 4), (997, 3, 1), (7, 4, 2), (1, 3, 1)])
def test_blocks_have_every_token_lag_and_frequency_once(n, ranks, each):
    starts = tuple(s for s in (0, 2, 5, 300, 301, 700) if s < n)
    grid = Grid(n, ranks, each, starts)
    tokens = [t for rank in range(ranks) for t in range(*grid.tokens(rank))]
    assert tokens == list(range(n))
    cuts = [cut for own in grid.cuts for cut in own]
    assert sorted(t for cut in cuts for t in range(cut.low, cut.high)) == list(range(n))
    for rank, own in enumerate(grid.cuts):
        for cut in own:
            low, high = grid.tokens(rank)
            assert low <= cut.low < cut.high <= high
            assert cut.low // grid.block == (cut.high - 1) // grid.block == cut.block
            assert [s for s in starts if s <= cut.low][-1] == starts[cut.segment]
            assert not any(cut.low < s < cut.high for s in starts)
    rows = [row for own in grid.lag_rows for row in own]
    assert len(set(rows)) == len(rows)
    for segment, start in enumerate(starts):
        lags = [block * grid.block for r, block in rows if r == segment]
        assert sorted(lags) == list(range(0, n - start, grid.block))
    parts = [grid.frequencies(rank) for rank in range(ranks)]
    assert [f for part in parts for f in range(part.start, part.stop)] == list(range(grid.bins))
    assert grid.transform >= 2 * grid.block


def test_late_segments_leave_ranks_about_as_many_lags():
    counts = [len(own) for own in Grid(1 << 12, 4, 4, tuple(range(0, 1 << 12, 256))).lag_rows]
    assert max(counts) <= 1.1 * min(counts)


def test_blocks_are_as_short_as_segments_ask_for():
    """With starts at the borders of blocks every block has one piece."""
    starts = tuple(range(0, 1 << 14, 1 << 10))
    grid = grid_for(1 << 14, 4, starts, 1, 1, 65)
    assert grid.blocks >= len(starts)
    assert sum(map(len, grid.cuts)) == grid.blocks
    assert grid_for(1 << 14, 4, (0,), 1, 1, 65).blocks < 16


def test_numbers_between_ranks():
    strips = [[Strip(slice(0, 1), slice(0, 3), 2, 7, 0)], []]
    assert numbers_between(strips, [5, 4]) == [[9, 0], [6, 0]]


def test_spectra_pay_with_few_heads_and_many_ranks():
    def fewer(heads, ranks, segments=16):
        starts = tuple(range(0, 1 << 16, (1 << 16) // segments))
        return spectra_pay(1 << 16, ranks, Sizes(heads, heads, 64), 64, starts, 4, False)

    assert [fewer(1, ranks) for ranks in (2, 4, 8, 64, 128)] == [False, False, False, True, True]
    assert not fewer(16, 64)  # nearly a head for each rank
    assert not fewer(1, 512)  # more blocks than segments are more work
    assert fewer(1, 16, segments=64)  # more logits to send to all


def test_what_a_rank_sends_of_spectra_falls_with_the_ranks():
    sizes = {"heads": 1, "head_dim": 64, "segments": 16}
    few, many = (spectra_load(1 << 18, ranks, **sizes) for ranks in (16, 64))
    assert many.sent_forward < 0.3 * few.sent_forward
    assert many.sent_backward < 0.3 * few.sent_backward
    columns = [attention_load(1 << 18, ranks, layout="columns", **sizes) for ranks in (16, 64)]
    assert columns[1].sent_forward > 0.7 * columns[0].sent_forward
    assert spectra_load(1 << 18, 1, **sizes).sent_forward == 0
    biased = spectra_load(1 << 18, 16, key_bias=True, **sizes)
    assert biased.sent_forward > few.sent_forward
