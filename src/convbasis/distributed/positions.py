"""Where in the sequence a rank's tokens are."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_nonnegative_int
from .handshake import agree, ranks_for


@torch.compiler.disable  # type: ignore[untyped-decorator]
def token_lengths(tokens: int, mesh: Any, *, timeout: float = 300.0) -> list[int]:
    """Return how many tokens each rank has; all ranks of the mesh call it together.

    The first token of rank r is at ``sum(lengths[:r])``, which is what positions count from.

    Args:
        tokens: of this rank.
        mesh: DeviceMesh of one dimension, the ranks.
        timeout: seconds until an error names a rank that is missing.

    Raises:
        InputError: (a ValueError) tokens is no number.
        DistributedError: a rank is missing.
    """
    ranks = ranks_for(mesh, timeout)

    def check() -> tuple[dict[str, Any], int, bool]:
        return {}, check_nonnegative_int("tokens", tokens), True

    return agree(ranks, torch.device(mesh.device_type), check)[0]
