"""Seconds per unit of work on this machine: built in, or fitted and kept in a file."""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

FORMAT = "convbasis-rates"


class Rates(NamedTuple):
    """Seconds per unit of the amounts of `choice.Amounts`: the same fields in the same order."""

    transformed: float
    turned: float
    flops: float
    passed: float
    matrices: float
    chunks: float
    calls: float
    laid: float
    summed: float
    streamed: float


# Fitted on a two-core x86 server without AVX-512, one thread; on accelerators a launch costs as much as
# much work, which is what decides.
_BUILT_IN = {
    "cpu": Rates(0.0, 4.8e-09, 1.2e-11, 1.1e-09, 1.6e-06, 4.8e-05, 1.7e-03, 1.4e-09, 1.4e-09, 9.7e-09),
    "other": Rates(2e-12, 2e-11, 1e-13, 4e-12, 2e-9, 2e-4, 2e-3, 2e-11, 1e-12, 4e-12),
}


def rates_file() -> Path:
    """Return where fitted rates are kept: ``CONVBASIS_RATES``, or a file in the user's cache folder."""
    named = os.environ.get("CONVBASIS_RATES")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "convbasis" / "rates.json"


@functools.lru_cache(maxsize=64)
def rates(device: str, threads: int) -> Rates:
    """Return the rates for a device and a number of threads: fitted ones, or the built-in ones."""
    fitted = read_rates(rates_file())
    kind = "cpu" if device == "cpu" else "other"
    exact, other = fitted.get(f"{device}-{threads}"), _BUILT_IN[kind]
    return exact if exact is not None else other


def read_rates(path: Path) -> dict[str, Rates]:
    """Return the fitted rates by device and threads; none where the file is missing or damaged."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            return {}
        found = {name: Rates(*map(float, row)) for name, row in content["rates"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    if not all(math.isfinite(rate) and rate >= 0 for row in found.values() for rate in row):
        return {}
    return found


def write_rates(path: Path, fitted: dict[str, Rates]) -> None:
    """Add fitted rates to the file, written beside it and then renamed."""
    known = {**read_rates(path), **fitted}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"format": FORMAT, "rates": known}, indent=1) + "\n")
    part.replace(path)
    rates.cache_clear()
