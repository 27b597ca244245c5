"""Several processes for one test: all checks of a number of ranks run in one launch.

They are forked from a server that has imported everything once. What a rank returns, or its error,
comes back as JSON.
"""

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["sharded_checks", "model_checks", "failing_checks", "spectra_checks"])


_serving = threading.Lock()  # several threads launch at a time


def _serve():
    """Start the server, which looks for modules where this process does only if it is told so."""
    with _serving:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        try:
            forkserver.ensure_running()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before


def launch(ranks, function, *arguments, wait=120, killed=(), tcp=False):
    """Run function(rank, *arguments) in so many processes of one group; return what each returned.

    Ranks that are killed on purpose return nothing. Their store is a file, or one that rank 0 holds.
    """
    _serve()
    with tempfile.TemporaryDirectory() as folder:
        store = f"tcp://127.0.0.1:{_free_port()}" if tcp else f"file://{folder}/store"
        started = [
            _CONTEXT.Process(target=_run, args=(rank, ranks, folder, store, function, arguments))
            for rank in range(ranks)
        ]
        try:
            waiting = _wait(started, killed, wait)
            for place in Path(folder).glob("*.json"):
                told = json.loads(place.read_text())
                assert "error" not in told, told["error"]
        finally:
            for process in started:
                if process.pid is not None:
                    process.kill()
                    process.join()
        late = [rank for rank in waiting if rank not in killed]
        assert not late, f"ranks {late} still ran after {wait} s"
        found = []
        for rank in range(ranks):
            place = Path(folder) / f"{rank}.json"
            if rank in killed:
                found.append(None)
                continue
            assert place.is_file(), f"rank {rank} left nothing"
            told = json.loads(place.read_text())
            found.append(told["returned"])
        return found


def _wait(started, killed, wait):
    """Start processes, wait until those that are not killed have ended, and return who still runs."""
    for process in started:
        process.start()
    waiting = {process.sentinel: rank for rank, process in enumerate(started)}
    end = time.monotonic() + wait
    while set(waiting.values()) - set(killed) and time.monotonic() < end:
        for sentinel in connection.wait(list(waiting), end - time.monotonic()):
            rank = waiting.pop(sentinel)
            started[rank].join()
            if started[rank].exitcode and rank not in killed:
                end = min(end, time.monotonic() + 2)  # the others wait for it in vain
    return list(waiting.values())


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _run(rank, ranks, folder, store, function, arguments):
    torch.set_num_threads(1)
    os.environ["CONVBASIS_RATES"] = str(Path(tempfile.gettempdir()) / "convbasis-no-rates.json")
    place = Path(folder) / f"{rank}.json"
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=store,
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=60),
        )
        told = {"returned": function(rank, *arguments)}
        place.write_text(json.dumps(told))
        torch.distributed.destroy_process_group()
    except BaseException:
        place.write_text(json.dumps({"error": f"rank {rank}: {traceback.format_exc()}"}))
        os._exit(1)
