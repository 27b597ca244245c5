"""The program `convbasis`, beside the package: whatever is in the package imports torch first.

That takes seconds, in which Ctrl-C is to end the program as it does later: one line, no traceback.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_INTERRUPTED = 130  # as in convbasis.cli.exits, which cannot be imported yet


def main() -> None:
    """Import the program, then run it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not ignored, as in the background of a shell
        signal.signal(signal.SIGINT, _leave)
    from convbasis.cli import load

    run = load()
    signal.signal(signal.SIGINT, before)
    run()


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: an exception would pass through half-imported modules, some of which catch it."""
    os.write(2, b"interrupted\n")
    os._exit(_INTERRUPTED)
