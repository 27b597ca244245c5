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


@pytest.mark.parametrize("sinks", [0, 4])
def test_far_keys_without_any_columns(sinks):
    q, k, v = draw(500, 0.2)
    options = {"enable_gqa": True, **NEAR, "sinks": sinks, "columns": 0}
    found = cb.hybrid_attention(q, k, v, far_field="lowrank", **options)
    dropped = cb.hybrid_attention(q, k, v, **options)
    assert error(found, q, k, v) < 0.5 * error(dropped, q, k, v)


def test_where_all_keys_are_seen_elsewhere_attention_is_exact():
    q, k, v = draw(90, 1.0)
    options = {"enable_gqa": True, **NEAR, "window": 10, "sinks": 100}
    found = cb.hybrid_attention(q, k, v, far_field="lowrank", **options)
    assert error(found, q, k, v) < 1e-6


@pytest.mark.parametrize("which", [0, 1])
def test_a_head_of_zeros(which):
    given = draw(400, 0.3, heads=2)
    given[which][:, 0] = 0.0
    found = cb.hybrid_attention(*given, far_field="lowrank", **NEAR)
    assert error(found, *given) < 0.2


def test_gradients_by_torch_func_are_those_of_autograd():
    q, k, v = draw(300, 0.3, torch.float64)
    options = {"far_field": "lowrank", "enable_gqa": True, **NEAR}
    call = lambda *x: cb.hybrid_attention(*x, **options).square().sum()  # noqa: E731
    found = torch.func.grad(call, (0, 1, 2))(q, k, v)
    own = [x.clone().requires_grad_() for x in (q, k, v)]
    for expected, actual in zip(torch.autograd.grad(call(*own), own), found, strict=True):
        assert torch.allclose(expected, actual, rtol=1e-10, atol=1e-12)
    mapped = torch.func.vmap(lambda q: cb.hybrid_attention(q, k, v, **options))(torch.stack([q, 2 * q]))
    assert torch.allclose(mapped[1], cb.hybrid_attention(2 * q, k, v, **options))


def test_a_call_in_inference_mode_does_not_spoil_training_after_it():
    q, k, v = draw(333, 0.3)  # a length of its own: what heads share is made here
    with torch.inference_mode():
        cb.hybrid_attention(q, k, v, far_field="lowrank", enable_gqa=True, **NEAR)
    q.requires_grad_()
    cb.hybrid_attention(q, k, v, far_field="lowrank", enable_gqa=True, **NEAR).sum().backward()
    assert bool(q.grad.isfinite().all())


@pytest.mark.parametrize("change", [{"blocks": 2}, {"strict": True}])
def test_what_does_not_fit_is_refused(change):
    with pytest.raises(cb.InputError, match=r"far_field='lowrank' with blocks=. and strict="):
        cb.hybrid_attention(*draw(50, 1.0, heads=2), far_field="lowrank", **change)
