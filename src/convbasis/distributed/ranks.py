"""The processes of one call: their group, and the one collective, with a time limit, that is used."""

from __future__ import annotations

import struct
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..checks import check_nonnegative, describe
from ..errors import DistributedError, InputError
from .failure import forget_note, leave_note, name_of, post_mortem

# What part of the time limit a collective may take. The rest is for finding out whose fault it was.
_SHARE = 0.5
# What ranks tell each other before they exchange anything: how many numbers come, and for what.
_HEADER = struct.Struct("<q32s")
HEADER_BYTES = _HEADER.size


@dataclass
class GroupState:
    """What this process knows of a process group, for as long as there is the group."""

    broken: bool = False
    """Its ranks are no longer in step."""
    sent: int = 0
    """Bytes that this process has handed over for other ranks; read by benchmarks and tests."""


_states: weakref.WeakKeyDictionary[Any, GroupState] = weakref.WeakKeyDictionary()


def state_of(group: Any) -> GroupState:
    """Return what is known of a group: of this one, not of an earlier one that had its name."""
    return _states.setdefault(group, GroupState())


class Ranks(NamedTuple):
    """The processes of one mesh, as one of them sees it."""

    group: Any
    rank: int
    size: int
    timeout: float
    """Seconds from the beginning of a collective in which it is done, or an error is raised."""

    def all_to_all(
        self, blocks: Sequence[Sequence[Tensor]], counts: Sequence[int], like: Tensor, what: str
    ) -> list[Tensor]:
        """Send some tensors to each rank, and return what the ranks sent to this one, flat.

        Args:
            blocks: for each rank, tensors of any shapes.
            counts: numbers of entries that come from each rank.
            like: a tensor of the dtype and device of all.
            what: is exchanged, in at most 32 letters: all ranks must be at the same.

        Raises:
            DistributedError: a rank is missing, or is at something else; it is named.
        """
        state = state_of(self.group)
        if state.broken:
            raise DistributedError(
                "a collective of this process group has failed before, so that its ranks are no longer "
                "in step; end the processes, and start again from a checkpoint"
            )
        with self.noted():
            begin = time.monotonic()
            sizes = [sum(x.numel() for x in own) for own in blocks]
            self._meet(sizes, counts, like, what, begin)
            given = torch.cat([like.new_empty(0), *(x.reshape(-1) for own in blocks for x in own)])
            taken = self._exchange(given, sizes, counts, begin)
        state.sent += (given.numel() - sizes[self.rank]) * given.element_size()
        return list(taken.split(list(counts)))

    def _meet(
        self, sizes: Sequence[int], counts: Sequence[int], like: Tensor, what: str, begin: float
    ) -> None:
        """See that every rank sends what this one waits for: what arrives is not told apart later."""
        own = b"".join(_HEADER.pack(size, what.encode()) for size in sizes)
        given = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(like.device)
        each = [HEADER_BYTES] * self.size
        taken = bytes(self._exchange(given, each, each, begin).tolist())
        state_of(self.group).sent += HEADER_BYTES * (self.size - 1)
        for rank, (size, name) in enumerate(_HEADER.iter_unpack(taken)):
            other = name.rstrip(b"\0").decode()
            if other != what:
                own_name = name_of(self.group, self.rank)
                raise DistributedError(
                    f"{name_of(self.group, rank)} is at {other!r}, but {own_name} at {what!r}: every "
                    "rank must make the same calls and the same backward passes in the same order"
                )
            if size != counts[rank]:
                raise DistributedError(
                    f"{name_of(self.group, rank)} sends {size} numbers for {what!r}, but "
                    f"{name_of(self.group, self.rank)} waits for {counts[rank]}: the ranks are at "
                    "different calls or backward passes"
                )

    def _exchange(
        self, given: Tensor, sizes: Sequence[int], counts: Sequence[int], begin: float
    ) -> Tensor:
        """Return what the ranks sent to this one, one after the other."""
        taken = given.new_empty(sum(counts))
        options = dist.AllToAllOptions()
        left = self.timeout * _SHARE - (time.monotonic() - begin)
        options.timeout = timedelta(seconds=max(left, 0.001))
        try:
            self.group.alltoall_base(taken, given, list(counts), list(sizes), options).wait()
        except RuntimeError as error:
            state_of(self.group).broken = True
            waited = time.monotonic() - begin
            raise post_mortem(self.group, self.timeout, str(error), waited) from error
        return taken

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Let an error within end the group, and leave a note for the other ranks, which wait here."""
        state = state_of(self.group)
        try:
            yield
        except BaseException as error:
            if not state.broken and not ends_recomputation(error):  # else the others know, or need not
                state.broken = True
                with suppress(RuntimeError):
                    leave_note(self.group, f"{type(error).__name__}: {error}")
            raise

    def gather(self, block: Tensor, counts: Sequence[int], what: str) -> list[Tensor]:
        """Return the flat tensors of all ranks; see `all_to_all`.

        The block is laid out once for each rank: about as much memory as what comes back.
        """
        return self.all_to_all([[block]] * self.size, counts, block, what)


def ends_recomputation(error: BaseException) -> bool:
    """Whether this is how torch leaves a checkpointed region that it needs no more of."""
    return type(error).__name__ == "_StopRecomputationError"


def ranks_of(mesh: object, timeout: object) -> Ranks:
    """Return the processes of a mesh of one dimension.

    Raises:
        InputError: mesh is none, of more dimensions, or this process is not in it.
    """
    if not isinstance(mesh, DeviceMesh):
        raise InputError(
            f"mesh is {describe(mesh)}; a DeviceMesh of one dimension is wanted: "
            "torch.distributed.init_device_mesh makes one"
        )
    if mesh.ndim != 1:
        raise InputError(
            f"mesh has the dimensions {mesh.mesh_dim_names or mesh.ndim}; give the one that the tokens "
            'are spread over, as mesh["tokens"]'
        )
    limit = check_nonnegative("timeout", timeout)
    if not limit:
        raise InputError("timeout=0 leaves no time; give a number of seconds")
    group = mesh.get_group()
    rank = dist.get_rank(group)
    if rank < 0:
        raise InputError("this process is no rank of the mesh")
    if group not in _states:
        forget_note(group, limit)
        state_of(group)
    return Ranks(group, rank, dist.get_world_size(group), limit)
