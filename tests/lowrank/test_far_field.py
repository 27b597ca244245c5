"""hybrid_attention with far_field="lowrank"."""

import pytest
import reference
import torch
from comparison import errors

import convbasis as cb

NEAR = {"window": 40, "sinks": 2, "columns": 8, "samples": 16}


def draw(n, size, dtype=torch.float32, heads=4):
    """Queries and keys whose logits spread by about `size`, with a direction that all queries like."""
    q = torch.randn(1, heads, n, 16, dtype=dtype)
    k, v = (torch.randn(1, 2, n, d, dtype=dtype) for d in (16, 5))
    q[..., 8:] = 0.0  # what the far field has coordinates for
    return size * q + torch.eye(16, dtype=dtype)[0], k, v


def error(found, q, k, v):
    return errors(reference.exact_attention(q, k, v), found)["rms"]


def test_every_key_counts_once():
    """Without queries all weights are equal: attention is a mean, its normaliser the number of keys."""
    n = 500
    q, k, v = draw(n, 0.0, torch.float64)
    q = torch.zeros_like(q)
    found = cb.hybrid_attention_stats(q, k, v, far_field="lowrank", enable_gqa=True, **NEAR)
    assert found.dispatch.parts == ("window", "columns", "lowrank")
    assert error(found.output, q, k, v) < 1e-6
    numbers = torch.arange(1, n + 1, dtype=torch.float64)
    assert torch.allclose(found.lse.exp(), numbers.expand_as(found.lse), rtol=1e-5)


def test_it_is_close_where_logits_are_small_and_closer_than_nothing():
    q, k, v = draw(600, 0.3)
    v = v + k[..., :5]  # values that follow the keys
    options = {"enable_gqa": True, **NEAR}
    found = cb.hybrid_attention(q, k, v, far_field="lowrank", **options)
    dropped = cb.hybrid_attention(q, k, v, **options)
    assert error(found, q, k, v) < 0.3 * error(dropped, q, k, v)
    again = cb.hybrid_attention(q, k, v, far_field="lowrank", **options)
    assert torch.equal(found, again)


def test_the_estimate_covers_the_error():
    q, k, v = draw(600, 1.0)
    found = cb.hybrid_attention_stats(q, k, v, far_field="lowrank", enable_gqa=True, **NEAR)
    exact = reference.exact_attention(q, k, v)
    off = (found.output - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    assert bool((off <= found.error_estimate).all())
    assert bool((off >= 0.3 * found.error_mean).all())


def test_padding_changes_nothing():
    q, k, v = draw(400, 0.5)
    real = torch.ones(1, 430, dtype=torch.bool)
    real[:, :30] = False
    padded = [torch.nn.functional.pad(x, (0, 0, 30, 0), value=7.0) for x in (q, k, v)]
    options = {"far_field": "lowrank", "enable_gqa": True, **NEAR}
    found = cb.hybrid_attention(*padded, key_padding_mask=real, **options)
    assert torch.allclose(found[:, :, 30:], cb.hybrid_attention(q, k, v, **options), atol=1e-6)


def test_gradients_reach_far_keys():
    q, k, v = (x.requires_grad_() for x in draw(300, 0.2, torch.float64))
    options = {"far_field": "lowrank", "enable_gqa": True, **(NEAR | {"columns": 0})}
    output = cb.hybrid_attention(q, k, v, **options)
    found = torch.autograd.grad(output[:, :, -1].sum(), (q, k, v))
    for gradient in found[1:]:
        assert bool((gradient[:, :, 2:200].norm(dim=-1) > 0).all())
    # The output is linear in the values.
    change = torch.randn_like(v)
    with torch.no_grad():
        moved = cb.hybrid_attention(q, k, v + change, **options)[:, :, -1].sum()
        assert torch.allclose((found[2] * change).sum(), moved - output[:, :, -1].sum())


@pytest.mark.parametrize("change", [{"blocks": 2}, {"strict": True}])
def test_what_does_not_fit_is_refused(change):
    with pytest.raises(cb.InputError, match=r"far_field='lowrank' with blocks=. and strict="):
        cb.hybrid_attention(*draw(50, 1.0, heads=2), far_field="lowrank", **change)
