"""The chart of error against cost, from what calibration measured."""

from __future__ import annotations

from collections.abc import Sequence

from ..integrations.calibrate import Calibration
from ..plan.trade_off import Place, choices, one_setting_for_all, place_of
from ..report.content import Chart, Line
from .results import rounded
from .words import in_words

ATTENTION_COST = "attention time / that of exact attention"
_ROUNDING = 1e-9  # what float32 alone leaves, squared, where a window holds the whole text
PREDICTED_KL = "predicted KL(exact || plan), nats"


def trade_off_chart(found: Calibration) -> Chart:
    """Return every setting for all heads, choices head by head, and the plan among them."""
    n = found.plan.calibrated_length
    own = place_of(found.plan.heads, found.plan.predicted_kl)
    given = found.measured, found.costs
    settings = one_setting_for_all(*given, found.sensitivities)
    chosen = choices(*given, found.ladder, found.allowed, found.sensitivities, found.plan.tolerance)
    by = "tolerance" if found.sensitivities is None else "budget"
    return Chart(
        title="Error against cost",
        x_title=ATTENTION_COST,
        y_title=(PREDICTED_KL if found.sensitivities is not None else "error estimate, rms over heads"),
        lines=(
            _line(
                "one setting for all heads",
                settings,
                [in_words(setting, n) for setting in found.ladder],
                joined=False,
            ),
            _line(
                f"choices head by head, by {by}",
                chosen,
                [f"{by} {place.limit:.3g}" for place in chosen],
                joined=True,
            ),
        ),
        y_log=True,
        marked=(rounded(own.cost), _error(own), "this plan"),
    )


def _line(name: str, places: Sequence[Place], labels: Sequence[str], *, joined: bool) -> Line:
    return Line(
        name,
        tuple(rounded(place.cost) for place in places),
        tuple(_error(place) for place in places),
        tuple(labels),
        joined=joined,
    )


def _error(place: Place) -> float:
    return rounded(place.error) if place.error > _ROUNDING else 0.0
