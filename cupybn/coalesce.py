"""Several calls whose messages travel as one: parallel branches, forward or backward.

One message after another is cheap for bandwidth and dear for latency: three layers that do not
depend on each other cost three times the latency of one. Here the steps of all of them are taken in
turn, in the caller's thread: each up to its message; then one message for all; and so on. Nothing
is written before every call was accepted on every rank, and if one fails while the others write,
what they wrote is undone. The message is ::

    [16 header words of all | 16 of each call | payload of the first call | of the second | ...]

the headers and payloads of the calls together as long as the next power of two. The header of all
carries poison and the fingerprint of the calls in their order; those of the calls carry their
counts, and say which call failed or differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .arrays import Array, assign, device_of, on_device_of
from .communicators import Communicator
from .communicators.base import first_values
from .errors import DeviceError
from .joint import Request, Started, joint
from .statistics import COUNT, HEADER, Header, header, padded_length, poison, read_header


def coalesce(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs several calls that do not depend on each other with one message in place of one each.

    ::

        y1, y2 = coalesce([partial(bn1.forward, x1), partial(bn2.forward, x2)])
        dx1, dx2 = coalesce([partial(bn1.backward, dy1), partial(bn2.backward, dy2)])

    Three parallel branches take one allreduce forward (two with float64 data) and one backward,
    whatever their shapes and dtypes. What is computed is what the calls compute one after the
    other. The sums are too, to the last bit, where the communicator adds up a number in the same
    order in a message of any length: over threads, and over every MPI measured
    (docs/distributed.md).

    If a call fails on one rank, that rank raises its exception; the others raise PeerError. Then no
    parameter, gradient or buffer of any of the layers has changed on any rank. Every rank makes the
    same calls in the same order.

    Args:
        calls: ``functools.partial`` objects over :func:`cupybn.functional.batch_norm_forward`,
            ``batch_norm_backward``, ``batch_norm_double_backward``, or ``forward`` and
            ``backward`` of batch norms, each layer once in a direction. All over one communicator;
            those that send nothing (evaluation, one rank) may be among them.

    Returns:
        What each call returns, in order.

    Raises:
        TypeError: something else is among the calls, on every rank, before anything is sent.
        ValueError: so are different communicators, or a layer twice.
        Otherwise as the calls.
    """
    seen: set[tuple[int, str]] = set()
    started = []
    for i, call in enumerate(calls):
        function, args, options = call, (), {}
        if isinstance(call, partial):
            function, args, options = call.func, call.args, call.keywords
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        start = getattr(function, "start", None) or getattr(owner, f"start_{name}", None)
        if start is None:
            raise TypeError(
                f"call {i + 1} of {len(calls)} is {function!r}: only functools.partial of forward "
                "and backward of batch norms, and of functional.batch_norm_forward, _backward and "
                "_double_backward, can share a message"
            )
        if owner is not None and (id(owner), name) in seen:
            raise ValueError(f"{owner.label}: {name} stands twice among the calls of one message")
        seen.add((id(owner), name))
        started.append(start(*args, **options))
    return _run_together(started) if started else []


class Together(joint):
    """The joint call of several calls over one communicator."""

    def __init__(self, comm: Communicator, calls: Sequence[joint]) -> None:
        self.calls = [call for call in calls if call.ranks > 1]
        self.heads = HEADER * len(self.calls)
        size = self.heads + sum(call.room for call in self.calls)
        names = ", ".join(call.what for call in self.calls)
        super().__init__(comm, f"{len(calls)} calls in one message ({names})", padded_length(size))
        self.failed: joint | None = None
        self._heads: Any = None
        for call in self.calls:
            call.together = self

    def agree_on_calls(self) -> None:
        """Once each call has said what must be equal on all ranks."""
        messages = max((call.messages for call in self.calls), default=0)
        self.agree(" | ".join(call.fingerprint for call in self.calls), messages)

    def section(self, call: joint, like: Array) -> Array:
        """The room of one call's payload in the next message."""
        if self._message is None:
            self.payload(like, 0)
        elif device_of(self._message) != device_of(like):
            raise DeviceError(
                f"{call.what} is on {device_of(like)}, the calls before it are on "
                f"{device_of(self._message)}: calls in one message are on one device"
            )
        i = self.calls.index(call)
        begin = HEADER + self.heads + sum(other.room for other in self.calls[:i])
        return self._message[begin : begin + call.room]

    def exchange(self, requests: dict[joint, tuple[int, int]]) -> dict[joint, tuple[int, Array]]:
        """One message for those that ask: the count and payload of each, summed over the ranks."""
        fingerprints = [call.fingerprint for call in self.calls]
        counts = [requests.get(call, (0, 0))[0] for call in self.calls]
        heads = [header(self.dtype, *pair) for pair in zip(fingerprints, counts, strict=True)]
        assign(self._message[HEADER : HEADER + self.heads], np.concatenate(heads))
        with on_device_of(self._message):
            _, total = self.pool(0, self.length - HEADER)
        self._message = None
        answers = {}
        begin = self.heads
        for call, words in zip(self.calls, self._heads, strict=True):
            if call in requests:
                answers[call] = int(words[COUNT]), total[begin : begin + requests[call][1]]
            begin += call.room
        return answers

    def _read(self, total: Array) -> Header:
        words = first_values(self.comm, total, HEADER + self.heads).reshape(-1, HEADER)
        self._heads = words[1:]
        return read_header(words[0], self.ranks)

    def _read_heads(self) -> list[tuple[joint, Header]]:
        return [
            (call, read_header(words, self.ranks))
            for call, words in zip(self.calls, self._heads, strict=True)
        ]

    def _farewell(self) -> Array:
        message = super()._farewell()
        if self.failed in self.calls:
            begin = HEADER * (1 + self.calls.index(self.failed))
            message[begin : begin + HEADER] = poison(self.dtype, self.comm.rank)
        return message

    def _text(self) -> str:
        # As long as one call's text, however many there are: the first that differs tells enough.
        differ = (i for i, (_, summed) in enumerate(self._read_heads()) if not summed.agree)
        i = next(differ, 0)
        return f"call {i + 1} of {len(self.calls)} in one message: {self.calls[i].fingerprint}"

    def _failed_here(self) -> str:
        return self.what if self.failed is None else self.failed.what

    def _failed_there(self) -> str:
        names = [call.what for call, summed in self._read_heads() if summed.failed]
        return f" in {', '.join(names)}" if names else ""


def _run_together(started: Sequence[Started[Any]]) -> list[Any]:
    """Runs calls to their ends with shared messages; what each returned, in order.

    Raises:
        ValueError: they are over different communicators.
        The exception of the first call that failed on this rank; else PeerError,
        CollectiveMismatchError.
    """
    comms = {id(s.call.comm): s.call.comm for s in started if s.call.ranks > 1}
    if len(comms) > 1:
        raise ValueError(
            "the calls are over different communicators "
            f"({', '.join(map(str, comms.values()))}): only calls over one can share a message"
        )
    comm = next(iter(comms.values()), started[0].call.comm)
    results: dict[int, Any] = {}
    requests: dict[int, Request] = {}

    def advance(i: int, answer: Any = None) -> None:
        requests.pop(i, None)
        try:
            requests[i] = started[i].steps.send(answer)
        except StopIteration as end:
            results[i] = end.value
        except BaseException:
            together.failed = started[i].call
            raise

    with Together(comm, [s.call for s in started]) as together:
        try:
            for i in range(len(started)):
                advance(i)
            together.agree_on_calls()
            while requests:
                asking = {started[i].call: r for i, r in requests.items() if r is not None}
                answers = together.exchange(asking) if asking else {}
                for i in list(requests):
                    if not asking or started[i].call in asking:
                        advance(i, answers.get(started[i].call))
        finally:
            for s in reversed(started):
                s.steps.close()
    return [results[i] for i in range(len(started))]
