"""How this process was started, and under which MPI."""

from __future__ import annotations

import os
from typing import Any

from ..launcher import LOCAL_RANK_VARIABLES

_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI


def local_rank_variables() -> dict[str, str]:
    """The launcher's variables for the rank on this machine, as far as they are set."""
    return {name: os.environ[name] for name in LOCAL_RANK_VARIABLES if name in os.environ}


def library_version(mpi: Any) -> str:
    """The first line of what the MPI library says of itself."""
    return " ".join(str(mpi.Get_library_version()).splitlines()[0].split()).rstrip("\0, ")


def strangers(size: int) -> str | None:
    """What is wrong if the launcher started more processes than MPI sees; None if nothing is."""
    for name in _SIZE_VARIABLES:
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 1 and size == 1:
            return (
                f"the launcher started {text} processes ({name}), but each of them is alone in "
                "MPI.COMM_WORLD: mpiexec belongs to another MPI than the library that mpi4py "
                "loaded (MPI4PY_LIBMPI chooses it)"
            )
    return None
