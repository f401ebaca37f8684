"""All ranks of a job in one table: a line a host, differences marked; and warnings."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np

from .. import __version__, backends
from ..backends.cpu.pool import thread_count
from ..communicators.base import by_rank, seconds_to_wait
from ..communicators.cuda_aware import cuda_aware
from ..launcher import cores


def facts(mpi: Any) -> dict[str, Any]:
    """Facts that may differ between the ranks of a job; `mpi` is ``mpi4py.MPI``, initialised."""
    name, version = mpi.get_vendor()
    return {
        "host": platform.node(),
        "cores": sorted(cores()),
        "cupybn": __version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "MPI": f"{name} {'.'.join(map(str, version))}",
        "backend": backend(),
        "threads": thread_count(),
        "CuPy by": _found(lambda: "device" if cuda_aware(mpi).aware else "pinned"),
        "timeout": _found(lambda: f"{seconds_to_wait():g} s"),
    }


def _found(look: Callable[[], str]) -> str:
    try:
        return look()
    except ValueError:  # of a variable: the communicator says what is wrong with it
        return "ValueError"


def backend() -> str:
    """The backend that computes on NumPy arrays here, and the reason if it is not the fast one."""
    try:
        name = backends.cpu_backend().__name__.rpartition(".")[2]
    except (ImportError, ValueError) as error:
        return f"none: {error}"
    if name != "cpu":
        missing = find_spec("numba") is None
        return f"{name} (pip install numba for the fast one)" if missing else name
    return f"numba {metadata.version('numba')}"


def table(ranks: list[dict[str, Any]]) -> list[str]:
    """The lines of the table of what :func:`facts` found on each rank."""
    crowds = _crowds(ranks)
    names = list(dict.fromkeys(name for rank in ranks for name in rank))
    columns = {name: [str(rank.get(name, "?")) for rank in ranks] for name in names}
    columns["cores"] = [str(crowds[rank["host"]][1]) for rank in ranks]
    for name in names[1:]:
        ((usual, _),) = Counter(columns[name]).most_common(1)
        columns[name] = [v if v == usual else f"{v} *" for v in columns[name]]
    who = by_rank(zip(*columns.values(), strict=True))
    rows = [(names[0], "ranks", *names[1:])]
    rows += [(values[0], ranks_, *values[1:]) for values, ranks_ in who.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    marked = any(" *" in value for row in rows for value in row)
    return lines + ["* differs from other ranks"] * marked


def _crowds(ranks: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """How many ranks each host has, and how many cores they may run on."""
    masks: dict[str, list[list[int]]] = {}
    for rank in ranks:
        masks.setdefault(rank["host"], []).append(rank["cores"])
    return {host: (len(found), len(set().union(*found))) for host, found in masks.items()}


def warnings(ranks: list[dict[str, Any]]) -> list[str]:
    """Warnings: what makes a job slow, or its end late."""
    found = [
        f"{number} ranks on {on} core{'s' * (on > 1)} of {host}: a rank that waits keeps a core "
        "busy, and with MPICH a message then takes 10 ms and more; Open MPI and Intel MPI give the "
        "core away by themselves. Start as many ranks as there are cores (docs/distributed.md)"
        for host, (number, on) in _crowds(ranks).items()
        if number > on
    ]
    timeouts = {rank["timeout"]: dict[str, None]() for rank in ranks}
    for rank in ranks:
        timeouts[rank["timeout"]][rank["host"]] = None
    if len(timeouts) > 1:
        differing = ", ".join(f"{text} on {' '.join(on)}" for text, on in timeouts.items())
        found.append(
            f"the timeouts differ: {differing}; all ranks take the longest. CUPYBN_TIMEOUT has to "
            "reach every host (Open MPI: mpiexec -x CUPYBN_TIMEOUT)"
        )
    return found
