"""Threads for the kernels: how many, and handing them the work items of one call.

The kernels release Python's lock, so Python's own threads do. They take the lock once a call, not
once an item: a thread that waits for it sleeps, and wakes slowly. Any number of callers may hand in
work at once: each does its own items too, and takes back what no thread has begun.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...launcher import leading_number, share_of_cores

_NUMBER_VARIABLES = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS")
_threads: int | None = None
_pool: ThreadPoolExecutor | None = None


def thread_count() -> int:
    """Threads for one call: what :func:`set_threads` said, or the environment, or a fair share.

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
    _forget_pool()


def spread(kernel: Callable[..., Any], at_most: int, *arguments: Any) -> None:
    """``kernel(*arguments)``, on as many threads as there may be, `at_most` so many.

    Each call takes work items, by a counter among the arguments, until there are none.
    """
    helpers = min(thread_count(), at_most) - 1
    if helpers <= 0:
        kernel(*arguments)
        return
    core = _current_core()

    def help_out() -> None:
        _leave_core(core)
        kernel(*arguments)

    pool = _workers()
    started = [pool.submit(help_out) for _ in range(helpers)]
    try:
        kernel(*arguments)
    finally:
        for future in started:
            if not future.cancel():
                future.result()


def _default_threads() -> int:
    for variable in _NUMBER_VARIABLES:
        number = leading_number(os.environ.get(variable, ""))
        if number:
            return number
    return share_of_cores()


if sys.platform == "linux":
    _current_core = ctypes.PyDLL(None).sched_getcpu

    def _leave_core(core: int) -> None:
        """Moves a worker that was woken on the caller's core, where it would wait for its turn.

        It stays away from that core until it meets a caller on another one.
        """
        if _current_core() == core and (others := os.sched_getaffinity(os.getpid()) - {core}):
            os.sched_setaffinity(0, others)

else:

    def _current_core() -> int:
        return -1

    def _leave_core(core: int) -> None:
        pass


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(thread_count() - 1, "cupybn")
    return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # its threads are the parent's
