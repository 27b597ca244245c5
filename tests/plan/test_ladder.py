"""Which setting of a ladder a head gets, and what measuring a ladder finds."""

from __future__ import annotations

import pytest
import torch

from convbasis.plan import HeadSetting
from convbasis.plan.choice import chance_beyond, choose
from convbasis.plan.ladder import Measured, default_ladder, measure, measure_costs

LADDER = (HeadSetting(window=64), HeadSetting(window=128), HeadSetting(window=256))


def measured(*bounds: list[float]) -> Measured:
    return Measured(list(bounds), list(bounds))


def test_the_cheapest_good_enough_setting_is_taken():
    layer = measured([0.2, 0.05], [0.08, 0.04], [0.01, 0.01])
    (heads,) = choose([[layer]], [0.2, 0.4, 0.6], LADDER, 0.1).heads
    assert [head.setting for head in heads] == [LADDER[1], LADDER[0]]
    assert [head.error for head in heads] == pytest.approx([0.08, 0.05])
    assert [head.cost for head in heads] == [0.4, 0.2]


def test_costs_order_the_ladder_not_its_places():
    layer = measured([0.05], [0.05], [0.05])
    ((head,),) = choose([[layer]], [0.5, 0.3, 0.4], LADDER, 0.1).heads
    assert head.setting == LADDER[1]


def test_a_head_is_exact_where_nothing_is_good_enough_or_cheaper():
    layer = measured([0.5, 0.01], [0.5, 0.5], [0.5, 0.5])
    (heads,) = choose([[layer]], [1.1, 0.3, 0.4], LADDER, 0.1).heads
    assert [head.setting for head in heads] == [None, None]
    assert heads[0].cost == 1.0


def test_every_text_counts():
    one = measured([0.05], [0.05], [0.05])
    other = measured([0.5], [0.05], [0.05])
    ((head,),) = choose([[one], [other]], [0.2, 0.3, 0.4], LADDER, 0.1).heads
    assert head.setting == LADDER[1]


def test_a_budget_goes_to_the_heads_that_matter():
    layer = measured([0.09, 0.09], [0.05, 0.05], [0.01, 0.01])
    costs = [0.2, 0.4, 0.6]
    effects = [[1.0, 0.1]]
    loose = choose([[layer]], costs, LADDER, 0.1, 1.0, effects)
    assert [head.setting for head in loose.heads[0]] == [LADDER[0], LADDER[0]]
    assert loose.predicted_kl == pytest.approx(1.1 * 0.09**2)
    tight = choose([[layer]], costs, LADDER, 0.1, 0.004, effects)
    assert [head.setting for head in tight.heads[0]] == [LADDER[1], LADDER[0]]
    assert tight.predicted_kl == pytest.approx(0.05**2 + 0.1 * 0.09**2)
    none = choose([[layer]], costs, LADDER, 0.1, 0.0, effects)
    assert [head.setting for head in none.heads[0]] == [None, None]
    assert none.predicted_kl == 0.0
    # What is predicted counts true errors, what is allowed their bounds; both are the worst text's.
    one, other = (
        Measured([[b], [0.05], [0.01]], [[e], [0.02], [0.01]]) for b, e in ((0.2, 0.01), (0.05, 0.03))
    )
    kept = choose([[one], [other]], costs, LADDER, 0.1, 1.0, [[1.0]])
    assert kept.heads[0][0].setting == LADDER[1]
    assert kept.predicted_kl == pytest.approx(0.02**2)
    assert choose([[layer]], costs, LADDER, 0.1).predicted_kl is None


def test_what_falls_back_easily_costs_more():
    # Cheap settings within the limit, the second head's so near it that it would often be exceeded.
    layer = measured([0.01, 0.09], [0.01, 0.03], [0.01, 0.01])
    costs = [0.2, 0.4, 0.9]
    never = choose([[layer]], costs, LADDER, 0.1)
    assert [head.setting for head in never.heads[0]] == [LADDER[0], LADDER[0]]
    often = choose([[layer]], costs, LADDER, 0.1, fallback=0.1)
    assert [head.setting for head in often.heads[0]] == [LADDER[0], LADDER[1]]
    assert [head.cost for head in often.heads[0]] == [0.2, 0.4]  # what they cost where they stay
    # Nothing is chosen that will mostly be computed twice.
    layer = measured([0.099], [0.099], [0.099])
    assert choose([[layer]], [0.5, 0.6, 0.9], LADDER, 0.1, fallback=0.1).heads[0][0].setting is None
    assert (
        choose([[layer]], [0.5, 0.6, 0.9], LADDER, 0.1, fallback=1.0).heads[0][0].setting == LADDER[0]
    )
    # Nor does it make a setting allowed that is not.
    assert choose([[layer]], [0.5, 0.6, 0.9], LADDER, 0.09, fallback=1.0).heads[0][0].setting is None


def test_the_chance_to_fall_back_grows_with_the_bound():
    bounds = torch.tensor([0.0, 0.02, 0.1, 0.2, 0.4, 4.0], dtype=torch.float64)
    found = chance_beyond(bounds, 0.4)
    assert found.tolist() == sorted(found.tolist())
    assert float(found[0]) == 0.0
    assert 0.5 < float(found[4]) < 0.65  # the limit itself, and errors elsewhere are somewhat larger
    assert float(found[-1]) > 0.999
    assert torch.allclose(chance_beyond(bounds / 4, 0.1), found)


def test_measuring_a_ladder_finds_errors_and_their_bounds():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 700, 16, generator=generator) for heads in (4, 2, 2))
    found = measure(query, key, value, 0.25, (*LADDER[:2], HeadSetting(window=700)), seed=0)
    assert len(found.bounds) == len(found.errors) == 3
    assert found.bounds[2] == [0.0] * 4
    assert max(found.errors[2]) < 1e-5
    assert min(found.errors[0]) > 0.05  # random keys are missed
    assert all(
        bound >= error
        for own, true in zip(found.bounds, found.errors, strict=True)
        for bound, error in zip(own, true, strict=True)
        if error > 1e-5
    )


def test_costs_are_ratios_of_the_least_times(monkeypatch):
    """The noise of one turn is left out."""
    turns = []

    def seconds(run, query, *rest, **options):
        n = query.shape[2]
        turns.append(n)
        noise = 10.0 if len(turns) % 7 == 0 else 0.0
        if options.get("is_causal"):
            return n / 1000 + noise
        return (0.25 if rest[2].window == 64 else 1.024 if n < 1200 else 0.6) + noise

    monkeypatch.setattr("convbasis.plan.ladder._seconds", seconds)
    query, key, value = (torch.randn(1, 2, 1200, 16) for _ in range(3))
    found = measure_costs(query, key, value, 0.25, LADDER[:2])
    assert found.lengths == sorted(set(turns)) == [512, 1024, 1200]
    for own, wanted in zip(
        found.costs, [(0.25 / 0.512, 2.0), (0.25 / 1.024, 1.0), (0.25 / 1.2, 0.5)], strict=True
    ):
        assert own == pytest.approx(wanted)


def test_costs_of_real_runs_are_positive():
    query, key, value = (torch.randn(1, 2, 700, 16) for _ in range(3))
    found = measure_costs(query, key, value, 0.25, LADDER)
    assert found.lengths == [512, 700]
    assert [len(own) for own in found.costs] == [3, 3]
    assert min(map(min, found.costs)) > 0.0


def test_the_ladder_has_whole_sizes_at_every_length():
    for setting in default_ladder(4096):
        for n in (1, 700, 4096, 100_000):
            sizes = setting.at(n)
            assert sizes.window >= 1
            assert sizes.window <= max(n, 1)
    cheapest = default_ladder(4096)[0]
    assert cheapest.at(16_384).window == 2 * cheapest.at(4096).window
