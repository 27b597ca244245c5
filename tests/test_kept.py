"""Tensors that are kept: for whom they are made, and that none of a mode's is given to others."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from convbasis.kept import kept


@kept(4)
def ramp(length):
    """Return numbers from 0 on."""
    return torch.arange(float(length))


def test_what_is_kept_is_made_once():
    assert ramp(3) is ramp(3)
    assert ramp(3) is not ramp(4)
    assert ramp(3).tolist() == [0.0, 1.0, 2.0]
    assert ramp.__doc__ == "Return numbers from 0 on."


def test_what_was_made_for_inference_serves_gradients():
    with torch.inference_mode():
        made = ramp(5)
    x = torch.ones(5, requires_grad=True)
    (x * ramp(5)).sum().backward()
    assert ramp(5) is made
    assert torch.equal(x.grad, made)


def test_fake_tensors_are_not_kept():
    with FakeTensorMode():
        assert isinstance(ramp(6), FakeTensor)
    assert not isinstance(ramp(6), FakeTensor)
    with FakeTensorMode():
        assert isinstance(ramp(6), FakeTensor)


def test_under_a_transform():
    found = torch.func.vmap(lambda x: x * ramp(7))(torch.ones(2, 7))
    assert torch.equal(found[1], ramp(7))
