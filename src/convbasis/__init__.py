"""convbasis: causal attention and lower-triangular matrices in the conv basis."""

from . import lowrank, nn
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
    DistributedError,
    FileFormatError,
    InputError,
    MissingExtraError,
    MissingPathError,
)
from .hybrid import HybridDispatch, HybridState, HybridStats, hybrid_attention, hybrid_attention_stats
from .integrations.calibrate import calibrate
from .integrations.planned import PlanReport, apply_plan, plan_report, remove_plan
from .lowrank import lowrank_attention, masked_lowrank_matmul
from .plan import Plan
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
    "DistributedError",
    "FileFormatError",
    "HybridDispatch",
    "HybridState",
    "HybridStats",
    "InputError",
    "LossAndGradient",
    "MissingExtraError",
    "MissingPathError",
    "Plan",
    "PlanReport",
    "PlantedQK",
    "apply_plan",
    "attention_loss_and_gradient",
    "calibrate",
    "causal_toeplitz_matmul",
    "conv_basis_attention",
    "conv_basis_attention_stats",
    "decompose",
    "hybrid_attention",
    "hybrid_attention_stats",
    "last_dispatch",
    "lowrank",
    "lowrank_attention",
    "masked_lowrank_matmul",
    "nn",
    "plan_report",
    "planted_qk",
    "recover",
    "remove_plan",
]
