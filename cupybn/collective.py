"""One call that all ranks make together: failure header, fingerprint, and who raises what.

Every rank enters a :class:`CollectiveCall`, does its own checks and work inside it, and sends one
message (two for float64 data in forward). A rank that fails before its message is sent sends a
failure header instead and raises its own exception; the others raise ``PeerError``. Ranks in
different calls all raise ``CollectiveMismatchError``. No rank waits for a message that never comes,
and no rank writes before the header of the last message was accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from .arrays import Array, assign
from .communicators import Communicator
from .communicators.base import check_usable, first_values, raise_for, refused
from .errors import CollectiveMismatchError, CupyBNError, PeerError
from .statistics import (
    COUNT,
    HEADER,
    failure_header,
    header_words,
    words_of_all,
)

_Self = TypeVar("_Self", bound="CollectiveCall")


def fingerprint(what: str, settings: Mapping[str, object]) -> str:
    """A text of the settings that must be equal on all ranks; one named "" shows only its value."""
    texts = (f"{name}={value}" if name else str(value) for name, value in settings.items())
    return f"{what}: {', '.join(texts)}"


class CollectiveCall:
    """Context of one collective call; an exception that leaves it is told to the other ranks.

    Args:
        comm: of the ranks that take part. With one rank nothing is ever sent.
        what: the call, for messages and errors, e.g. ``"forward of 'features.bn1'"``.
        length: of the messages, the same for all of them; see ``statistics.padded_length``.
        fingerprint: a text that must be equal on all ranks; see :meth:`agree`.
        messages: how many the call takes.
        dtype: of the messages.
    """

    def __init__(
        self,
        comm: Communicator,
        what: str,
        length: int,
        fingerprint: str | None = None,
        messages: int = 1,
        *,
        dtype: Any = np.float64,
    ) -> None:
        self.comm = comm
        self.ranks = comm.size
        self.what = what
        self.length = length
        self.dtype = dtype
        self.fingerprint = what if fingerprint is None else fingerprint
        self.messages = messages  # still to come
        self._message: Array = None
        self._size = 0
        if id(comm) in refused and self.ranks > 1:
            check_usable(comm)

    def __enter__(self: _Self) -> _Self:
        return self

    def agree(self, settings: Mapping[str, object], messages: int = 1) -> None:
        """Sets the settings that must be equal on all ranks, and the number of messages."""
        self.fingerprint = fingerprint(self.what, settings)
        self.messages = messages

    def payload(self, like: Array, size: int) -> Array:
        """Where to write `size` numbers of the next message, on the device of `like`.

        A new array each time: a communicator may keep what it is given.
        """
        if type(like) is np.ndarray:
            self._message = np.zeros(self.length, self.dtype)
        else:
            self._message = np.zeros_like(like, shape=self.length, dtype=self.dtype)
        self._size = size
        return self._message[HEADER : HEADER + size]

    def allreduce(self, count: int = 0) -> tuple[int, Array]:
        """Sums `count` and the payload over the ranks: one message. Returns both.

        Raises:
            PeerError: another rank failed.
            CollectiveMismatchError: the ranks do not agree; the communicator is closed.
        """
        message, words = self._message, header_words(self.dtype, self.fingerprint)
        if type(message) is np.ndarray:
            message[:HEADER] = words
            message[COUNT] = count
        else:
            words = words.copy()
            words[COUNT] = count
            assign(message[:HEADER], words)
        self.messages -= 1
        try:
            total = self.comm.allreduce(message, self.what)
        except CupyBNError:  # from ranks that are threads: the others know, or do not wait any more
            self.messages = 0
            raise
        on_host = type(total) is np.ndarray
        summed = total[:HEADER] if on_host else first_values(self.comm, total, HEADER)
        before, behind = words_of_all(self.dtype, self.fingerprint, self.ranks)
        read = summed.tobytes()
        if not (read.startswith(before) and read.endswith(behind)):
            self.messages = 0
            self._refuse(summed)
        return int(summed[COUNT]), total[HEADER : HEADER + self._size]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Not for KeyboardInterrupt and SystemExit: the peers may be gone, and this rank should end,
        # not wait for them.
        if isinstance(error, Exception):
            self.leave(error)

    def leave(self, error: Exception) -> None:
        """Tells the other ranks, if they wait for this one, that it raises `error`."""
        say_where(error, self.what, self.comm)
        if self.ranks > 1 and self.messages:
            message = np.zeros(self.length, self.dtype)
            message[:HEADER] = failure_header(self.dtype, self.comm.rank)
            with suppress(Exception):  # the rank's own exception says more than an error here
                self.comm.allreduce(message, f"{self.what}, after {type(error).__name__}")

    def _refuse(self, summed: np.ndarray[Any, Any]) -> None:
        """Raises the error that a summed header stands for."""
        raise_for(self.comm, self.what, self.fingerprint, summed)


def say_where(error: Exception, what: str, comm: Communicator) -> None:
    """Adds a note to a rank's own error: the call, and the rank."""
    if isinstance(error, PeerError | CollectiveMismatchError):
        return
    note = what if comm.size == 1 else f"{what}, rank {comm.rank} of {comm.size}"
    with suppress(Exception):  # of an exception that takes no note, or has no text
        if hasattr(error, "add_note"):
            error.add_note(note)
        elif comm.size > 1 and what not in str(error) and error.args == (str(error),):
            error.args = (f"{error}\n{note}",)  # Python 3.10
