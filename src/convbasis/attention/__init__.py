"""Causal attention in the conv basis."""

from .functional import AttentionStats, conv_basis_attention, conv_basis_attention_stats

__all__ = ["AttentionStats", "conv_basis_attention", "conv_basis_attention_stats"]
