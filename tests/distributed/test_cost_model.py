"""The cost model: bytes as counted, and what must follow from it."""

import cost_checks
import pytest
from processes import launch

from convbasis.distributed.cost import Machine, attention_load, hybrid_load, ring_load


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_that_were_sent(ranks):
    *attention, hybrid = launch(ranks, cost_checks.sent, ranks)[0]
    for forward, backward, counted_forward, counted_backward in attention:
        assert counted_forward == pytest.approx(forward, rel=0.02)
        assert counted_backward == pytest.approx(backward, rel=0.02)
    # Which rank has how many columns is not known before.
    forward, backward, counted_forward, counted_backward = hybrid
    assert 0.7 * forward < counted_forward <= 1.05 * forward
    assert 0.7 * backward < counted_backward <= 1.05 * backward


def test_more_ranks_have_less_to_do():
    sizes = {"heads": 32, "head_dim": 64, "segments": 16}
    one, many = attention_load(1 << 20, 1, **sizes), attention_load(1 << 20, 16, **sizes)
    assert one.sent_forward == 0
    assert many.operations == pytest.approx(one.operations / 16)
    assert many.numbers < one.numbers / 12
    # More ranks than heads: kernels are made by all ranks of a head, and sent to all.
    wide = attention_load(1 << 20, 128, **sizes)
    assert wide.operations < many.operations / 2
    assert wide.sent_forward < many.sent_forward


@pytest.mark.parametrize(("n", "ring_wins"), [(1 << 12, True), (1 << 24, False)])
def test_a_ring_wins_on_short_sequences_alone(n, ring_wins):
    """Its work is quadratic, but of a kind that accelerators do many times faster."""
    products, transforms = Machine(4e14, 5e11), Machine(5e12, 5e11)
    ours = attention_load(n, 8, heads=32, kv_heads=8, head_dim=128, segments=64)
    ring = ring_load(n, 8, heads=32, kv_heads=8, head_dim=128, itemsize=2)
    of_ring = products.seconds(ring, backward=True)[1]
    assert (of_ring < transforms.seconds(ours, backward=True)[1]) == ring_wins


def test_time_without_overlap_is_a_sum():
    load = hybrid_load(1 << 16, 4, heads=8, head_dim=64, window=256, columns=64)
    machine = Machine(1e12, 1e9, 0.0)
    apart, hidden = machine.seconds(load, backward=False)
    assert apart == pytest.approx(load.operations / 1e12 + load.sent_forward / 1e9)
    assert hidden == pytest.approx(max(load.operations / 1e12, load.sent_forward / 1e9))


def test_the_backward_pass_of_exact_attention_takes_less():
    machine = Machine(1e12, 1e12, 0.0)
    for load, times in (
        (ring_load(1 << 12, 1, heads=8, head_dim=64), 2.5),
        (hybrid_load(1 << 12, 1, heads=8, head_dim=64, window=256, columns=64), 2.5),
        (attention_load(1 << 12, 1, heads=8, head_dim=64, segments=8), 3.0),
    ):
        forward, both = (machine.seconds(load, backward=way)[1] for way in (False, True))
        assert both == pytest.approx((1 + times) * forward)
