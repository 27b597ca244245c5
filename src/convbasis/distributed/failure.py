"""Who is to blame when a collective fails: every rank that is alive leaves a note in the group's store.

There are no heartbeats: notes are written after a failure alone. Who has left none when the time is up
has died or hangs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from ..errors import DistributedError

_NOTE = "convbasis/failed/{}"
_LEAST = 0.01  # seconds to wait for: to a store none at all are without end
_SHOWN = 300  # characters of another rank's message
_SLACK = 1.0  # seconds more than a store that answers may need
_T = TypeVar("_T")


def leave_note(group: Any, message: str, seconds: float = 10.0) -> None:
    """Tell the other ranks why this one goes no further.

    Raises:
        RuntimeError: the store does not answer in some seconds.
    """
    name, content = _NOTE.format(group.rank()), json.dumps({"message": message})
    _answer(lambda: _store(group).set(name, content), seconds)


def forget_note(group: Any, seconds: float = 10.0) -> None:
    """Take away what this rank has left in an earlier attempt, where a launcher keeps its store.

    Raises:
        DistributedError: the store does not answer.
    """
    name = _NOTE.format(group.rank())
    try:
        _answer(lambda: _store(group).delete_key(name), seconds)
    except RuntimeError as error:
        raise DistributedError(
            f"the store of the process group does not answer ({_short(str(error))}): the process that "
            "holds it has died or hangs, which is rank 0 of all unless torchrun holds the store"
        ) from error


def post_mortem(group: Any, seconds: float, message: str) -> DistributedError:
    """Return the error that names the ranks that are missing, or those that failed by themselves.

    Args:
        group: whose collective failed.
        seconds: time for other ranks to notice it too.
        message: what the collective said.
    """
    try:
        reasons, missing = _answer(lambda: _notes(group, seconds), seconds + _SLACK)
    except (RuntimeError, ValueError) as error:
        return DistributedError(
            f"a collective failed ({_short(message)}), and the store that would tell which rank is "
            f"missing does not answer ({_short(str(error))}): its process has died or hangs, which is "
            "rank 0 of all unless torchrun holds the store"
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


def _notes(group: Any, seconds: float) -> tuple[dict[int, str], list[int]]:
    """Return what other ranks tell of themselves within some seconds, and those that tell nothing."""
    store, own = _store(group), group.rank()
    end = time.monotonic() + seconds
    reasons: dict[int, str] = {}
    missing = []
    if not store.check([_NOTE.format(own)]):
        store.set(_NOTE.format(own), json.dumps({"message": ""}))
    for rank in range(group.size()):
        name = _NOTE.format(rank)
        if rank == own:
            continue
        if not _appears(store, name, end - time.monotonic()):
            missing.append(rank)
        else:
            reasons[rank] = str(json.loads(store.get(name)).get("message", ""))[:_SHOWN]
    return reasons, missing


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


def _answer(ask: Callable[[], _T], seconds: float) -> _T:
    """Return what a store answers: torch waits without end for one whose process is stopped."""
    answers: list[_T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # raised in the thread that asks
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise RuntimeError(f"no answer in {seconds:g} s")
    return answers[0]


def _store(group: Any) -> Any:
    return group.get_group_store()


def _short(message: str) -> str:
    return message.strip().splitlines()[0][:_SHOWN] if message.strip() else "no message"
