"""CuPy messages through MPI, which knows nothing of streams.

The host waits for a device only here: on an event of the stream that is current on the
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
            # Freed pinned memory may be handed out again at once: not while a copy still reads it.
            self.returned.synchronize()
            self.size = message.nbytes
            try:
                self.memory = self.cuda.alloc_pinned_memory(self.size)
            except Exception as error:
                # An exception now would leave the other ranks waiting. Pageable memory is
                # slower, but correct.
                self.refused = self.refused or error
                self.memory = np.empty(self.size, np.uint8)
        flat: np.ndarray[Any, Any] = np.frombuffer(self.memory, message.dtype, message.size)
        return flat.reshape(tuple(message.shape))

    def warn(self, device: int) -> None:
        """Warns once that messages are slower than they could be."""
        if self.refused is not None and not self.told:
            self.told = True
            with suppress(RuntimeWarning):  # an error would part this rank from the others
                warnings.warn(
                    f"cuda:{device}: no pinned memory to be had ({self.refused}); messages go "
                    "through pageable memory, which is slower",
                    RuntimeWarning,
                    stacklevel=2,
                )


@cache
def _staging(device: int, thread: int) -> _Staging:
    """The staging of a thread; the next thread with this number takes it over."""
    return _Staging(sys.modules["cupy"].cuda)


def sum_on_device(message: Array, summed: Sum) -> None:
    """Hands the message itself to `summed` once the current stream has written it.

    The stream has then also finished with any memory that `summed` gets from CuPy's pool.
    """
    with message.device:
        staging = _staging(message.device.id, get_ident())
        staging.wait(staging.cuda.get_current_stream())
        summed(message)


def sum_through_pinned(message: Array, summed: Sum) -> np.ndarray[Any, Any]:
    """Copies the message to pinned memory, sums there, and copies back without waiting for it.

    Returns the sum in pinned memory, valid until this thread's next message.
    """
    with message.device:
        staging = _staging(message.device.id, get_ident())
        stream = staging.cuda.get_current_stream()
        host = staging.host_array_for(message)
        # The previous sum may still be copied out of this memory, on another stream.
        stream.wait_event(staging.returned)
        message.data.copy_to_host_async(host.ctypes.data, host.nbytes, stream)
        staging.wait(stream)
        summed(host)
        message.data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)
        staging.returned.record(stream)
        staging.warn(message.device.id)
        return host
