"""Ranks that are threads of one process: for unit tests of several ranks without MPI."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import CollectiveMismatchError, CollectiveTimeoutError, PeerError
from .base import sum_on_host
from .mpi import check_timeout, default_timeout


class _Meeting:
    """Where the ranks of a group meet: one sum at a time, added up in the order of the ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.condition = threading.Condition()
        self.messages: dict[int, Array] = {}
        self.generation = 0
        self.total: Array | None = None
        self.fault: str | None = None
        self.left: dict[int, str] = {}
        self.groups: dict[tuple[int, int], _Meeting] = {}  # by the number of the split, and color

    def sum(self, rank: int, message: Array, label: str, timeout: float) -> Array:
        with self.condition:
            self.messages[rank] = message
            generation = self.generation
            if len(self.messages) == self.size:
                self._add_up()
            else:
                self.condition.wait_for(
                    lambda: self.generation != generation or bool(self.left), timeout or None
                )
            if self.generation == generation:
                missing = sorted(set(range(self.size)) - set(self.messages))
                del self.messages[rank]
                self._raise(label, timeout, missing)
            if self.fault is not None:
                raise CollectiveMismatchError(f"{label}: {self.fault}")
            assert self.total is not None
            return self.total.copy()

    def _add_up(self) -> None:
        messages = [self.messages[rank] for rank in range(self.size)]
        kinds = [f"{message.size} x {message.dtype}" for message in messages]
        if len(set(kinds)) > 1:
            self.fault = f"the ranks' messages differ in length or dtype: {', '.join(kinds)}"
        else:
            total = messages[0].copy()
            with np.errstate(all="ignore"):  # as MPI adds: Inf - Inf is NaN, and no warning
                for message in messages[1:]:
                    total += message
            self.total = total
        self.messages = {}
        self.generation += 1
        self.condition.notify_all()

    def _raise(self, label: str, timeout: float, missing: list[int]) -> None:
        if self.left:
            rank, how = next(iter(self.left.items()))
            raise PeerError(f"{label}: rank {rank} {how} while this rank waited for it")
        raise CollectiveTimeoutError(f"{label}: waited {timeout:g} s for the ranks {missing}")

    def leave(self, rank: int, how: str) -> None:
        with self.condition:
            self.left[rank] = how
            self.condition.notify_all()

    def group(self, split: int, color: int, size: int) -> _Meeting:
        with self.condition:
            return self.groups.setdefault((split, color), _Meeting(size))


class ThreadCommunicator:
    """One rank of a group of threads. ``ThreadCommunicator.group(n)`` makes the n of them.

    Sums are taken in the order of the ranks, so they have the same bits on every rank and in every
    run. Past the timeout (seconds; None reads ``CUPYBN_TIMEOUT``, 0 is none) ``allreduce`` raises
    ``CollectiveTimeoutError``; when a rank has left, ``PeerError``.
    """

    def __init__(self, meeting: _Meeting, rank: int, timeout: float | None = None) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = meeting.size
        self.timeout = default_timeout() if timeout is None else check_timeout(timeout)
        self._groups: list[ThreadCommunicator] = []

    @classmethod
    def group(cls, size: int, timeout: float | None = None) -> list[ThreadCommunicator]:
        """The communicators of `size` ranks, to be handed to one thread each."""
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
        meeting = self._meeting.group(len(self._groups), color, len(members))
        rank = int(np.searchsorted(members, self.rank))
        self._groups.append(ThreadCommunicator(meeting, rank, self.timeout))
        return self._groups[-1]

    def leave(self, how: str = "has ended") -> None:
        """This rank takes part no longer: ranks that wait for it raise PeerError."""
        for group in self._groups:
            group.leave(how)
        self._meeting.leave(self.rank, how)

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadCommunicator:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a ThreadCommunicator belongs to its process and cannot be pickled")

    def __repr__(self) -> str:
        return f"ThreadCommunicator(rank {self.rank} of {self.size})"
