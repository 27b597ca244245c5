"""By which way the gradients of a call are found."""

from __future__ import annotations

from typing import NamedTuple

from ..convolve.choice import Work, least_partition
from ..convolve.partition import Sizes
from ..convolve.segments import segment_stops
from .forward import Inputs
from .gradients import Wanted

# In units of a product: what it takes to find the gradients of values and kernels, by transforms and
# with # the matrix laid out; those of queries and keys from the laid-out gradients of all logits; and a
# product with the columns of values times keys, which are to be made and to be added up.
_BY_TRANSFORMS = 3.0
_LAID_OUT = 3.0
_OF_KEYS = 2.2
_OF_PAIRS = 1.8


class Way(NamedTuple):
    """How gradients are found."""

    sizes: Sizes | None
    """Of the partition; None where the matrix is laid out."""
    values_alone: bool = False
    """The matrix is laid out for queries and keys."""


def backward_way(inputs: Inputs, wanted: Wanted, backend: str) -> Way:
    """Return how the gradients of a call are found.

    Args:
        inputs: of the forward pass.
        wanted: which gradients.
        backend: of the forward pass; ``"direct"``, ``"reference"`` and ``"partitioned"`` are followed,
            the others leave the choice to the model.
    """
    if backend in ("direct", "reference"):
        return Way(None)
    problems, sets, n, d = inputs.query.shape
    longest = int((segment_stops(inputs.starts, n) - inputs.starts).max())
    k, width = inputs.starts.shape[-1], inputs.value.shape[-1]
    work = Work(n, k, width + 1, d, longest, problems * sets, inputs.work, inputs.query.device.type)
    times = least_partition(work)
    if backend == "partitioned":
        return Way(times.sizes)
    if wanted.gradient == "forward":
        by_transforms = _BY_TRANSFORMS * times.partitioned < _LAID_OUT * times.direct
        return Way(times.sizes if by_transforms else None)
    # A product with d columns for each column of the values and for the normaliser, and as many back.
    products = (1 if wanted.queries_alone else 2) * (width + 1)
    all_products = _OF_PAIRS * products * least_partition(work._replace(columns=d)).partitioned
    laid_out = _OF_KEYS * times.direct
    ways = {
        Way(None): laid_out + 0.25 * _LAID_OUT * times.direct,
        Way(times.sizes): _BY_TRANSFORMS * times.partitioned + all_products,
    }
    if not wanted.queries_alone:
        ways[Way(times.sizes, True)] = _BY_TRANSFORMS * times.partitioned + laid_out
    return min(ways, key=lambda way: ways[way])
