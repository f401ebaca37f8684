"""Ranks that are threads of one process: for unit tests of several ranks without MPI."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import reduce

import numpy as np

from ..arrays import Array
from ..errors import CollectiveMismatchError, CollectiveTimeoutError, PeerError
from .base import OfOneProcess, seconds_to_wait, sum_on_host


@dataclass(eq=False)
class _Meeting:
    """The sums of a group of ranks: one at a time, added up in the order of the ranks."""

    size: int
    condition: threading.Condition = field(default_factory=threading.Condition)
    messages: dict[int, Array] = field(default_factory=dict)
    generation: int = 0
    total: Array = None
    fault: str | None = None
    left: dict[int, str] = field(default_factory=dict)
    # The subgroups, by the number of the split and the color.
    groups: dict[tuple[int, int], _Meeting] = field(default_factory=dict)

    def sum(self, rank: int, message: Array, label: str, timeout: float) -> Array:
        with self.condition:
            self.messages[rank] = message
            generation = self.generation
            if len(self.messages) == self.size:
                self._add_up()
            self.condition.wait_for(
                lambda: self.generation != generation or bool(self.left), timeout or None
            )
            if self.generation == generation:
                missing = sorted(set(range(self.size)) - set(self.messages))
                del self.messages[rank]
                if self.left:
                    peer, how = next(iter(self.left.items()))
                    raise PeerError(f"{label}: rank {peer} {how} while this rank waited for it")
                raise CollectiveTimeoutError(
                    f"{label}: waited {timeout:g} s for the ranks {missing}"
                )
            if self.fault is not None:
                raise CollectiveMismatchError(f"{label}: {self.fault}")
            return self.total.copy()

    def _add_up(self) -> None:
        messages = [self.messages[rank] for rank in range(self.size)]
        kinds = [f"{message.size} x {message.dtype}" for message in messages]
        if len(set(kinds)) > 1:
            self.fault = f"the ranks' messages differ in length or dtype: {', '.join(kinds)}"
        else:
            with np.errstate(all="ignore"):  # as MPI adds: Inf - Inf is NaN, and no warning
                self.total = reduce(np.add, messages)
        self.messages = {}
        self.generation += 1
        self.condition.notify_all()

    def leave(self, rank: int, how: str) -> None:
        with self.condition:
            self.left[rank] = how
            self.condition.notify_all()


class ThreadCommunicator(OfOneProcess):
    """One rank of a group of threads. ``ThreadCommunicator.group(n)`` makes the n of them.

    Sums are taken in the order of the ranks, so they have the same bits on every rank and in every
    run.

    Args:
        meeting, rank: what the group shares, and this rank's number; :meth:`group` sets both.
        timeout: seconds to wait for the other ranks; None reads ``CUPYBN_TIMEOUT``, 0 is none.

    Raises:
        ValueError: `timeout` is not a number of seconds. Then, from ``allreduce``:
        CollectiveTimeoutError: a rank did not come within the timeout.
        PeerError: a rank has left.
    """

    def __init__(self, meeting: _Meeting, rank: int, timeout: float | None = None) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = meeting.size
        self.timeout = seconds_to_wait(timeout)
        self._groups: list[ThreadCommunicator] = []

    @classmethod
    def group(cls, size: int, timeout: float | None = None) -> list[ThreadCommunicator]:
        """The communicators of `size` ranks, to be handed to one thread each.

        Raises:
            ValueError: `size` is less than 1, or `timeout` is not a number of seconds.
        """
        if size < 1:
            raise ValueError(f"a group has at least 1 rank, got {size}")
        meeting = _Meeting(size)
        return [cls(meeting, rank, timeout) for rank in range(size)]

    def allreduce(self, message: Array, label: str = "") -> Array:
        """The sum over the ranks, a new array. Raises as the class says."""
        if self.size == 1:
            return message
        label = label or "allreduce"
        return sum_on_host(
            message, lambda values: self._meeting.sum(self.rank, values, label, self.timeout)
        )

    def split(self, color: int) -> ThreadCommunicator:
        """The communicator of the ranks with the same color, in their order. Collective."""
        colors = np.zeros(self.size, np.int64)
        colors[self.rank] = color
        members = np.flatnonzero(self.allreduce(colors, "splitting the communicator") == color)
        # One of the members makes the meeting; setdefault is one step for all threads.
        new, key = _Meeting(len(members)), (len(self._groups), color)
        meeting = self._meeting.groups.setdefault(key, new)
        rank = int(np.searchsorted(members, self.rank))
        self._groups.append(ThreadCommunicator(meeting, rank, self.timeout))
        return self._groups[-1]

    def leave(self, how: str = "has ended") -> None:
        """This rank takes part no longer: ranks that wait for it raise PeerError."""
        for group in self._groups:
            group.leave(how)
        self._meeting.leave(self.rank, how)

    def __repr__(self) -> str:
        return f"ThreadCommunicator(rank {self.rank} of {self.size})"
