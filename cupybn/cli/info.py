"""``python -m cupybn info``: versions, devices and MPI of this installation, on every host."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..backends.cpu.pool import thread_count
from ..backends.cuda.source import source_directory
from ..communicators import MpiCommunicator
from ..communicators.process import library_version, load_mpi
from ..distributed import local_device
from ..errors import DeviceError
from ..launcher import local_rank_variables, singleton
from . import hosts

_LABELS = {
    "cupybn": "cupybn",
    "python": "Python",
    "numpy": "NumPy",
    "cpu_backend": "CPU backend",
    "threads": "  threads",
    "cupy": "CuPy",
    "cuda_driver": "CUDA driver",
    "cuda_runtime": "CUDA runtime",
    "gpus": "GPUs",
    "kernel_sources": "kernel sources",
    "kernel_cache": "kernel cache",
    "local_rank": "local rank",
    "local_device": "device of rank",
    "mpi4py": "mpi4py",
    "mpi_library": "MPI library",
    "ranks": "ranks",
    "cuda_aware_mpi": "CUDA-aware MPI",
    "cuda_aware_how": "  found by",
    "transport": "transport",
    "transport_why": "  because",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    why = "do not start MPI (which ends the process on some login nodes)"
    parser.add_argument("--no-mpi", action="store_true", help=why)


def run(args: argparse.Namespace) -> int:
    found = here() | cuda() | ({} if args.no_mpi else mpi())
    if found.pop("rank", 0):
        return 0
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines_of_all(found)))
    return 0


def _lines_of_all(found: dict[str, Any]) -> list[str]:
    lines = _table(found)
    if "hosts" in found:
        lines += ["", *hosts.table(found["hosts"]), ""]
        lines += [f"WARNING: {warning}" for warning in found["warnings"]]
    return lines


def _table(found: dict[str, Any]) -> list[str]:
    """A line for each value, the first of several with the label."""
    return [
        f"{'' if i else label:16}{line}"
        for name, label in _LABELS.items()
        if name in found
        for i, line in enumerate(_lines(found[name]))
    ]


def _lines(value: Any) -> list[str]:
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, dict):
        return [f"{name}={text}" for name, text in value.items()] or ["no launcher's variable"]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def here() -> dict[str, Any]:
    """Python, NumPy, and this rank's place on its machine."""
    try:
        device = local_device()
    except (DeviceError, ValueError) as error:
        device = f"none: {error}"
    except Exception as error:  # CuPy itself is broken: cuda() says how
        device = f"none: {type(error).__name__}"
    return {
        "cupybn": f"{__version__} ({Path(__file__).parents[1]})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "numpy": np.__version__,
        "cpu_backend": hosts.backend(),
        "threads": thread_count(),
        "kernel_sources": str(source_directory()),
        "local_rank": local_rank_variables(),
        "local_device": device,
    }


def cuda() -> dict[str, Any]:
    """CuPy, the driver, the GPUs. Only what CuPy finds counts."""
    try:
        import cupy  # type: ignore[import-not-found, unused-ignore]
    except Exception as error:  # missing, or broken: the report says so
        missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        return {"cupy": "not installed" if missing else _failed(error)}
    runtime = cupy.cuda.runtime
    found = {
        "cupy": cupy.__version__,
        "kernel_cache": os.path.expanduser(
            os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")
        ),
    }
    try:
        found["cuda_runtime"] = _version(runtime.runtimeGetVersion())
        found["cuda_driver"] = _version(runtime.driverGetVersion())
        found["gpus"] = [_gpu(runtime, i) for i in range(runtime.getDeviceCount())] or "none"
    except Exception as error:  # no driver: the report says so
        found["gpus"] = f"none: {_failed(error)}"
    return found


def _failed(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _version(number: int) -> str:
    """13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _gpu(runtime: Any, device: int) -> str:
    properties = runtime.getDeviceProperties(device)
    return (
        f"cuda:{device}: {properties['name'].decode()}, compute capability "
        f"{properties['major']}.{properties['minor']}, "
        f"{properties['totalGlobalMem'] / 2**30:.0f} GiB"
    )


def mpi() -> dict[str, Any]:
    """mpi4py, its library, what all ranks say, and the transport they agree on. Collective."""
    try:
        version = metadata.version("mpi4py")
    except metadata.PackageNotFoundError:
        version = "not installed"
    try:
        loaded = load_mpi()
    except RuntimeError as error:
        return {"mpi4py": version, "mpi_library": f"none: {error}"}
    world = loaded.COMM_WORLD
    problem = singleton(world.size)
    found = {
        "mpi4py": version,
        "mpi_library": library_version(loaded),
        "ranks": problem or world.size,
        "rank": world.rank,
    }
    if problem:
        return found
    ranks = world.allgather(hosts.facts(loaded))
    found |= {"hosts": ranks, "warnings": hosts.warnings(ranks)}
    try:
        comm = MpiCommunicator(world)
    except Exception as error:  # the report says why
        return found | {"transport": _failed(error)}
    return found | {
        "cuda_aware_mpi": comm.cuda_aware.aware,
        "cuda_aware_how": comm.cuda_aware.how,
        "transport": f"{comm.transport} for CuPy arrays, host for NumPy arrays",
        "transport_why": comm.why,
    }
