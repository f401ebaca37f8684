"""What this process runs on, and what can be measured here. Libraries are imported late: the
number of threads is set before.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def no_gpu() -> str | None:
    """Why nothing can be measured on a GPU."""
    cupybn = import_module("cupybn")
    try:
        cupybn.BatchNorm1d(1, device="cuda")
    except cupybn.DeviceError as error:
        return str(error)
    return None


def no_mpi() -> str | None:
    """Why nothing can be measured between ranks."""
    try:
        import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        return f"no MPI library could be loaded ({error})"
    return None


def launched() -> bool:
    """Whether mpiexec says that it started several of these processes."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI
    return any(os.environ.get(name, "1") != "1" for name in names)


def is_first_rank() -> bool:
    """Whether this process prints; asking starts MPI where there are several."""
    return not launched() or import_module("mpi4py.MPI").COMM_WORLD.rank == 0


def processor() -> str:
    """Its name, and how many cores this process may use."""
    name, cores = platform.processor(), os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model n")), name)
    except OSError:
        pass
    return f"{name or 'unknown'}, {cores} cores, {platform.machine()}"


def commit(checkout: Path = ROOT) -> str:
    """What git calls a checkout."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
