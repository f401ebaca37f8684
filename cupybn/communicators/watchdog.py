"""Ends a job whose ranks wait for a message that never comes.

A blocking MPI call cannot be interrupted from Python, and no error of another rank makes it
return. So one daemon thread in each process looks at what the communicators wait for; past the
limit it prints who waits for what, and aborts. The caller only sets two attributes when it waits;
the thread measures the time by looking again.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakSet

EXIT_CODE = 124
_POLL = 0.25  # seconds
_LONGEST_LOOK = 1.0  # seconds that count between two looks
_GRACE = 3.0  # seconds for the abort to work before this process ends by itself


@dataclass(eq=False)
class Watch:
    """A communicator that the watchdog looks at. The caller sets, before a blocking call::

        watch.sequence += 1
        watch.label = "what it waits for"

    and sets ``label`` to None when the call is over, also after an exception. An infinite timeout
    means none.
    """

    where: str
    timeout: float
    abort: Callable[[int], object]
    sequence: int = 0
    label: str | None = None
    seen: int = -1  # what the watchdog saw last, and since when
    since: float = 0.0

    def waited(self, now: float) -> float:
        """Seconds for which the present call was seen waiting at the time `now`, or 0."""
        sequence, label = self.sequence, self.label
        if label is None or sequence != self.seen:
            self.seen, self.since = sequence, now
        return now - self.since

    def __str__(self) -> str:
        message = f", message {self.sequence} of this communicator" if self.sequence else ""
        return f"{self.where}, {self.label}{message}"


class Watchdog:
    """The watches with a timeout, and the thread that looks at them, started with the first."""

    def __init__(self) -> None:
        self._watches: WeakSet[Watch] = WeakSet()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def add(self, watch: Watch) -> None:
        """Ends the job, from now on, if a call of this watch does not return in time."""
        with self._lock:
            self._watches.add(watch)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._look, name="cupybn-watchdog", daemon=True
                )
                self._thread.start()

    def __contains__(self, watch: Watch) -> bool:
        return watch in self._watches

    def _look(self) -> None:
        clock, last = 0.0, time.monotonic()
        while True:
            time.sleep(_POLL)
            now = time.monotonic()
            # The time while the whole job is suspended must not count.
            clock += min(now - last, _LONGEST_LOOK)
            last = now
            with self._lock:
                watches = list(self._watches)
            for watch in watches:
                waited = watch.waited(clock)
                if waited > watch.timeout:
                    _give_up(watch, waited)


def _give_up(watch: Watch, waited: float) -> None:
    try:
        _tell(watch, waited)
    finally:  # also if nobody reads this rank's output
        last_resort = threading.Timer(_GRACE, os._exit, (EXIT_CODE,))
        last_resort.daemon = True
        with suppress(RuntimeError):  # if no thread can be started any more
            last_resort.start()
        watch.abort(EXIT_CODE)


def _tell(watch: Watch, waited: float) -> None:
    print(
        f"cupybn: {watch}: waited {waited:.1f} s for the other ranks (the limit is "
        f"{watch.timeout:g} s, CUPYBN_TIMEOUT). A rank has stopped, its host or network is gone, "
        "or it calls other layers than this one: suspect the ranks that say nothing. Ending the "
        "job. This rank stands at:\n",
        end="",  # in one write: other ranks print too
        file=sys.__stderr__,
        flush=True,
    )
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    time.sleep(0.5)


watchdog = Watchdog()
