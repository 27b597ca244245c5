"""Which model a plan belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_positive_int, describe
from ..errors import InputError


@dataclass(frozen=True)
class ModelShape:
    """The kind and the sizes of a transformers model.

    Attributes:
        name: where it came from, for the reader; not compared with a model's.
        type: its architecture, as in ``config.model_type``.
        layers: number of layers.
        heads: query heads of a layer.
        kv_heads: key-value heads of a layer.
        head_dim: entries of a query.
    """

    name: str
    type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("name", "type"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name}={describe(getattr(self, name))} is not a string")
        for name in ("layers", "heads", "kv_heads", "head_dim"):
            check_positive_int(name, getattr(self, name), "a size of the model")
        if self.heads % self.kv_heads:
            raise InputError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """Read the shape of a transformers model from its configuration.

        Raises:
            InputError: the model has no configuration that states it.
        """
        try:
            config = model.config.get_text_config()
            heads = config.num_attention_heads
            return cls(
                name=Path(config._name_or_path).name or type(model).__name__,
                type=config.model_type,
                layers=config.num_hidden_layers,
                heads=heads,
                kv_heads=getattr(config, "num_key_value_heads", None) or heads,
                head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            )
        except AttributeError as error:
            raise InputError(
                f"model is {describe(model)} whose shape cannot be read ({error}); a transformers "
                "model with num_hidden_layers, num_attention_heads and hidden_size is wanted"
            ) from None

    def check(self, model: Any) -> None:
        """Check that a model is of this type and shape.

        Raises:
            InputError: it is another model.
        """
        other = ModelShape.of(model)
        differing = [
            f"{name} {getattr(other, name)!r} (the plan: {getattr(self, name)!r})"
            for name in ("type", "layers", "heads", "kv_heads", "head_dim")
            if getattr(other, name) != getattr(self, name)
        ]
        if differing:
            raise InputError(
                f"the plan is for {self.name!r}, not for this {type(model).__name__}, which has "
                f"{', '.join(differing)}; calibrate this model or load its own plan"
            )
