"""What a plan decided, as maps of layers by heads."""

from __future__ import annotations

from ..plan import Plan
from ..report.content import HeadMap
from .results import rounded
from .words import in_words


def plan_maps(plan: Plan, n: int) -> tuple[HeadMap, ...]:
    """Return maps of the settings for a prompt of n tokens, their estimated errors and their times."""
    return (
        HeadMap(
            "Setting", "", tuple(tuple(in_words(head.setting, n) for head in row) for row in plan.heads)
        ),
        HeadMap(
            "Error estimate, 0 for exact heads",
            "relative error, 95 % bound",
            tuple(tuple(rounded(head.error) for head in row) for row in plan.heads),
        ),
        HeadMap(
            "Time",
            "of exact attention's",
            tuple(tuple(rounded(head.cost) for head in row) for row in plan.heads),
        ),
    )
