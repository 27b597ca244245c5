"""Masked low-rank matrices and attention: the rank basis beside the conv basis."""

from .distinct import DistinctColumnsMask, DistinctRowsMask
from .intervals import CausalMask, DocumentMask, IntervalMask, ShiftedGroupMask, SlidingWindowMask
from .mask import Mask
from .product import masked_lowrank_matmul
from .row_changes import RowChangeMask

__all__ = [
    "CausalMask",
    "DistinctColumnsMask",
    "DistinctRowsMask",
    "DocumentMask",
    "IntervalMask",
    "Mask",
    "RowChangeMask",
    "ShiftedGroupMask",
    "SlidingWindowMask",
    "masked_lowrank_matmul",
]
