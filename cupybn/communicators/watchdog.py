"""Ends a job whose ranks wait for a message that never comes.

A blocking MPI call cannot be interrupted from Python, and no error of another rank makes it
return. So one daemon thread a process looks at what the callers are waiting for; past the limit it
says who waits for what, and aborts.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

EXIT_CODE = 124
_POLL = 0.25  # seconds
_GRACE = 5.0  # seconds for the abort to work before this process ends by itself

Wait = tuple[float, float, tuple[object, ...], Callable[[int], object]]
"""(began, timeout, what, abort): monotonic seconds, seconds, what to say in pieces, how to end."""


class Watchdog:
    """The waits in progress, by thread, and the thread that looks at them, started when needed."""

    def __init__(self) -> None:
        self._waits: dict[int, Wait] = {}
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def begin(
        self, timeout: float, what: tuple[object, ...], abort: Callable[[int], object]
    ) -> None:
        """This thread is about to make a call that must return within `timeout` seconds."""
        if self._thread is None:
            self._start()
        self._waits[threading.get_ident()] = (time.monotonic(), timeout, what, abort)

    def end(self) -> None:
        """This thread's call returned."""
        del self._waits[threading.get_ident()]

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="cupybn-watchdog", daemon=True
                )
                self._thread.start()

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL)
            now = time.monotonic()
            for began, timeout, what, abort in list(self._waits.values()):
                if now - began > timeout:
                    _give_up("".join(map(str, what)), now - began, timeout, abort)


def _give_up(what: str, waited: float, timeout: float, abort: Callable[[int], object]) -> None:
    try:
        _tell(what, waited, timeout)
    finally:  # also where nobody reads what this rank has to say
        last_resort = threading.Timer(_GRACE, os._exit, (EXIT_CODE,))
        last_resort.daemon = True
        last_resort.start()
        abort(EXIT_CODE)


def _tell(what: str, waited: float, timeout: float) -> None:
    print(
        f"cupybn: {what}: waited {waited:.1f} s for the other ranks (the limit is {timeout:g} s, "
        "CUPYBN_TIMEOUT); a rank has stopped, or calls other layers than this one. Ending the job. "
        "This rank stands at:",
        file=sys.__stderr__,
        flush=True,
    )
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    time.sleep(0.5)


watchdog = Watchdog()
