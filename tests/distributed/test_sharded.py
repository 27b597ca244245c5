"""Attention over several ranks is that of one process; the checks are in sharded_checks.py."""

import sharded_checks
from processes import launch


def test_two_ranks():
    assert launch(2, sharded_checks.everything, 2) == [True] * 2


def test_three_ranks():
    assert launch(3, sharded_checks.everything, 3) == [True] * 3


def test_four_ranks():
    assert launch(4, sharded_checks.everything, 4) == [True] * 4
