"""Threads for the kernels: how many there are, and how they share the work items of one call.

The kernels release the GIL, so Python's threads suffice. They take the GIL once per call and not
once per item, because a thread that waits for it sleeps and wakes slowly. Any number of callers may
submit work at once; each also processes its own items.

A helper works only while its caller is inside the kernel: the kernel admits helpers when the caller
enters, lends them its arrays, and keeps the caller until they have left (``enter`` and ``leave`` in
``intrinsics.py``). So nothing depends on a helper, and nothing is written after the caller is
interrupted in Python: a late helper is not admitted. A helper that waits for the GIL keeps no array
alive. The threads are daemons, which a process does not wait for, and end before the interpreter.
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
_calls: SimpleQueue[Any] = SimpleQueue()  # (kernel, arguments, core); None ends a worker


def thread_count() -> int:
    """The number of threads for one call: from :func:`set_threads`, the environment, or the cores.

    The variables are ``NUMBA_NUM_THREADS``, then ``OMP_NUM_THREADS``. If neither is set, it is the
    number of cores that the launcher bound this rank to, or of this machine's cores per rank.
    """
    global _threads
    if _threads is None:
        _threads = _default_threads()
    return _threads


def set_threads(number: int | None) -> None:
    """Sets the number of threads for one call; None restores :func:`thread_count`'s default."""
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
    """Calls ``kernel(False, *constant, turns, *arguments)``, helped by other threads.

    There are :func:`thread_count` threads, or `at_most` if that is fewer; fewer still if the system
    starts no more. Each takes work items, by a counter in `turns`, until none is left. Without
    helpers the kernel gets `alone`, if given, in place of `constant`.
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
    """What a helper passes in place of an array: an empty one, of the same Numba type."""
    if not isinstance(argument, np.ndarray):
        return argument
    return _empty(argument.ndim, argument.dtype)


@lru_cache
def _empty(ndim: int, dtype: Any) -> Any:
    return np.empty((0,) * ndim, dtype)


def _start(number: int) -> int:
    """Starts workers until there are `number`, or as many as possible; returns how many."""
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
        with suppress(Exception):  # such as MemoryError: the caller does what helpers leave
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
        """Moves a worker off the caller's core, if it woke up there: it would have to wait.

        The worker avoids that core until it gets a call from another one.
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
