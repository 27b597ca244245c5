"""Sizes as functions of the prompt's length."""

import pytest

import convbasis as cb
from convbasis.plan import HeadSetting, Size


class TestSize:
    def test_the_calibrated_length_gives_the_size_itself(self):
        for size in (0, 1, 7, 256):
            for power in (0.0, 0.3, 0.5, 1.0):
                assert Size(size, length=1000, power=power).at(1000) == size

    @pytest.mark.parametrize(("power", "expected"), [(0.0, 100), (0.5, 200), (1.0, 400)])
    def test_grows_as_a_power(self, power, expected):
        assert Size(100, length=1000, power=power).at(4000) == expected

    def test_shrinks_below_the_calibrated_length(self):
        assert Size(100, length=1000, power=1.0).at(500) == 50

    def test_rounds_up_to_a_multiple(self):
        size = Size(100, length=1000, power=0.5, multiple=64)
        assert size.at(1000) == 128
        assert size.at(1700) == 192  # 130.4

    def test_a_whole_multiple_stays(self):
        for factor in range(1, 200):
            assert Size(64, length=1000, power=1.0, multiple=64).at(1000 * factor) == 64 * factor

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"size": -1}, "size=-1 is not an integer >= 0"),
            ({"size": 2.5}, "size=2.5 is not an integer >= 0"),
            ({"size": True}, "size=True is not an integer"),
            ({"length": 0}, "length=0 is not a positive integer"),
            ({"power": float("nan")}, "power=nan is not a finite number >= 0"),
            ({"power": -1.0}, "power=-1.0 is not a finite number >= 0"),
            ({"multiple": 0}, "multiple=0 is not a positive integer"),
            ({"power": 1e6}, "power=1000000.0 is more than 4.0"),
            ({"size": 10**20}, "size=100000000000000000000 is more than"),
            ({"multiple": 10**20}, "multiple=100000000000000000000 is more than"),
        ],
        ids=str,
    )
    def test_refusals(self, change, message):
        with pytest.raises(cb.InputError, match=message):
            Size(**{"size": 1, "length": 10, **change})


class TestHeadSetting:
    def test_whole_numbers_stay_at_every_length(self):
        setting = HeadSetting(
            32, sinks=2, columns=8, blocks=3, far_field="segments", key_weights=True, correction=True
        )
        assert setting.at(1000) == setting.at(100_000) == (32, 2, 8, 3, "segments", True, True)

    def test_each_size_grows_by_its_own_rule(self):
        setting = HeadSetting(
            window=Size(64, length=100, power=0.5),
            sinks=Size(4, length=100),
            columns=Size(16, length=100, power=1.0),
            blocks=Size(2, length=100, power=0.5),
        )
        assert setting.at(400) == (128, 4, 64, 4, "none", False, False)

    def test_keys_are_never_more_than_the_prompt(self):
        assert HeadSetting(window=64, sinks=20, columns=50).at(10)[:3] == (10, 10, 10)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"window": 0}, "window=0 leaves a query without its own key"),
            ({"window": Size(0, length=10)}, "window=0 leaves a query without its own key"),
            ({"columns": -3}, "columns=-3 is not an integer >= 0"),
            ({"sinks": "four"}, "sinks='four' is not an integer >= 0"),
            (
                {"far_field": "conv", "blocks": 2},
                "far_field='conv' with blocks=2: a convolution cannot",
            ),
            (
                {"far_field": "lowrank", "blocks": 2},
                "far_field='lowrank' with blocks=2: low rank cannot",
            ),
            ({"key_weights": 1}, "key_weights=1 is not True or False"),
            ({"correction": "yes"}, "correction='yes' is not True or False"),
            ({"far_field": "mean"}, "far_field='mean' is not known; use one of 'none'"),
        ],
        ids=str,
    )
    def test_refusals(self, change, message):
        with pytest.raises(cb.InputError, match=message):
            HeadSetting(**change)
