"""The paper's training objective of one attention layer, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_alike, check_finite, check_float_tensor
from ..convolve import DEFAULT_MAX_BYTES
from ..errors import InputError
from .backward import conv_basis_bwd
from .call import Biases, Options, attend, folded
from .gradients import Wanted
from .segments import check_segments


class LossAndGradient(NamedTuple):
    """L(X) and its gradient."""

    loss: Tensor
    """Scalar."""
    grad: Tensor
    """``(d, d)``, dL/dX."""


@torch.no_grad()
def attention_loss_and_gradient(
    A1: Tensor,
    A2: Tensor,
    A3: Tensor,
    X: Tensor,
    Y: Tensor,
    E: Tensor,
    *,
    num_bases: int | None = None,
    starts: Tensor | Sequence[int] | None = None,
    segment_length: int | None = None,
) -> LossAndGradient:
    """Return ``L(X) = 0.5 ‖D^-1 (M∘exp(A1 X A2^T)) A3 Y - E‖_F^2`` and dL/dX under a conv basis.

    M is the causal mask and D the normaliser. The logits ``A1 X A2^T``, without any scale, are replaced
    by a conv basis, and the gradient is attention's closed form with its weights f:
    ``dL/dX = A1^T p A2``, ``p = f∘G - diag((f∘G) 1) f``, ``G = (f A3 Y - E) (A3 Y)^T``. With every
    token a segment (``segment_length=1``) both are exact.

    Args:
        A1: ``(n, d)``, queries are ``A1 X``.
        A2: ``(n, d)``, keys.
        A3: ``(n, d)``, values are ``A3 Y``.
        X: ``(d, d)``.
        Y: ``(d, d_v)``.
        E: ``(n, d_v)``, the target.
        num_bases: see `conv_basis_attention`.
        starts: ``(k,)``, see `conv_basis_attention`.
        segment_length: see `conv_basis_attention`.

    Returns:
        `LossAndGradient`, in the dtype of the inputs; nothing is recorded for autograd.

    Raises:
        InputError: (a ValueError) shapes, dtypes or segments that do not fit; NaN or Inf.

    Complexity:
        O(k n d d_v + n d d_v log(n/k)) time and O(n (d + d_v)) memory, or O(n^2 (d + d_v)) time where
        that is less; no n×n array.

    Source:
        "Gradients" of docs/mathematics.md; Conv-Basis (arXiv 2405.05219), section 5.

    Example:
        >>> import torch, convbasis as cb
        >>> A1, A2, A3, E = torch.randn(4, 50, 3, dtype=torch.float64)
        >>> X, Y = torch.randn(2, 3, 3, dtype=torch.float64)
        >>> cb.attention_loss_and_gradient(A1, A2, A3, X, Y, E, segment_length=10).grad.shape
        torch.Size([3, 3])
    """
    given = {"A1": A1, "A2": A2, "A3": A3, "X": X, "Y": Y, "E": E}
    for name, tensor in given.items():
        check_float_tensor(name, tensor)
        if tensor.ndim != 2:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}; a matrix is wanted")
        if not tensor.numel():
            raise InputError(f"{name} has shape {tuple(tensor.shape)}: there is nothing to attend to")
        check_finite(name, tensor)
    check_alike(**given)
    n, d = A1.shape
    wanted = {
        "A2": (n, d),
        "A3": (n, d),
        "X": (d, d),
        "Y": (d, Y.shape[1]),
        "E": (n, Y.shape[1]),
    }
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise InputError(
                f"{name} has shape {tuple(given[name].shape)}; with A1 {(n, d)} and Y {tuple(Y.shape)} "
                f"it must be {shape}"
            )
    query, key, value = (tensor[None, None] for tensor in (A1 @ X, A2, A3 @ Y))
    request = check_segments(
        1,
        1,
        n,
        A1.device,
        num_bases=num_bases,
        starts=starts,
        segment_length=segment_length,
        window=1,
        delta=None,
        epsilon=0.0,
        search="linear",
    )
    call = attend(query, key, value, request, None, Biases(), Options(1.0, "auto", None))
    error = call.output - E
    inputs = folded(query, key, value, None, Biases(), 1.0)._replace(starts=call.starts)
    grads = conv_basis_bwd(
        inputs,
        call.output,
        call.lse,
        error,
        torch.zeros_like(call.lse),
        Wanted("attention", False, "auto", DEFAULT_MAX_BYTES, queries_alone=True),
    )
    of_query = grads.query[0, 0].to(A1.dtype)
    return LossAndGradient(0.5 * error.square().sum(), A1.mT @ of_query)
