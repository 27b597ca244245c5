"""Causal attention in the conv basis."""

from .functional import AttentionStats, conv_basis_attention, conv_basis_attention_stats
from .objective import LossAndGradient, attention_loss_and_gradient

__all__ = [
    "AttentionStats",
    "LossAndGradient",
    "attention_loss_and_gradient",
    "conv_basis_attention",
    "conv_basis_attention_stats",
]
