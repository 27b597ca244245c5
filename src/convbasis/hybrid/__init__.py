"""Exact attention over a few keys of each query, and a far field for the others."""

from .chunked import HybridState
from .functional import hybrid_attention, hybrid_attention_stats
from .heads import HybridDispatch, HybridStats
from .settings import FAR_FIELDS

__all__ = [
    "FAR_FIELDS",
    "HybridDispatch",
    "HybridState",
    "HybridStats",
    "hybrid_attention",
    "hybrid_attention_stats",
]
