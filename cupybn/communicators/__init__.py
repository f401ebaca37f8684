"""How messages are added up across ranks. They know nothing of what the numbers mean."""

from __future__ import annotations

from typing import Any

from .base import Communicator, SelfCommunicator
from .mpi import MpiCommunicator, check_intracomm, mpi_communicator
from .threads import ThreadCommunicator

__all__ = [
    "Communicator",
    "MpiCommunicator",
    "SelfCommunicator",
    "ThreadCommunicator",
    "check_comm",
    "resolve",
]


def _is_mpi(comm: Any) -> bool:
    return any(cls.__module__.startswith("mpi4py") for cls in type(comm).__mro__)


def check_comm(comm: Any) -> Any:
    """A ``comm=`` argument as it is; not collective.

    Raises:
        TypeError, ValueError: it is no communicator.
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

    The first call for an mpi4py communicator duplicates it, which is collective.

    Raises:
        RuntimeError: comm is None and no MPI library can be loaded.
        TypeError, ValueError: comm is no communicator.
    """
    check_comm(comm)
    if comm is None or _is_mpi(comm):
        return mpi_communicator(comm)
    return comm  # type: ignore[no-any-return]
