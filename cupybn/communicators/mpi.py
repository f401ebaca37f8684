"""Communicators over MPI. mpi4py is imported when the first one is made, not before: importing
``mpi4py.MPI`` initialises MPI.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from typing import Any

import numpy as np

from .. import __version__
from ..arrays import Array, copy_to_host, is_cupy
from ..backends import numba_problem
from ..errors import CollectiveMismatchError, DeviceError, DTypeError, PeerError
from ..launcher import singleton
from ..statistics import HEADER, PROTOCOL, unpack_texts
from . import process
from .base import (
    DEFAULT_TIMEOUT,
    Communicator,
    OfOneProcess,
    all_take_numpy,
    listed,
    seconds_to_wait,
    sum_on_host,
    warn_once,
)
from .cuda_aware import VARIABLE, Answer, cuda_aware
from .process import load_mpi, running_mpi
from .staging import sum_on_device, sum_through_pinned
from .watchdog import Watch, watchdog

_TRANSPORTS = ("auto", "device", "pinned", "host")


# The agreement of the ranks of a new communicator: see MpiCommunicator._agree.
_AGREEMENT = 16
_TEXT = 256  # bytes


def check_intracomm(comm: Any) -> None:
    """Raises TypeError or ValueError unless the mpi4py object is a valid intracommunicator."""
    mpi = load_mpi()
    if not isinstance(comm, mpi.Intracomm) and comm != mpi.COMM_NULL:
        raise TypeError(f"comm must be an intracommunicator, got an {type(comm).__name__}")
    if comm == mpi.COMM_NULL:
        raise ValueError("comm is MPI.COMM_NULL: this process is not in that communicator")


class MpiCommunicator(OfOneProcess):
    """Sums messages with ``MPI.Allreduce`` over a private duplicate of the communicator.

    NumPy messages are summed where they are. CuPy messages go one of three ways:

    * ``"device"``: MPI gets the device pointer; only where MPI is CUDA-aware on every rank.
    * ``"pinned"``: copied to pinned host memory and back, asynchronously on the current stream.
    * ``"host"``: copied to ordinary host memory and back.

    Args:
        mpi_comm: a :class:`mpi4py.MPI.Intracomm`. It is duplicated once a process, so that its
            other traffic never meets ours; the duplicate is kept with it, and freed with it.
        transport: one of these, or ``"auto"``: "device" where it is possible, else "pinned".
        timeout: seconds to wait for the other ranks before the job is ended with code 124;
            None reads ``CUPYBN_TIMEOUT`` (default 600), 0 waits for ever.

    Making one is collective: the ranks agree on the transport and take the largest of their
    timeouts; if these differ, rank 0 warns. If Numba is installed on a rank but cannot be used,
    NumPy computes on all ranks, and rank 0 warns.

    Raises:
        RuntimeError: MPI is not running in this process; or the launcher started several processes
            and MPI sees only this one (``CUPYBN_ALLOW_SINGLETON=1`` says that it is meant).
        ValueError: no such transport or timeout, or a bad ``CUPYBN_CUDA_AWARE_MPI``.
        DeviceError: on all ranks: "device", and some rank's MPI is not known to be CUDA-aware.
        CollectiveMismatchError: the ranks ask for different transports, or run versions of cupybn
            that do not understand each other's messages; on all ranks.
        PeerError: another rank raised ValueError.

    Attributes:
        timeout: the one in force, in seconds, the same on every rank; 0 is none.
        transport: of CuPy messages, the same on every rank: "device", "pinned" or "host".
        why: the reason for this transport.
        cuda_aware: whether this rank's MPI takes device pointers, and how that was found.
    """

    def __init__(
        self, mpi_comm: Any, transport: str = "auto", timeout: float | None = None
    ) -> None:
        check_intracomm(mpi_comm)
        mpi = running_mpi()
        problem = singleton(mpi.COMM_WORLD.size)
        if problem and mpi_comm != mpi.COMM_SELF:
            raise RuntimeError(problem)
        self.mpi_comm = mpi_comm
        self.rank = int(mpi_comm.rank)
        self.size = int(mpi_comm.size)
        self.timeout = DEFAULT_TIMEOUT
        self.cuda_aware = Answer(False, "not asked")
        error = None
        try:
            self.timeout = seconds_to_wait(timeout)
            if transport not in _TRANSPORTS:
                raise ValueError(f"transport must be one of {_TRANSPORTS}, got {transport!r}")
            self.cuda_aware = cuda_aware(mpi)
        except Exception as caught:  # raised below, once the other ranks know
            error = caught
        self._in_place = mpi.IN_PLACE
        self._is_finalized = mpi.Is_finalized
        self._first: tuple[Array, Any] | None = None  # a staged sum, and its first values
        where = f"rank {self.rank} of {self.size} on {platform.node()}, process {os.getpid()}"
        self._watch = Watch(where, self.timeout or float("inf"), mpi.COMM_WORLD.Abort)
        if self.timeout:
            watchdog.add(self._watch)
        kept = kept_with(mpi_comm)
        # The label of the message on its way: one thread at a time sends. Python changes threads
        # after a call, so not between reading this and setting it.
        self._turn: list[str | None] = kept.setdefault("turn", [None])
        if "dup" not in kept:
            why = "duplicating the communicator for its first use"
            kept["dup"] = self._watched(why, mpi_comm.Dup)
        self._dup = kept["dup"]
        self.transport, self.why = self._agree(transport, error)

    def _agree(self, wanted: str, error: Exception | None) -> tuple[str, str]:
        """The transport of all ranks, and the reason; or every rank raises. Touches no device.

        The first message between two ranks, whatever their versions: 16 words of int64, their
        minimum over the ranks. The first two are the protocol and its negative. Where these differ,
        an Allgather of 256 bytes of UTF-8 text a rank follows, and every rank raises. None of this
        may ever change; the other words belong to the protocol.
        """
        choice = -1 if error else _TRANSPORTS.index(wanted)
        failed = self.rank if error else self.size
        not_aware = self.size if self.cuda_aware.aware else self.rank
        # The bits of floating numbers that are not negative are in the order of the numbers.
        timeout = int(np.float64(self.timeout or np.inf).view(np.int64))
        words = np.zeros(_AGREEMENT, np.int64)
        words[:8] = PROTOCOL, -PROTOCOL, failed, not_aware, choice, -choice, timeout, -timeout
        problem = numba_problem() if self.size > 1 else ""
        words[8] = -bool(problem)
        self._watched(
            "agreeing on a transport", self._dup.Allreduce, self._in_place, words, load_mpi().MIN
        )
        oldest, newest, failed, not_aware, lowest, highest, shortest, longest = map(int, words[:8])
        if oldest != -newest:
            versions = self._gather(f"cupybn {__version__}, protocol {PROTOCOL}, {platform.node()}")
            raise CollectiveMismatchError(
                "the ranks run versions of cupybn that do not understand each other; the same has "
                f"to be installed for all of them:{versions}"
            )
        if error is not None:
            raise error
        if failed < self.size:
            raise PeerError(
                f"making a communicator: rank {failed} failed, and raised the exception that says "
                "why"
            )
        if shortest != -longest:
            self._take_longest(float(np.int64(-longest).view(np.float64)))
        if words[8]:
            problems = self._gather(f"{platform.node()}, {problem or 'no problem'}")
            all_take_numpy(self.rank, problems)
        if lowest != -highest:
            raise CollectiveMismatchError(
                "the ranks ask for different transports, among them "
                f"{_TRANSPORTS[lowest]!r} and {_TRANSPORTS[-highest]!r}; this rank for {wanted!r}"
            )
        return self._choose(wanted, not_aware)

    def _gather(self, text: str) -> str:
        """The texts of all ranks, a line for each. Collective; never to be changed."""
        mine = np.array([text.encode()], f"S{_TEXT}").view(np.uint8)
        table = np.zeros(self.size * _TEXT, np.uint8)
        self._watched("gathering texts", self._dup.Allgather, mine, table)
        return listed(unpack_texts(table, self.size))

    def _take_longest(self, seconds: float) -> None:
        """Sets the timeout of all ranks to the longest; rank 0 warns if they differ."""
        own = f"{self.timeout:g} s" if self.timeout else "no limit"
        timeouts = self._gather(f"{own}, {platform.node()}")
        self.timeout = 0.0 if seconds == np.inf else seconds
        self._watch.timeout = seconds
        if self.timeout:
            watchdog.add(self._watch)
        warn_once(
            self.rank,
            "the ranks have different timeouts, and all take the longest of them (does "
            f"CUPYBN_TIMEOUT reach all hosts? Open MPI: mpiexec -x):{timeouts}",
        )

    def _choose(self, wanted: str, not_aware: int) -> tuple[str, str]:
        """The transport, and the reason; `not_aware` is the first rank without CUDA-aware MPI."""
        if not self.cuda_aware.aware:
            how = f"MPI is not known to be CUDA-aware ({self.cuda_aware.how})"
        elif not_aware < self.size:
            how = f"MPI is not known to be CUDA-aware on rank {not_aware}"
        else:
            how = f"MPI is CUDA-aware on every rank ({self.cuda_aware.how} on this one)"
        if wanted == "device" and not_aware < self.size:
            raise DeviceError(
                f"transport='device': {how}, and device pointers would crash it. Take "
                f"transport='auto'; or set {VARIABLE}=1 on every rank if you know better"
            )
        if wanted != "auto":
            return wanted, "asked for"
        return ("pinned" if not_aware < self.size else "device"), how

    def allreduce(self, message: Array, label: str = "") -> Array:
        """The sum over the ranks, in place. Raises DTypeError if the message is not an array."""
        watch, turn = self._watch, self._turn
        label = label or "allreduce"
        if self._is_finalized() or process.forked or turn[0] is not None:
            self._refuse(label)
        watch.sequence += 1
        watch.label = turn[0] = label
        try:
            if type(message) is np.ndarray:
                self._dup.Allreduce(self._in_place, message)
            else:
                self._allreduce_other(message, label)
        except Exception as error:
            if self._dup != load_mpi().COMM_NULL:
                raise
            raise RuntimeError(
                f"{label}: the MPI communicator was freed; layers keep the one they were given "
                "until layer.comm is set"
            ) from error
        finally:
            watch.label = turn[0] = None
        return message

    def _refuse(self, label: str) -> None:
        """Raises the reason why no message may be sent now."""
        try:
            running_mpi()
        except RuntimeError as error:
            raise RuntimeError(f"{label}: {error}") from None
        raise RuntimeError(
            f"{label}: another thread of this rank is in {self._turn[0] or 'a call'} over the same "
            "communicator, and the other ranks could not tell the two apart. Give each thread a "
            "communicator of its own: comm.Dup()"
        )

    def _allreduce_other(self, message: Array, label: str) -> None:
        """``allreduce`` for a CuPy array, by the transport, or for a subclass of NumPy's."""
        transport = self.transport if is_cupy(message) else "host"
        if transport == "device":
            sum_on_device(message, self._sum)
        elif transport == "pinned":
            host = sum_through_pinned(message, self._sum)
            self._first = message, host[:HEADER].copy()
        elif is_cupy(message) or isinstance(message, np.ndarray):
            sum_on_host(message, self._sum)
        else:
            raise DTypeError(f"{label}: a message is an array, got {type(message).__name__}")

    def _sum(self, values: Array) -> Array:
        self._dup.Allreduce(self._in_place, values)
        return values

    def first_values(self, total: Array, n: int) -> Any:
        """The first n values of the sum that was returned last, in host memory."""
        kept, self._first = self._first, None
        if kept is not None and kept[0] is total and n <= HEADER:
            return kept[1][:n]
        return copy_to_host(total[:n])

    def split(self, color: int) -> Any:
        """An mpi4py communicator of the ranks with the same color, in their order. Collective."""
        return self._watched("splitting the communicator", self.mpi_comm.Split, color, self.rank)

    def _watched(self, label: str, call: Any, *args: Any) -> Any:
        if self._is_finalized() or process.forked or self._turn[0] is not None:
            self._refuse(label)
        self._watch.label = self._turn[0] = label
        try:
            return call(*args)
        finally:
            self._watch.label = self._turn[0] = None

    def __repr__(self) -> str:
        return (
            f"MpiCommunicator(rank {self.rank} of {self.size}, transport={self.transport!r}, "
            f"timeout={self.timeout:g})"
        )


@cache
def _keyval() -> int:
    """The key under which this library keeps something with mpi4py's communicators."""
    return load_mpi().Comm.Create_keyval(delete_fn=_free)  # type: ignore[no-any-return]


def kept_with(mpi_comm: Any) -> dict[str, Any]:
    """What this library keeps with an mpi4py communicator, as an MPI attribute: a dict."""
    kept: dict[str, Any] | None = mpi_comm.Get_attr(_keyval())
    if kept is None:
        kept = {}
        mpi_comm.Set_attr(_keyval(), kept)
    return kept


def _free(mpi_comm: Any, keyval: int, kept: dict[str, Any]) -> None:
    mpi, dup = load_mpi(), kept.get("dup")
    kept.clear()
    if dup is not None and mpi_comm != mpi.COMM_WORLD and not mpi.Is_finalized():
        dup.Free()


def mpi_communicator(mpi_comm: Any | None) -> MpiCommunicator:
    """This library's communicator for an mpi4py one, or for COMM_WORLD; one for each."""
    mpi = running_mpi()
    comm = mpi.COMM_WORLD if mpi_comm is None else mpi_comm
    kept = kept_with(comm)
    if "communicator" not in kept:
        kept["communicator"] = MpiCommunicator(comm)
    return kept["communicator"]  # type: ignore[no-any-return]


def _is_mpi(comm: Any) -> bool:
    return any(cls.__module__.startswith("mpi4py") for cls in type(comm).__mro__)


def check_comm(comm: Any) -> Any:
    """Checks a ``comm=`` argument and returns it; not collective.

    Raises:
        TypeError, ValueError: it is not a communicator.
    """
    if _is_mpi(comm):
        check_intracomm(comm)
    elif comm is not None and (
        isinstance(comm, type) or not isinstance(comm, Communicator) or callable(comm.rank)
    ):
        raise TypeError(
            "comm must be an mpi4py communicator, one of cupybn.communicators (anything with rank, "
            f"size and allreduce), or None for MPI.COMM_WORLD; got {type(comm).__name__}. For a "
            "process group of torch.distributed there is cupybn.interop.torch."
            "ProcessGroupCommunicator(group)"
        )
    return comm


def resolve(comm: Any) -> Communicator:
    """The communicator for a ``comm=`` argument; None is ``MPI.COMM_WORLD``.

    The first call for an mpi4py communicator duplicates it, which is collective. So is the first
    one for a communicator that has a method ``agree``, which is called here.

    Raises:
        RuntimeError: comm is None and no MPI library can be loaded.
        TypeError, ValueError: comm is not a communicator.
        As ``agree``.
    """
    check_comm(comm)
    if comm is None or _is_mpi(comm):
        return mpi_communicator(comm)
    if hasattr(comm, "agree"):
        comm.agree()
    return comm  # type: ignore[no-any-return]
