"""Layers, DTensors, FSDP2, tensor parallelism and plans over ranks; see model_checks.py."""

import model_checks
import pytest
from processes import launch


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_models(ranks):
    assert launch(ranks, model_checks.everything, ranks) == [True] * ranks
