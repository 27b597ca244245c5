"""The choice of a backend, and the record of what ran."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InputError

logger = logging.getLogger("convbasis")

BACKENDS = ("auto", "partitioned", "direct", "fft", "reference")


@dataclass(frozen=True)
class Dispatch:
    """What one call ran, and why.

    Attributes:
        backend: ``"partitioned"``, ``"direct"``, ``"fft"`` or ``"reference"``; over ranks also
            ``"spectra"``, or ``"none"`` for a rank that had nothing to compute.
        reason: why this backend.
        rows_recomputed: rows, over all heads, that drowned in the rounding of the transforms and
            were evaluated directly.
        heads_float64: float32 heads that lost more than 2 % of their rows and were transformed again
            in float64.
        heads_direct: heads that lost more than 2 % of their rows in float64 too and were evaluated
            directly as a whole.
    """

    backend: str
    reason: str
    rows_recomputed: int = 0
    heads_float64: int = 0
    heads_direct: int = 0

    def warn_if_direct(self, heads: int) -> None:
        """Log a warning when whole heads were evaluated in O(n^2)."""
        if self.heads_direct:
            logger.warning(
                "%d of %d heads lost more than 2 %% of their rows in the rounding of the transforms "
                "and were evaluated directly, in O(n^2) time",
                self.heads_direct,
                heads,
            )


def merged(parts: Sequence[Dispatch], documents: int) -> Dispatch:
    """Return the record of several calls that made up one: the last one's choice, everyone's counts."""
    return Dispatch(
        parts[-1].backend,
        f"{parts[-1].reason}; the longest of {documents} documents",
        sum(part.rows_recomputed for part in parts),
        sum(part.heads_float64 for part in parts),
        sum(part.heads_direct for part in parts),
    )


_thread = threading.local()


def record_dispatch(dispatch: Dispatch) -> None:
    """Keep what ran, for `last_dispatch`."""
    logger.info("ran %s", dispatch)
    _thread.last = dispatch


def last_dispatch() -> Dispatch | None:
    """Return what the last product or attention call in this thread ran, and why.

    Returns:
        A `Dispatch`, or None before the first call.

    Example:
        >>> import torch, convbasis as cb
        >>> x = torch.randn(1, 1, 8, 4)
        >>> _ = cb.conv_basis_attention(x, x, x, segment_length=4)
        >>> cb.last_dispatch().backend
        'direct'
    """
    return getattr(_thread, "last", None)


def check_backend(backend: object) -> None:
    """Check the name of a backend."""
    if backend not in BACKENDS:
        raise InputError(
            f"backend={backend!r} is not known; use one of {', '.join(map(repr, BACKENDS))}"
        )
