"""Device arrays on their way through MPI, which knows nothing of streams.

Only here does the host wait for a device: on an event of the stream that is current on the
message's device, after the work that writes the message, and never for the whole device.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from threading import get_ident
from typing import Any

import numpy as np

from ..arrays import Array

Sum = Callable[[Array], Any]
"""Adds up, in place and over all ranks, an array that nothing else is writing."""


class _Staging:
    """One device's events, and pinned memory for one message, of one thread.

    Kept for good, so that none is freed in use.
    """

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.arrived = cuda.Event(disable_timing=True)  # the message is complete
        self.returned = cuda.Event(disable_timing=True)  # the last sum has left the pinned memory
        self.memory: Any = None
        self.size = 0
        self.refused: Exception | None = None  # why there was no pinned memory
        self.told = False

    def wait(self, stream: Any) -> None:
        self.arrived.record(stream)
        self.arrived.synchronize()

    def host_array_for(self, message: Array) -> np.ndarray[Any, Any]:
        if message.nbytes > self.size:
            # Freed pinned memory goes to the next who asks: not while a copy still reads it.
            self.returned.synchronize()
            self.size = message.nbytes
            try:
                self.memory = self.cuda.alloc_pinned_memory(self.size)
            except Exception as error:
                # Raising now would leave the other ranks waiting. Pageable memory is slower, and
                # right.
                self.refused = self.refused or error
                self.memory = np.empty(self.size, np.uint8)
        flat: np.ndarray[Any, Any] = np.frombuffer(self.memory, message.dtype, message.size)
        return flat.reshape(tuple(message.shape))

    def warn(self, device: int) -> None:
        """Once, that messages are slower than they could be."""
        if self.refused is not None and not self.told:
            self.told = True
            with suppress(RuntimeWarning):  # as an error it would part this rank from the others
                warnings.warn(
                    f"cuda:{device}: no pinned memory to be had ({self.refused}); messages go "
                    "through pageable memory, which is slower",
                    RuntimeWarning,
                    stacklevel=2,
                )


@cache
def _staging(device: int, thread: int) -> _Staging:
    """What a thread stages with; the next thread of that number takes it over."""
    return _Staging(sys.modules["cupy"].cuda)


def sum_on_device(message: Array, summed: Sum) -> None:
    """Hands the message itself to `summed` once the current stream has written it.

    The stream is then done with whatever memory `summed` gets from CuPy's pool, too.
    """
    with message.device:
        staging = _staging(message.device.id, get_ident())
        staging.wait(staging.cuda.get_current_stream())
        summed(message)


def sum_through_pinned(message: Array, summed: Sum) -> np.ndarray[Any, Any]:
    """Copies the message to pinned memory, sums there, and copies back without waiting for it.

    Returns the sum in pinned memory, which is good until this thread's next message.
    """
    with message.device:
        staging = _staging(message.device.id, get_ident())
        stream = staging.cuda.get_current_stream()
        host = staging.host_array_for(message)
        # The sum before may still be on its way out of this memory, on another stream.
        stream.wait_event(staging.returned)
        message.data.copy_to_host_async(host.ctypes.data, host.nbytes, stream)
        staging.wait(stream)
        summed(host)
        message.data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)
        staging.returned.record(stream)
        staging.warn(message.device.id)
        return host
