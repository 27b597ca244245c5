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
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from ..errors import DistributedError

_NOTE = "convbasis/failed/{}"
_LEAST = 0.01  # seconds to wait for: to a store none at all are without end
_SHOWN = 300  # characters of another rank's message
# Parts of a time limit: to wait for the notes of others, and for a store that does not answer.
_WAITING, _SLACK = 0.25, 0.2
# A rank whose collective failed after less than this part of what another waited came too late.
_LATE = 0.5
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


def name_of(group: Any, rank: int) -> str:
    """Return what errors call a rank of a group: as launchers count it too, where that differs."""
    try:
        whole = dist.get_global_rank(group, rank)
    except ValueError:  # the group is gone
        whole = rank
    return f"rank {rank}" if whole == rank else f"rank {rank} of its mesh (rank {whole} of all)"


def post_mortem(group: Any, timeout: float, message: str, waited: float) -> DistributedError:
    """Return the error that names the ranks that are missing or late, or that failed by themselves.

    Args:
        group: whose collective failed.
        timeout: seconds, of which a part is left for other ranks to notice it too.
        message: what the collective said.
        waited: seconds that this rank was in it.
    """
    seconds = _WAITING * timeout
    try:
        notes, missing = _answer(lambda: _notes(group, seconds, waited), seconds + _SLACK * timeout)
    except (RuntimeError, ValueError) as error:
        return DistributedError(
            f"a collective failed ({_short(message)}), and the store that would tell which rank is "
            f"missing does not answer ({_short(str(error))}): its process has died or hangs, which is "
            "rank 0 of all unless torchrun holds the store"
        )
    told = [
        f"{name_of(group, rank)} failed: {note.message}" for rank, note in notes.items() if note.message
    ]
    if told:
        return DistributedError("; ".join(told))
    if missing:
        names = ", ".join(name_of(group, rank) for rank in missing)
        return DistributedError(
            f"{names} took no part in a collective and left no note in {seconds:g} s "
            f"after it failed: the process has died or hangs ({_short(message)})"
        )
    longest = max(note.waited for note in notes.values())
    late = [rank for rank, note in notes.items() if note.waited < _LATE * longest]
    if late:
        names = ", ".join(name_of(group, rank) for rank in late)
        return DistributedError(
            f"{names} came to a collective when others had waited for {longest:.3g} s and given up: "
            f"give a larger timeout than {timeout:g} s, half of which is waited ({_short(message)})"
        )
    return DistributedError(
        f"a collective failed although all ranks are alive and came in time: {_short(message)}"
    )


class _Note(NamedTuple):
    """What a rank tells of itself."""

    message: str
    """Why it failed by itself; empty if it waited for others."""
    waited: float
    """Seconds that it was in the collective."""


def _notes(group: Any, seconds: float, waited: float) -> tuple[dict[int, _Note], list[int]]:
    """Return what all ranks tell of themselves within some seconds, and those that tell nothing."""
    store, own = _store(group), group.rank()
    end = time.monotonic() + seconds
    found = {own: _Note("", waited)}
    missing = []
    if not store.check([_NOTE.format(own)]):
        store.set(_NOTE.format(own), json.dumps({"message": "", "waited": waited}))
    for rank in range(group.size()):
        name = _NOTE.format(rank)
        if rank == own:
            continue
        if not _appears(store, name, end - time.monotonic()):
            missing.append(rank)
        else:
            note = json.loads(store.get(name))
            found[rank] = _Note(str(note.get("message", ""))[:_SHOWN], float(note.get("waited", 0.0)))
    return found, missing


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
