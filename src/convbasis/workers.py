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
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_own = threading.local()  # marks the threads of pools
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_making = threading.Lock()


def run_all(tasks: Sequence[Callable[[], T]], tensors: Iterable[Tensor]) -> list[T]:
    """Return what each task returns, in order; several run at the same time where that is possible.

    They start in the order given, on as many threads as torch may use (`torch.get_num_threads`); the
    operators of each run on one core. They run one after another, on this thread, where gradients are
    recorded, on an accelerator, where somebody watches the operators (a mode, a transform, a compiler),
    where there are fewer tasks than threads, and within a task.

    Args:
        tasks: functions without arguments.
        tensors: what the tasks read.

    Raises:
        whatever the first task that fails raises; those that have not begun are left out.
    """
    threads = torch.get_num_threads()
    if threads < 2 or len(tasks) < threads or not _may_leave(tensors):
        return [task() for task in tasks]
    inference = torch.is_inference_mode_enabled()

    def run(task: Callable[[], T]) -> T:
        with torch.inference_mode(inference), torch.no_grad():
            return task()

    pool = _pool(threads)
    running = [pool.submit(run, task) for task in tasks]
    try:
        return [each.result() for each in running]
    finally:
        for each in running:
            each.cancel()


def _may_leave(tensors: Iterable[Tensor]) -> bool:
    """Whether operators do on another thread what they do on this one."""
    recorded = torch.is_grad_enabled()
    return (
        not getattr(_own, "marked", False)
        and all(x.device.type == "cpu" and not (recorded and x.requires_grad) for x in tensors)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and _threads_have_counts()
    )


@functools.cache
def _threads_have_counts() -> bool:
    """Whether the number of cores that operators use is one of each thread."""
    return "OpenMP" in torch.__config__.parallel_info()


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads whose operators run on one core each."""
    with _making:
        place = (os.getpid(), threads)  # threads do not survive a fork
        if place not in _pools:
            ready = threading.Barrier(threads + 1)

            def prepare() -> None:
                _own.marked = True
                torch.get_num_threads()  # a thread takes over the common number when it first asks
                torch.set_num_threads(1)

            pool = ThreadPoolExecutor(threads, "convbasis", initializer=prepare)
            for _ in range(threads):
                pool.submit(ready.wait)
            ready.wait()
            torch.set_num_threads(threads)  # what other threads begin with is torch's to remember
            _pools[place] = pool
        return _pools[place]
