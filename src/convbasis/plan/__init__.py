"""A plan: for every head of a model, what its attention computes over a long prompt."""

from .model import ModelShape
from .plan import HeadPlan, Plan
from .settings import ConcreteSetting, HeadSetting, Size

__all__ = ["ConcreteSetting", "HeadPlan", "HeadSetting", "ModelShape", "Plan", "Size"]
