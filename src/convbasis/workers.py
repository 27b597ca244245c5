"""Independent pieces of work, a thread to each: no operator waits for another core.

An operator that is shared out among cores ends when the slowest of them does, thousands of times in a
call. Pieces that share nothing wait once, at the end.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

T = TypeVar("T")

_own = threading.local()  # marks the threads of pools, and knows the crew while a task runs
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_making = threading.Lock()


def run_all(tasks: Sequence[Callable[[], T]], tensors: Iterable[Tensor]) -> list[T]:
    """Return what each task returns, in order; several run at the same time where that is possible.

    They start in the order given, on as many threads as torch may use (`torch.get_num_threads`), and no
    more than there are tasks, among whose operators the threads that are left are shared out. They run
    one after another, on this thread, where gradients are recorded, on an accelerator, where somebody
    watches the operators (a mode, a transform, a compiler), and within a task.

    Args:
        tasks: functions without arguments.
        tensors: what the tasks read.

    Raises:
        what a task raises, the first of those that had begun; the others are left out.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(tasks))
    if workers < 2 or not _may_leave(tensors):
        return [task() for task in tasks]
    pool = _pool(workers, threads // workers)
    crew = _Crew(tasks, pool)
    try:
        for _ in range(workers):
            pool.submit(crew.work)
        return crew.tasks.results()
    finally:
        crew.tasks.stop()


def share(parts: Sequence[Callable[[], T]]) -> list[T]:
    """Return what each part of a task returns, in order; threads whose tasks are over take some.

    The last tasks of `run_all` are thus done by all threads. Parts outside of a task, or within a part,
    run one after another.

    Args:
        parts: functions without arguments, that read what the task's tensors hold.

    Raises:
        whatever a part raises.
    """
    crew = getattr(_own, "crew", None)
    if crew is None or len(parts) < 2:
        return [part() for part in parts]
    return crew.share(_Shared(parts))


class _Shared:
    """Functions without arguments; whoever comes first calls them, in the modes of who made this."""

    def __init__(self, parts: Sequence[Callable[[], Any]]) -> None:
        self._left = list(enumerate(parts))[::-1]
        self._found: list[Any] = [None] * len(parts)
        self._running = 0
        self._failures: dict[int, BaseException] = {}
        self._changed = threading.Condition()
        self._run = _as_here()

    def work(self) -> None:
        """Do what is left."""
        try:
            self._run(self._work)
        except BaseException as failure:  # nobody else would hear of it
            self._fail(-1, failure)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._left:
                    return
                number, part = self._left.pop()
                self._running += 1
            try:
                self._found[number] = part()
            except BaseException as failure:
                self._fail(number, failure)
            finally:
                with self._changed:
                    self._running -= 1
                    if self._over():
                        self._changed.notify_all()

    def _fail(self, number: int, failure: BaseException) -> None:
        self._failures[number] = failure
        self.stop()

    def stop(self) -> None:
        """Leave out what has not begun."""
        with self._changed:
            self._left.clear()
            self._changed.notify_all()

    def results(self) -> list[Any]:
        """Wait until everything is done, and return it, once."""
        with self._changed:
            self._changed.wait_for(self._over)
        # Who was late knows this object for a while, and holds nothing that is large.
        found, self._found = self._found, []
        failures, self._failures = self._failures, {}
        try:
            if failures:
                raise failures[min(failures)]
        finally:
            del failures  # they know this frame
        return found

    def _over(self) -> bool:
        return not self._left and not self._running


class _Crew:
    """The tasks of a call, and what those who do them share."""

    def __init__(self, tasks: Sequence[Callable[[], Any]], pool: ThreadPoolExecutor) -> None:
        self.tasks = _Shared(tasks)
        self._pool = pool
        self._open: list[_Shared] = []
        self._gone = 0  # threads that found nothing to do
        self._changing = threading.Lock()

    def work(self) -> None:
        """Do tasks, and after the last one take parts of those that others are still at."""
        _own.crew = self
        try:
            self.tasks.work()
        finally:
            _own.crew = None
        self._help()

    def share(self, shared: _Shared) -> list[Any]:
        """Do a task's parts with those who have no task left, and return what they return."""
        with self._changing:
            self._open.append(shared)
            gone, self._gone = self._gone, 0
        for _ in range(gone):
            self._pool.submit(self._help)
        _own.crew = None
        try:
            shared.work()
        finally:
            _own.crew = self
            self._close(shared)
        return shared.results()

    def _help(self) -> None:
        while (shared := self._next()) is not None:
            shared.work()
            self._close(shared)

    def _next(self) -> _Shared | None:
        with self._changing:
            if not self._open:
                self._gone += 1
                return None
            return self._open[0]

    def _close(self, shared: _Shared) -> None:
        """Nothing of it is left for others."""
        with self._changing:
            if shared in self._open:
                self._open.remove(shared)


def _as_here() -> Callable[..., Any]:
    """Return what runs a function on another thread with this thread's modes."""
    inference = torch.is_inference_mode_enabled()
    forward_mode = torch._C._is_fwd_grad_enabled()  # off in the forward pass of an autograd.Function

    def run(function: Callable[..., T], *args: Any) -> T:
        with torch.inference_mode(inference), torch.no_grad(), _set_fwd_grad_enabled(forward_mode):
            return function(*args)

    return run


def _may_leave(tensors: Iterable[Tensor]) -> bool:
    """Whether operators do on another thread what they do on this one."""
    recorded = torch.is_grad_enabled()
    return (
        not getattr(_own, "marked", False)
        and all(x.device.type == "cpu" and not (recorded and x.requires_grad) for x in tensors)
        and not torch.compiler.is_compiling()
        and not watched()
        and _threads_have_counts()
    )


def watched() -> bool:
    """Whether operators may not be what they seem: a mode or a transform is between them and torch."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@functools.cache
def _threads_have_counts() -> bool:
    """Whether the number of cores that operators use is one of each thread."""
    return "OpenMP" in torch.__config__.parallel_info()


def _pool(workers: int, cores: int) -> ThreadPoolExecutor:
    """Return threads whose operators run on so many cores each."""
    with _making:
        if (workers, cores) not in _pools:
            _pools[workers, cores] = _new_pool(workers, cores)
        return _pools[workers, cores]


def _new_pool(workers: int, cores: int) -> ThreadPoolExecutor:
    threads = torch.get_num_threads()
    ready = threading.Barrier(workers + 1)

    def prepare() -> None:
        _own.marked = True
        torch.get_num_threads()  # a thread takes over the common number when it first asks
        torch.set_num_threads(cores)

    pool = ThreadPoolExecutor(workers, "convbasis", initializer=prepare)
    try:
        for _ in range(workers):
            pool.submit(ready.wait)
        ready.wait()
    except BaseException:
        ready.abort()
        pool.shutdown(wait=False)
        raise
    # What threads of others begin with is not what ours did; one that first asks in these few
    # microseconds would keep it.
    torch.set_num_threads(threads)
    return pool


def _forget_pools() -> None:
    """Begin anew in a forked process, which has none of the threads."""
    global _making
    _making = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
