"""Modules for models that are trained with a conv basis."""

from .attention import ConvBasisAttention
from .cache import ConvBasisCache
from .segments import segment_starts

__all__ = ["ConvBasisAttention", "ConvBasisCache", "segment_starts"]
