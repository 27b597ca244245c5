"""Tests run on poisoned memory: torch.empty is filled with NaN, so that an unwritten output shows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

from convbasis import workspace


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                tensor.fill_(float("nan"))
            return tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    for module in (
        "workspace",
        "convolve.windows",
        "convolve.partitioned",
        "convolve.spectra",
        "convolve.gradients",
        "convolve.direct",
        "attention.heads",
        "attention.by_tiles",
        "hybrid.beyond",
    ):
        monkeypatch.setattr(f"convbasis.{module}.take", poison(workspace.take))


@pytest.fixture(scope="session")
def smollm2():
    """The real model, loaded once."""
    from convbasis.integrations.smollm2 import load_smollm2

    return load_smollm2()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_configure(config):
    """Choices in tests do not depend on what this machine was tuned to; processes share its cores."""
    if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        share = max(1, (os.cpu_count() or 1) // processes)
        torch.set_num_threads(share)
        os.environ["OMP_NUM_THREADS"] = str(share)  # of the programs that tests start
    os.environ["CONVBASIS_RATES"] = str(Path(tempfile.gettempdir()) / "convbasis-no-rates.json")
