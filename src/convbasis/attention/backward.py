"""The gradients of attention, of either meaning; segments are constants.

With P the attention weights, Y the output and dY its gradient, the gradient of a logit is
``dS = P (dY·v - dY·Y + dlse)``, and that of the values ``P^T dY``. What follows from dS is a choice:

- ``"forward"``, the gradient of what was computed. Summed over the entries that share a logit, the
  columns of a segment at one lag, dS becomes a gradient of the kernels, and by them of the queries and
  of the keys at segment starts.
- ``"attention"``, the gradient of exact attention, with this P in place of its weights: ``dS K`` and
  ``dS^T Q``, which reach every query and key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..convolve import Sizes
from .by_tiles import tiled_gradients
from .by_transforms import head_gradients
from .cost import backward_way
from .forward import Inputs
from .gradients import Gradients, Incoming, Wanted
from .segments import same_for_all


def conv_basis_bwd(
    inputs: Inputs, output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor, wanted: Wanted
) -> Gradients:
    """Return the gradients with respect to query, key, value and the biases.

    Args:
        inputs: of the forward pass, starts ``(P, R, k)``.
        output: ``(P, R, n, d_v)``.
        lse: ``(P, R, n)``.
        grad_output: ``(P, R, n, d_v)``.
        grad_lse: ``(P, R, n)``.
        wanted: which gradients.

    Complexity: for each head, O(n d_v log(n/k) + k n (d + d_v + log(n/k))) time and O(n (d + d_v) + k
    n) memory for ``"forward"``; min(d_v, d) times as much time for ``"attention"``; O(n^2 (d + d_v))
    where that is faster.
    """
    clean = inputs.cleaned()
    clean = clean._replace(starts=same_for_all(clean.starts))
    visible = lse.isfinite()
    rows = grad_output.to(clean.work).masked_fill(~visible[..., None], 0.0)
    shared = grad_lse.to(clean.work) - (rows * output.to(clean.work)).sum(-1)
    incoming = Incoming(
        rows, shared.masked_fill(~visible, 0.0), lse.to(clean.work).masked_fill(~visible, torch.inf)
    )
    way = backward_way(clean, wanted, wanted.backend)
    if way.sizes is None:
        grads = tiled_gradients(clean, incoming, wanted)
    elif way.values_alone:
        own = wanted._replace(gradient="values")
        grads = _by_heads(clean, incoming, way.sizes, own)
        rest = tiled_gradients(clean, incoming, wanted._replace(keys_and_queries_alone=True))
        grads = grads._replace(query=rest.query, key=rest.key)
    else:
        grads = _by_heads(clean, incoming, way.sizes, wanted)
    if clean.real is not None:
        grads.clear(~clean.real)
    return grads


def _by_heads(clean: Inputs, incoming: Incoming, sizes: Sizes, wanted: Wanted) -> Gradients:
    """Return the gradients of all heads by transforms, head by head."""
    problems, sets, n, _ = clean.query.shape
    grads = None
    for head in range(problems * sets):
        found = head_gradients(clean, head, incoming, sizes, wanted)
        problem, own = divmod(head, sets)
        if found is None:
            of_head = Incoming(*(x[problem, own][None, None] for x in incoming))
            found = tiled_gradients(clean.of(head, n), of_head, wanted)
        if problems * sets == 1:
            return found
        if grads is None:
            grads = Gradients.empty(clean, wanted.lag_bias)
        grads.put(problem, own, found)
    assert grads is not None
    return grads
