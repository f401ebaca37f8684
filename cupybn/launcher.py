"""The MPI launcher's environment variables for this process, readable before MPI starts."""

from __future__ import annotations

import os

LOCAL_RANK_VARIABLES = (
    "LOCAL_RANK",  # torchrun; first, since its processes inherit another launcher's variables
    "OMPI_COMM_WORLD_LOCAL_RANK",  # Open MPI
    "MPI_LOCALRANKID",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_LOCAL_RANK",  # MVAPICH
    "PALS_LOCAL_RANKID",  # Cray
    "PMI_LOCAL_RANK",
    "SLURM_LOCALID",
)
LOCAL_SIZE_VARIABLES = (
    "LOCAL_WORLD_SIZE",  # torchrun
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "PALS_LOCAL_SIZE",
    "PMI_LOCAL_SIZE",
)
# The number of processes that were started together, and a variable that is set with it; the first
# found counts, mpiexec's before the batch system's. None is of an allocation: in its shell, where
# SLURM_NTASKS is set, a single process is nothing unusual.
SIZE_VARIABLES = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_SIZE",  # MPICH, Intel MPI, Cray PALS, Slurm with pmi2
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "FLUX_JOB_SIZE": "FLUX_TASK_RANK",
}
ALLOW_SINGLETON = "CUPYBN_ALLOW_SINGLETON"

STARTED_VARIABLES = (  # set in every process that a launcher starts for MPI; not srun's own
    "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK",
    "PMIX_RANK",
    "PALS_RANKID",
    "MV2_COMM_WORLD_RANK",
)


def started_by_mpi() -> bool:
    """Whether an MPI launcher started this process or an ancestor of it."""
    return any(os.environ.get(name) for name in STARTED_VARIABLES)


def local_rank_variables() -> dict[str, str]:
    """The launcher's variables for the rank on this machine that are set."""
    return {name: os.environ[name] for name in LOCAL_RANK_VARIABLES if name in os.environ}


def local_rank() -> int:
    """This rank's number among those on its machine, from the launcher's variables; 0 if unset.

    Raises:
        ValueError: a launcher's variable is not a number.
    """
    for variable, text in local_rank_variables().items():
        if text.isdecimal():
            return int(text)
        if text:
            raise ValueError(f"{variable} must be the number of a rank, got {text!r}")
    return 0


def local_size() -> int:
    """How many ranks share this machine, from the launcher's variables; 1 if unset."""
    numbers = [leading_number(os.environ.get(name, "")) for name in LOCAL_SIZE_VARIABLES]
    return next(filter(None, [*numbers, _slurm_local_size()]), 1)


def _slurm_local_size() -> int:
    """The tasks of this Slurm step on this node; 0 outside a step."""
    node = leading_number(os.environ.get("SLURM_NODEID", ""))
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):  # "4(x2),3"
        tasks, _, times = part.partition("(x")
        node -= leading_number(times) or 1
        if node < 0:
            return leading_number(tasks)
    return 0


def leading_number(text: str) -> int:
    """4 of "4", of "4,2" and of "4(x2)"; 0 where there is none."""
    digits = len(text) - len(text.lstrip("0123456789"))
    return int(text[:digits] or 0)


def cores() -> set[int]:
    """The cores that this process may run on."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # macOS and Windows have no such call
        return set(range(os.cpu_count() or 1))


def share_of_cores() -> int:
    """The number of cores for this rank: those it is bound to, or its share of the machine's.

    A launcher that binds its ranks is not bound itself. If Slurm says how many cores its step has
    on this node, these count.
    """
    mine = cores()
    try:
        launchers = mine | os.sched_getaffinity(os.getppid())
    except (AttributeError, OSError):  # no such call, or not allowed to ask
        launchers = mine
    of_all = leading_number(os.environ.get("SLURM_CPUS_ON_NODE", "")) or len(launchers)
    return max(1, min(len(mine), of_all // local_size()))


def singleton(size: int) -> str | None:
    """The fault if the launcher started more processes than MPI sees; None if there is none.

    Args:
        size: of MPI's world.
    """
    if size > 1 or os.environ.get(ALLOW_SINGLETON, "0") not in ("", "0"):
        return None
    found = [name for name, beside in SIZE_VARIABLES.items() if {name, beside} <= os.environ.keys()]
    started = leading_number(os.environ[found[0]]) if found else 0
    if started < 2:
        return None
    return (
        f"the launcher started {started} processes ({found[0]}), but each of them is alone in "
        "MPI.COMM_WORLD: the launcher and the MPI library that mpi4py loaded do not belong "
        "together. Take that library's own mpiexec; or srun --mpi=pmi2 (MPICH, Intel MPI) or srun "
        "--mpi=pmix (Open MPI). Where a process alone is meant, as in a subprocess of a rank, set "
        f"{ALLOW_SINGLETON}=1"
    )
