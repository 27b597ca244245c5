"""What ranks that share a prompt must have in common, and models that cannot share one."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..plan import Plan
from ..plan.file import dumps

if TYPE_CHECKING:
    from .planned import AppliedPlan


def of_plan(applied: AppliedPlan) -> dict[str, Any]:
    """Return what tells plans apart, and how they are applied."""
    return {
        "plan": _fingerprint(applied.plan),
        "min_length": applied.min_length,
        "dynamic": applied.dynamic,
        "training": applied.training,
    }


@lru_cache(maxsize=8)  # asked for by every layer
def _fingerprint(plan: Plan) -> str:
    return hashlib.sha256(dumps(plan).encode()).hexdigest()


def check_positions(model: Any) -> None:
    """Check that a model's rotary positions do not depend on the length of the prompt.

    A rank takes its own last position for that length, so that ranks would turn their keys differently.

    Raises:
        InputError: they do.
    """
    for module in model.modules():
        found = getattr(module, "rope_type", None)
        kinds = found.values() if isinstance(found, dict) else [found]
        for kind in kinds:
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                raise InputError(
                    f"mesh was given, but this {type(model).__name__} has rotary positions of the type "
                    f"{kind!r}, which depend on the length of the whole prompt: a rank knows its own "
                    "tokens alone; run it in one process"
                )
