"""Times of things measured side by side: interleaved runs, medians, and their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def seconds_on(device: torch.device) -> float:
    """Return a clock's seconds, once a device has done what it was given; a processor always has."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]], repeats: int = 5
) -> dict[str, float]:
    """Return the median seconds of each function, run in turn `repeats` times after one warm-up.

    Neighbouring runs see the same load of the machine: ratios of the medians mean something where
    absolute times do not.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}
