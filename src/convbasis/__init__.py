"""convbasis: causal attention and lower-triangular matrices in the conv basis."""

from . import nn
from .attention import (
    AttentionStats,
    LossAndGradient,
    attention_loss_and_gradient,
    conv_basis_attention,
    conv_basis_attention_stats,
)
from .basis import ConvBasis
from .decompose import decompose
from .dispatch import Dispatch, last_dispatch
from .errors import (
    ConvBasisError,
    ConvBasisWarning,
    FileFormatError,
    InputError,
    MissingExtraError,
    MissingPathError,
)
from .planted import PlantedQK, planted_qk
from .recover import recover
from .toeplitz import causal_toeplitz_matmul

__version__ = "0.1.0"

__all__ = [
    "AttentionStats",
    "ConvBasis",
    "ConvBasisError",
    "ConvBasisWarning",
    "Dispatch",
    "FileFormatError",
    "InputError",
    "LossAndGradient",
    "MissingExtraError",
    "MissingPathError",
    "PlantedQK",
    "attention_loss_and_gradient",
    "causal_toeplitz_matmul",
    "conv_basis_attention",
    "conv_basis_attention_stats",
    "decompose",
    "last_dispatch",
    "nn",
    "planted_qk",
    "recover",
]
