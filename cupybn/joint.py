"""One call that all ranks make together: poison, fingerprint, and who raises what.

Every rank enters :class:`joint`, does its own checks and work inside it, and sends one message (two
for float64 data in forward). A rank that fails before its message is sent sends poison instead and
raises its own exception; the others raise ``PeerError``. Ranks that came with different calls all
raise ``CollectiveMismatchError``. Nobody waits for a message that never comes, and nobody writes
before the header of the last message was accepted.

What a call does between its messages is a generator, its *steps*, so that several calls can share
their messages (:mod:`cupybn.coalesce`). It yields

* ``(count, size)`` when its message is written, and is sent back what :meth:`joint.pool` returns;
* ``None`` at a checkpoint: before it writes anything that outlives an error, because from there on
  nothing is refused; and once more when all is written. Closing it there undoes what it wrote.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

from .arrays import Array, assign, is_cupy, on_device_of
from .communicators import Communicator
from .communicators.base import check_usable, first_values, refuse
from .errors import CollectiveMismatchError, CupyBNError, PeerError
from .statistics import (
    HEADER,
    Header,
    header,
    pack_texts,
    poison,
    read_header,
    unpack_texts,
)

_Self = TypeVar("_Self", bound="joint")
_Result = TypeVar("_Result")

Request: TypeAlias = "tuple[int, int] | None"
Steps: TypeAlias = Generator[Request, Any, _Result]


class joint:
    """Context of one collective call.

    Args:
        comm: who takes part. With one rank nothing is ever sent.
        what: the call, for messages and errors, e.g. ``"forward of 'features.bn1'"``.
        length: of the messages, the same for all of them; see ``statistics.padded_length``.
        dtype: of the messages.
        room: how many numbers of a payload there may be; None is all that the length allows.

    Attributes:
        fingerprint: what must be equal on all ranks.
        messages: how many are still to come.
        together: the call of several whose messages carry this one's, if any.
    """

    def __init__(
        self,
        comm: Communicator,
        what: str,
        length: int,
        dtype: Any = np.float64,
        room: int | None = None,
    ) -> None:
        self.comm = comm
        self.ranks = comm.size
        self.what = what
        self.length = length
        self.dtype = dtype
        self.room = length - HEADER if room is None else room
        self.together: Any = None
        self.fingerprint = what
        self.messages = 1
        self._message: Array = None

    def __enter__(self: _Self) -> _Self:
        if self.ranks > 1:
            check_usable(self.comm)
        return self

    def agree(self, settings: str, messages: int = 1) -> None:
        """States what must be equal on all ranks, and how many messages the call takes."""
        self.fingerprint = f"{self.what}: {settings}"
        self.messages = messages

    def payload(self, like: Array, size: int) -> Array | None:
        """Where to write `size` numbers of the next message, beside `like`; None with one rank."""
        if self.ranks == 1:
            return None
        if self.together is not None:
            return self.together.section(self, like)[:size]
        if type(like) is np.ndarray:  # np.zeros_like takes a microsecond to find NumPy
            self._message = np.zeros(self.length, self.dtype)
        else:
            self._message = np.zeros_like(like, shape=self.length, dtype=self.dtype)
        return self._message[HEADER : HEADER + size]

    def pool(self, count: int, size: int) -> tuple[int, Array]:
        """Sums count and payload over the ranks: one allreduce. Returns both.

        Raises:
            PeerError: another rank failed.
            CollectiveMismatchError: the ranks do not agree; the communicator is closed.
        """
        assign(self._message[:HEADER], header(self.dtype, self.fingerprint, count))
        self.messages -= 1
        try:
            total = self.comm.allreduce(self._message, self.what)
        except CupyBNError:  # of ranks that are threads: the others know, or wait no longer
            self.messages = 0
            raise
        summed = self._read(total)
        if summed.failed:
            self.messages = 0
            raise PeerError(self._blame(summed))
        if not summed.agree:
            self.messages = 0
            raise CollectiveMismatchError(self._compare())
        return summed.count, total[HEADER : HEADER + size]

    def drive(self, steps: Steps[_Result]) -> _Result:
        """Runs the steps of a call to their end, with messages of its own."""
        answer = None
        try:
            while True:
                request = steps.send(answer)
                if request is None:
                    answer = None
                    continue
                with on_device_of(self._message):
                    answer = self.pool(*request)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            steps.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Not for KeyboardInterrupt and SystemExit: then the peers may be gone, and this rank wants
        # to end, not to wait for them.
        if not isinstance(error, Exception):
            return
        with suppress(Exception):  # of an exception that takes no note, or has no text
            self._say_where(error)
        if self.ranks > 1 and self.messages:
            with suppress(Exception):  # the rank's own exception says more than a failed farewell
                self.comm.allreduce(self._farewell(), f"{self.what}, after {type(error).__name__}")

    def _farewell(self) -> Array:
        message = np.zeros(self.length, self.dtype)
        message[:HEADER] = poison(self.dtype, self.comm.rank)
        return message

    def _failed_here(self) -> str:
        """The call that failed on this rank."""
        return self.what

    def _failed_there(self) -> str:
        """Which of several calls failed on another rank, for the text of PeerError."""
        return ""

    def _read(self, total: Array) -> Header:
        return read_header(first_values(self.comm, total, HEADER), self.ranks)

    def _text(self) -> str:
        """What the other ranks are told of this call when the ranks do not agree."""
        return self.fingerprint

    def _say_where(self, error: Exception) -> None:
        """Adds to a rank's own error what its text lacks: the call, and the rank."""
        if isinstance(error, PeerError | CollectiveMismatchError):
            return
        what = self._failed_here()
        note = what if self.ranks == 1 else f"{what}, rank {self.comm.rank} of {self.ranks}"
        if hasattr(error, "add_note"):
            error.add_note(note)
        elif self.ranks > 1 and what not in str(error) and error.args == (str(error),):
            error.args = (f"{error}\n{note}",)  # Python 3.10

    def _blame(self, summed: Header) -> str:
        who = f"{summed.failed} of {self.ranks} ranks"
        if summed.failed_rank is not None:
            who = f"rank {summed.failed_rank}"
        return (
            f"{self.what}: {who} failed{self._failed_there()}, and raised the exception that says "
            "why; nothing was changed on this rank"
        )

    def _compare(self) -> str:
        table = self.comm.allreduce(
            pack_texts(self._text(), self.comm.rank, self.ranks), f"{self.what}, mismatch"
        )
        groups: dict[str, list[int]] = {}
        for rank, text in enumerate(unpack_texts(table, self.ranks)):
            groups.setdefault(text, []).append(rank)
        lines = [f"  {_name_ranks(ranks)}: {text}" for text, ranks in groups.items()]
        text = "the ranks met in one collective with different calls:\n" + "\n".join(lines)
        refuse(self.comm, text)
        return text


@dataclass  # a NamedTuple cannot be generic before Python 3.11
class Started(Generic[_Result]):
    """A call with its steps, none of which was taken yet."""

    call: joint
    steps: Steps[_Result]

    def run(self) -> _Result:
        """The call by itself."""
        with self.call:
            return self.call.drive(self.steps)


def on_its_device(x: Array, steps: Steps[_Result]) -> Steps[_Result]:
    """The same steps, each on the device of x. Between them the caller's device is current."""
    return _stepwise(x, steps) if is_cupy(x) else steps


def _stepwise(x: Array, steps: Steps[_Result]) -> Steps[_Result]:
    answer = None
    try:
        while True:
            try:
                with on_device_of(x):
                    request = steps.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            answer = yield request
    finally:
        with on_device_of(x):
            steps.close()


def _name_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
