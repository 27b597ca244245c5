"""Which setting of a ladder a head gets, and what measuring a ladder finds."""

from __future__ import annotations

import pytest
import torch

from convbasis.plan import HeadSetting
from convbasis.plan.choice import choose
from convbasis.plan.ladder import Measured, crossover, default_ladder, measure

LADDER = (HeadSetting(window=64), HeadSetting(window=128), HeadSetting(window=256))


def measured(bounds: list[list[float]], costs: list[float]) -> Measured:
    return Measured(bounds, bounds, costs)


def test_the_cheapest_good_enough_setting_is_taken():
    layer = measured([[0.2, 0.05], [0.08, 0.04], [0.01, 0.01]], [0.2, 0.4, 0.6])
    (heads,) = choose([[layer]], LADDER, 0.1)
    assert [head.setting for head in heads] == [LADDER[1], LADDER[0]]
    assert [head.error for head in heads] == pytest.approx([0.08, 0.05])
    assert [head.cost for head in heads] == [0.4, 0.2]


def test_costs_order_the_ladder_not_its_places():
    layer = measured([[0.05], [0.05], [0.05]], [0.5, 0.3, 0.4])
    ((head,),) = choose([[layer]], LADDER, 0.1)
    assert head.setting == LADDER[1]


def test_a_head_is_exact_where_nothing_is_good_enough_or_cheaper():
    layer = measured([[0.5, 0.01], [0.5, 0.5], [0.5, 0.5]], [1.1, 0.3, 0.4])
    (heads,) = choose([[layer]], LADDER, 0.1)
    assert [head.setting for head in heads] == [None, None]
    assert heads[0].cost == 1.0


def test_every_text_counts():
    one = measured([[0.05], [0.05], [0.05]], [0.2, 0.3, 0.4])
    other = measured([[0.5], [0.05], [0.05]], [0.2, 0.3, 0.4])
    ((head,),) = choose([[one], [other]], LADDER, 0.1)
    assert head.setting == LADDER[1]


def test_cost_is_the_median_over_layers_and_texts():
    layers = [measured([[0.01]] * 3, [cost, 0.5, 0.6]) for cost in (0.1, 9.0, 0.2)]
    heads = choose([layers], LADDER, 0.1)
    assert [layer[0].cost for layer in heads] == [0.2, 0.2, 0.2]


def test_measuring_a_ladder_finds_errors_and_their_bounds():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 700, 16, generator=generator) for heads in (4, 2, 2))
    found = measure(query, key, value, 0.25, (*LADDER[:2], HeadSetting(window=700)), seed=0)
    assert len(found.bounds) == len(found.errors) == len(found.costs) == 3
    assert found.bounds[2] == [0.0] * 4
    assert max(found.errors[2]) < 1e-5
    assert min(found.errors[0]) > 0.05  # random keys are missed
    assert all(
        bound >= error
        for own, true in zip(found.bounds, found.errors, strict=True)
        for bound, error in zip(own, true, strict=True)
        if error > 1e-5
    )
    assert min(found.costs) > 0


def test_the_crossover_is_a_length_that_was_measured():
    query, key, value = (torch.randn(1, 2, 1200, 16) for _ in range(3))
    assert crossover(query, key, value, 0.25, HeadSetting(window=64)) in (0, 512, 1024)


def test_the_ladder_has_whole_sizes_at_every_length():
    for setting in default_ladder(4096):
        for n in (1, 700, 4096, 100_000):
            sizes = setting.at(n)
            assert sizes.window >= 1
            assert sizes.window <= max(n, 1)
    cheapest = default_ladder(4096)[0]
    assert cheapest.at(16_384).window == 2 * cheapest.at(4096).window
