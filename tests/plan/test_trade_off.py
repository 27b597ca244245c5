"""Error against cost: one setting for all heads, and choices by budget or tolerance."""

import pytest

from convbasis.plan import HeadPlan, HeadSetting
from convbasis.plan.choice import choose
from convbasis.plan.ladder import Measured
from convbasis.plan.trade_off import choices, one_setting_for_all, place_of

LADDER = (HeadSetting(64), HeadSetting(128))
COSTS = [0.25, 0.5]
# Two texts, one layer, two settings, two heads.
MEASURED = [
    [Measured([[0.4, 0.2], [0.2, 0.1]], [[0.3, 0.1], [0.1, 0.05]])],
    [Measured([[0.3, 0.3], [0.1, 0.2]], [[0.2, 0.2], [0.05, 0.1]])],
]
EFFECTS = [[1.0, 2.0]]


def test_all_heads_alike_take_the_worst_of_the_texts():
    rough, fine = one_setting_for_all(MEASURED, COSTS, EFFECTS)
    assert (rough.limit, rough.cost) == (0, 0.25)
    assert rough.error == pytest.approx(1.0 * 0.3**2 + 2.0 * 0.2**2)
    assert fine.error == pytest.approx(1.0 * 0.1**2 + 2.0 * 0.1**2)
    rough, fine = one_setting_for_all(MEASURED, COSTS, None)
    assert rough.error == pytest.approx(((0.4**2 + 0.3**2) / 2) ** 0.5)
    assert fine.error == pytest.approx(0.2)


def test_budgets_halve_from_what_the_tolerance_allows_to_exact_attention():
    places = choices(MEASURED, COSTS, LADDER, 1.0, EFFECTS)
    assert places[0][1:] == pytest.approx(one_setting_for_all(MEASURED, COSTS, EFFECTS)[0][1:])
    assert places[-1][1:] == (1.0, 0.0)
    costs, errors = [p.cost for p in places], [p.error for p in places]
    assert costs == sorted(costs)
    assert errors == sorted(errors, reverse=True)
    assert len(set(places)) == len(places) > 2
    for place in places:
        own = choose(MEASURED, COSTS, LADDER, 1.0, place.limit, EFFECTS)
        assert place.error == own.predicted_kl <= place.limit
    assert [p[1:] for p in choices(MEASURED, COSTS, LADDER, 1e-9, EFFECTS)] == [(1.0, 0.0)]


def test_without_sensitivities_tolerances_lie_around_the_given_one():
    places = choices(MEASURED, COSTS, LADDER, 0.2, None)
    assert max(p.limit for p in places) <= 0.8
    for place in places:
        own = choose(MEASURED, COSTS, LADDER, place.limit)
        assert place == place_of(own.heads, None, place.limit)
    assert {p.cost for p in places} >= {0.25, 0.5, 1.0}


def test_a_tolerance_is_also_what_heads_fall_back_at():
    for place in choices(MEASURED, COSTS, LADDER, 0.2, None, 0.25):
        own = choose(MEASURED, COSTS, LADDER, place.limit, fallback=1.25 * place.limit)
        assert place == place_of(own.heads, None, place.limit)
    by_budget = choices(MEASURED, COSTS, LADDER, 1.0, EFFECTS, 0.25)
    assert by_budget != choices(MEASURED, COSTS, LADDER, 1.0, EFFECTS)
    for place in by_budget:
        own = choose(MEASURED, COSTS, LADDER, 1.0, place.limit, EFFECTS, fallback=0.25)
        assert place == place_of(own.heads, own.predicted_kl, place.limit)


def test_the_place_of_chosen_heads():
    heads = [[HeadPlan(LADDER[0], 0.3, 0.5), HeadPlan(None)], [HeadPlan(None), HeadPlan(None)]]
    assert place_of(heads, 0.01)[1:] == (0.875, 0.01)
    assert place_of(heads, None).error == pytest.approx(0.15)
