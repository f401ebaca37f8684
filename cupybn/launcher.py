"""What the MPI launcher says of this process, in its environment variables: read before MPI is."""

from __future__ import annotations

import os

LOCAL_RANK_VARIABLES = (
    "OMPI_COMM_WORLD_LOCAL_RANK",  # Open MPI
    "MPI_LOCALRANKID",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_LOCAL_RANK",  # MVAPICH
    "PALS_LOCAL_RANKID",  # Cray
    "PMI_LOCAL_RANK",
    "SLURM_LOCALID",
)
LOCAL_SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "PALS_LOCAL_SIZE",
    "PMI_LOCAL_SIZE",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE",  # "4(x2),3": of the nodes in turn
)
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI

STARTED_VARIABLES = (  # of every process that a launcher starts for MPI; not srun's own
    "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK",
    "PMIX_RANK",
    "PALS_RANKID",
    "MV2_COMM_WORLD_RANK",
)


def started_by_mpi() -> bool:
    """Whether an MPI launcher started this process, or one that it descends from."""
    return any(os.environ.get(name) for name in STARTED_VARIABLES)


def local_rank_variables() -> dict[str, str]:
    """The launcher's variables for the rank on this machine, as far as they are set."""
    return {name: os.environ[name] for name in LOCAL_RANK_VARIABLES if name in os.environ}


def local_rank() -> int:
    """This rank's number among those on its machine, from the launcher's variables; 0 if unset.

    Raises:
        ValueError: a launcher's variable is no number.
    """
    for variable, text in local_rank_variables().items():
        if text.isdecimal():
            return int(text)
        if text:
            raise ValueError(f"{variable} must be the number of a rank, got {text!r}")
    return 0


def local_size() -> int:
    """How many ranks share this machine, from the launcher's variables; 1 if unset."""
    numbers = (leading_number(os.environ.get(name, "")) for name in LOCAL_SIZE_VARIABLES)
    return next(filter(None, numbers), 1)


def leading_number(text: str) -> int:
    """4 of "4", of "4,2" and of "4(x2)"; 0 where there is none."""
    digits = len(text) - len(text.lstrip("0123456789"))
    return int(text[:digits] or 0)


def strangers(size: int) -> str | None:
    """What is wrong if the launcher started more processes than MPI sees; None if nothing is."""
    for name in SIZE_VARIABLES:
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 1 and size == 1:
            return (
                f"the launcher started {text} processes ({name}), but each of them is alone in "
                "MPI.COMM_WORLD: mpiexec belongs to another MPI than the library that mpi4py "
                "loaded (MPI4PY_LIBMPI chooses it)"
            )
    return None
