"""One plan for all ranks: read or made by one of them, sent to the others as JSON."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_nonnegative_int, describe
from ..errors import InputError
from ..plan import Plan
from ..plan.file import dumps, loads
from .handshake import agree, ranks_for


def share_plan(plan: Plan | None, mesh: Any, *, source: int = 0, timeout: float = 300.0) -> Plan:
    """Return one rank's plan in all ranks, which call it together.

    Args:
        plan: the plan, in the rank that has it; what other ranks give is not looked at.
        mesh: DeviceMesh of one dimension, the ranks.
        source: the rank that has it, counted in the mesh.
        timeout: seconds until an error names a rank that is missing.

    Returns:
        the plan, equal in all ranks.

    Raises:
        InputError: (a ValueError) the source has no plan, in the source.
        DistributedError: it has none, in the other ranks; or a rank is missing.

    Example:
        With two processes: ``plan = share_plan(Plan.load(path) if rank == 0 else None, mesh)``.
    """
    ranks = ranks_for(mesh, timeout)
    device = torch.device(mesh.device_type)

    def check() -> tuple[dict[str, Any], int, bytes]:
        given = check_nonnegative_int("source", source)
        if given >= ranks.size:
            raise InputError(f"source={given} is no rank: the mesh has {ranks.size}")
        text = b""
        if ranks.rank == given:
            if not isinstance(plan, Plan):
                raise InputError(f"plan is {describe(plan)} in rank {given}, the source; give a Plan")
            text = dumps(plan).encode()
        return {"source": source}, len(text), text

    sizes, text = agree(ranks, device, check)
    letters = torch.tensor(list(text), dtype=torch.uint8, device=device)
    arrived = ranks.gather(letters, sizes, "plan")[source]
    return loads(bytes(arrived.tolist()), f"the plan of rank {source}")
