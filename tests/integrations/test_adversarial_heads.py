"""Heads that no setting of the ladder serves: they fall back, or their last rows are right anyway."""

import pytest
import torch

from convbasis.integrations.prefill import planned_prefill
from convbasis.plan import HeadPlan
from convbasis.plan.ladder import default_ladder

N, FAR = 2048, 900
TOLERANCE = 0.4  # calibration's


def needles(looking, size=1.0, seed=0):
    """Rows that look do so at one key each, beyond their windows; the others look at themselves."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.nn.functional.normalize(torch.randn(1, 1, N, 32, generator=generator), dim=-1)
    value = torch.randn(1, 1, N, 32, generator=generator)
    target = torch.arange(N)
    for row in range(FAR + 20, N):
        if looking(row):
            target[row] = torch.randint(4, row - FAR, (), generator=generator)
    value[:, :, target[target != torch.arange(N)].unique()] *= size
    return 30 * key[:, :, target], key, value


HEADS = {
    "all rows": needles(lambda row: True),
    "one row in four": needles(lambda row: row * 37 % 101 < 25),
    "one row in eight": needles(lambda row: row * 37 % 101 < 13),
    "large values": needles(lambda row: row * 37 % 101 < 13, size=20.0),
    "the last 64 rows": needles(lambda row: row >= N - 64),
    "the last row": needles(lambda row: row == N - 1),
    "the last row, a large value": needles(lambda row: row == N - 1, size=1000.0),
}


@pytest.mark.parametrize("setting", default_ladder(N), ids=lambda x: str(tuple(x.at(N))))
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_right_or_falls_back(name, setting):
    query, key, value = HEADS[name]
    found = planned_prefill(
        query,
        key,
        value,
        [HeadPlan(setting, 0.1, 0.4)],
        scale=1.0,
        padding=None,
        tolerance=TOLERANCE,
        last_rows=64,
    )
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=1.0
    )
    off = (found.output - exact)[0, 0].norm(dim=-1) / exact[0, 0].norm(dim=-1)
    assert float(off[-64:].max()) < 1e-4
    if not bool(found.fallen_back):
        assert float((off > 0.5).double().mean()) < 0.05
        assert float((found.output - exact).norm() / exact.norm()) < TOLERANCE


def test_all_weight_on_a_token_that_nothing_else_shows():
    """One far token has all weight of every row, and a value beside which all others are nothing."""
    query, key, value = needles(lambda row: False)
    query[:, :, FAR:] = 60 * key[:, :, 500:501]
    value[:, :, 500] *= 100
    for setting in default_ladder(N):
        plan = [HeadPlan(setting, 0.1, 0.4)]
        given = {"scale": 1.0, "padding": None, "tolerance": TOLERANCE}
        found = planned_prefill(query, key, value, plan, **given)
        exact = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=1.0
        )
        assert float((found.output - exact).norm() / exact.norm()) < 1e-3 or bool(found.fallen_back)
