"""Who is to blame when a collective fails: every rank that is alive leaves a note in the group's store.

There are no heartbeats: notes are written after a failure alone. Who has left none when the time is up
has died or hangs.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

from ..errors import DistributedError

_NOTE = "convbasis/failed/{}"
_LEAST = 0.01  # seconds to wait for: to a store none at all are without end
_SHOWN = 300  # characters of another rank's message


def leave_note(group: Any, message: str) -> None:
    """Tell the other ranks why this one goes no further."""
    _store(group).set(_NOTE.format(group.rank()), json.dumps({"message": message}))


def forget_note(group: Any) -> None:
    """Take away what this rank has left in an earlier attempt, where a launcher keeps its store."""
    _store(group).delete_key(_NOTE.format(group.rank()))


def post_mortem(group: Any, seconds: float, message: str) -> DistributedError:
    """Return the error that names the ranks that are missing, or those that failed by themselves.

    Args:
        group: whose collective failed.
        seconds: time for other ranks to notice it too.
        message: what the collective said.
    """
    store = _store(group)
    own = group.rank()
    end = time.monotonic() + seconds
    reasons: dict[int, str] = {}
    missing = []
    try:
        if not store.check([_NOTE.format(own)]):
            leave_note(group, "")
        for rank in range(group.size()):
            name = _NOTE.format(rank)
            if rank == own:
                continue
            if not _appears(store, name, end - time.monotonic()):
                missing.append(rank)
            else:
                reasons[rank] = str(json.loads(store.get(name)).get("message", ""))[:_SHOWN]
    except (RuntimeError, ValueError) as error:
        return DistributedError(
            f"a collective failed ({_short(message)}), and the store that would tell which rank is "
            f"missing does not answer ({_short(str(error))}): its process has died, which is rank 0 of "
            "all unless torchrun holds the store"
        )
    told = [f"rank {rank} failed: {reason}" for rank, reason in reasons.items() if reason]
    if told:
        return DistributedError("; ".join(told))
    if missing:
        names = ", ".join(f"rank {rank}" for rank in missing)
        return DistributedError(
            f"{names} took no part in a collective and left no note in {seconds:g} s "
            f"after it failed: the process has died or hangs ({_short(message)})"
        )
    return DistributedError(
        f"a collective failed although all ranks are alive: {_short(message)}; one of them came later "
        "than the time limit allows: give a larger timeout"
    )


def _appears(store: Any, name: str, seconds: float) -> bool:
    """Whether a key is there, or comes within some seconds."""
    if store.check([name]):
        return True
    if seconds < _LEAST:
        return False
    try:
        store.wait([name], timedelta(seconds=seconds))
    except RuntimeError:
        return bool(store.check([name]))
    return True


def _store(group: Any) -> Any:
    return group.get_group_store()


def _short(message: str) -> str:
    return message.strip().splitlines()[0][:_SHOWN] if message.strip() else "no message"
