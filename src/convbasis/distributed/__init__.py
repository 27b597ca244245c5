"""Attention over sequences that are spread over several processes, by torch.distributed."""

from ..errors import DistributedError
from .attention import conv_basis_attention
from .hybrid import hybrid_attention

__all__ = ["DistributedError", "conv_basis_attention", "hybrid_attention"]
