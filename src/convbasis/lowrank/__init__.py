"""Masked low-rank matrices and attention: the rank basis beside the conv basis."""

from .attention import LowRankStats, lowrank_attention, lowrank_attention_stats
from .distinct import DistinctColumnsMask, DistinctRowsMask
from .features import feature_count, polynomial_features, truncation_error
from .intervals import CausalMask, DocumentMask, IntervalMask, ShiftedGroupMask, SlidingWindowMask
from .mask import Mask
from .product import masked_lowrank_matmul
from .random_features import random_features
from .relative import lowrank_toeplitz_matmul, relative_attention, rotary_features
from .row_changes import RowChangeMask
from .sums import Part, merge_parts, sparse_attention_stats

__all__ = [
    "CausalMask",
    "DistinctColumnsMask",
    "DistinctRowsMask",
    "DocumentMask",
    "IntervalMask",
    "LowRankStats",
    "Mask",
    "Part",
    "RowChangeMask",
    "ShiftedGroupMask",
    "SlidingWindowMask",
    "feature_count",
    "lowrank_attention",
    "lowrank_attention_stats",
    "lowrank_toeplitz_matmul",
    "masked_lowrank_matmul",
    "merge_parts",
    "polynomial_features",
    "random_features",
    "relative_attention",
    "rotary_features",
    "sparse_attention_stats",
    "truncation_error",
]
