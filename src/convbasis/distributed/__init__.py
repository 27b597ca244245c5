"""Attention over sequences that are spread over several processes, by torch.distributed."""

from ..errors import DistributedError
from .attention import conv_basis_attention
from .heads_parallel import parallelize_heads
from .hybrid import hybrid_attention
from .plans import share_plan
from .positions import token_lengths

__all__ = [
    "DistributedError",
    "conv_basis_attention",
    "hybrid_attention",
    "parallelize_heads",
    "share_plan",
    "token_lengths",
]
