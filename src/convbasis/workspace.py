"""Memory that is used again from call to call, so that its pages need not be mapped anew.

On a CPU the first write to fresh memory costs several times a write to warm memory, and large blocks
are returned to the system when they are freed. A buffer here belongs to one thread and to one name;
other threads may read it while this one waits for them. Its content is whatever the last user left:
whoever takes it writes every entry before reading it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_LARGEST_KEPT = 160 << 20  # bytes of one buffer; larger ones are not kept

_thread = threading.local()


def take(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor with undefined content, which the next `take` of that name overwrites.

    Args:
        name: of the buffer; two that are in use at a time need two names.
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor; only CPU memory is kept, other devices have allocators that do.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size > _LARGEST_KEPT:
        return torch.empty(shape, dtype=dtype, device=device)
    buffers: dict[str, Tensor] = _thread.__dict__.setdefault("buffers", {})
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() < size:
        # The old one goes first: both need not fit into memory.
        buffers.pop(name, None)
        with torch.inference_mode(
            False
        ):  # a buffer made in inference mode could not be written elsewhere
            buffer = buffers[name] = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype).view(shape)
