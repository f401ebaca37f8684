"""Threads for the kernels: how many, and handing them the work items of one call.

The kernels release Python's lock, so Python's own threads will do. They take the lock once a call,
not once an item: a thread that waits for it sleeps, and wakes slowly. Any number of callers may
hand in work at once, and each does its own items, too.

A helper works only while its caller is inside the kernel: the kernel lets helpers in when the
caller enters, lends them its arrays, and keeps the caller until they have left (``enter`` and
``leave`` of ``intrinsics.py``). So nothing depends on a helper, and nothing is written after an
interrupt of the caller in Python: a late helper is not let in. Nor does it keep an array alive
while it waits for Python's lock. The threads are daemons, which a process does not wait for, and
end before the interpreter does.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from ...launcher import leading_number, share_of_cores
from .plan import TURNS

_NUMBER_VARIABLES = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS")
_threads: int | None = None
_workers: list[Thread] = []
_calls: SimpleQueue[Any] = SimpleQueue()  # (kernel, arguments, core), or None: end


def thread_count() -> int:
    """Threads for one call: set by :func:`set_threads`, or by the environment, or a fair share.

    ``NUMBA_NUM_THREADS``, then ``OMP_NUM_THREADS``; where neither is set, the cores that the
    launcher bound this rank to, or those of this machine divided by the ranks on it.
    """
    global _threads
    if _threads is None:
        _threads = _default_threads()
    return _threads


def set_threads(number: int | None) -> None:
    """Sets the threads for one call; None goes back to the default of :func:`thread_count`."""
    global _threads
    if number is not None and number < 1:
        raise ValueError(f"the number of threads must be at least 1, got {number}")
    _threads = number


def spread(
    kernel: Callable[..., Any],
    at_most: int,
    constant: tuple[Any, ...],
    turns: Any,
    *arguments: Any,
    alone: tuple[Any, ...] | None = None,
) -> None:
    """``kernel(False, *constant, turns, *arguments)``, helped by other threads.

    So that there are as many threads as there may be, `at_most` so many; fewer where the system
    starts no more. Each call takes work items, by a counter in `turns`, until there are none.
    Without helpers the kernel is given `alone`, if there is that, in place of `constant`.
    """
    helpers = _start(min(thread_count(), at_most) - 1)
    if helpers:
        turns = np.zeros(TURNS, np.int64)
        call = kernel, (*constant, turns, *map(_absent, arguments)), _current_core()
        for _ in range(helpers):
            _calls.put(call)
    elif alone is not None:
        constant = alone
    kernel(False, *constant, turns, *arguments)


def _absent(argument: Any) -> Any:
    """A helper's argument in place of an array: an empty one, of the same type to Numba."""
    if not isinstance(argument, np.ndarray):
        return argument
    return _empty(argument.ndim, argument.dtype)


@lru_cache
def _empty(ndim: int, dtype: Any) -> Any:
    return np.empty((0,) * ndim, dtype)


def _start(number: int) -> int:
    """Starts workers until `number` wait for calls, or as many as possible; returns how many."""
    while len(_workers) < number:
        worker = Thread(target=_work, args=(_calls,), name="cupybn", daemon=True)
        try:
            worker.start()
        except RuntimeError:  # no more threads for this process, or it is ending
            break
        _workers.append(worker)
    return min(number, len(_workers))


def _work(calls: SimpleQueue[Any]) -> None:
    while (call := calls.get()) is not None:
        kernel, arguments, core = call
        with suppress(Exception):  # such as no memory: the caller does what the helpers leave
            _leave_core(core)
            kernel(True, *arguments)
    calls.put(None)  # for the next worker


def _default_threads() -> int:
    for variable in _NUMBER_VARIABLES:
        number = leading_number(os.environ.get(variable, ""))
        if number:
            return number
    return share_of_cores()


if sys.platform == "linux":
    _current_core = ctypes.PyDLL(None).sched_getcpu

    def _leave_core(core: int) -> None:
        """Moves a worker that woke up on the caller's core, where it would wait for its turn.

        It stays away from that core until it meets a caller on another one.
        """
        if _current_core() == core and (others := os.sched_getaffinity(os.getpid()) - {core}):
            os.sched_setaffinity(0, others)

else:

    def _current_core() -> int:
        return -1

    def _leave_core(core: int) -> None:
        pass


def _forget_workers() -> None:
    """Forgets the workers in a forked process: they are the parent's."""
    global _calls
    _calls = SimpleQueue()
    _workers.clear()


def _end_workers() -> None:
    """Ends the workers before the interpreter ends; later callers work alone."""
    set_threads(1)
    _calls.put(None)
    for worker in _workers:
        worker.join()


atexit.register(_end_workers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
