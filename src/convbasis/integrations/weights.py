"""Which weights a model has: what tells a fine-tuned model from the one that a plan was made for."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch

_ENDS = 32  # numbers at either end of a parameter


def weights_sha256(model: Any, *, exact: bool = False) -> str | None:
    """Return a fingerprint of a model's weights: of both ends of every parameter, to be quick.

    It is the same in float32 and bfloat16, unless it is to be exact. None where weights are not at
    hand: on the meta device, or spread over processes.
    """
    distributed = sys.modules.get("torch.distributed.tensor")
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        spread = distributed is not None and isinstance(parameter, distributed.DTensor)
        if not exact and (spread or parameter.device.type == "meta"):
            return None
        flat = parameter.detach().flatten()
        ends = torch.cat([flat[:_ENDS], flat[-_ENDS:]])
        ends = (ends if exact else ends.to(torch.bfloat16)).float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {ends.tolist()}".encode())
    return digest.hexdigest()
