"""What the watchdog costs a host allreduce of a C = 64 message; rank 0 prints a JSON object.

``mpiexec -n 2 python -m mpi4py tests/mpi/watchdog_cost.py [blocks [calls]]``. Blocks of calls take
turns with and without a timeout, in both orders, so that whatever else the machine does meets both.
What a call writes down for the watchdog it writes with and without a timeout, so that is timed by
itself and added.
"""

import json
import sys
import time
from timeit import repeat

import numpy as np
from mpi4py import MPI

from cupybn.communicators import MpiCommunicator
from cupybn.communicators.watchdog import Watch
from cupybn.statistics import message_length


def watchdog_cost(mpi_comm, blocks=300, calls=200, channels=64):
    """Microseconds: (median of an allreduce without a timeout, what the watchdog costs it)."""
    comms = [MpiCommunicator(mpi_comm, timeout=timeout) for timeout in (0, 600)]
    message = np.zeros(message_length(channels))

    def block(comm):
        began = time.perf_counter()
        for _ in range(calls):
            comm.allreduce(message, "forward of 'layer'")
        return (time.perf_counter() - began) / calls * 1e6

    for comm in comms:
        block(comm)
    off, added = [], []
    for i in range(blocks):
        times = {}
        for which in (i % 2, 1 - i % 2):
            times[which] = block(comms[which])
        off.append(times[0])
        added.append(times[1] - times[0])
    return float(np.median(off)), float(np.median(added)) + _writing()


def _writing():
    """Microseconds for which a call writes to its ``Watch``."""
    names = {"watch": Watch("", 0, print), "label": "forward of 'layer'"}
    marks = "watch.sequence += 1; watch.label = label; watch.label = None"
    loops = 100_000
    both, empty = (
        np.median(repeat(statement, globals=names, number=loops, repeat=7)) / loops * 1e6
        for statement in (marks, "pass")
    )
    return float(both - empty)


if __name__ == "__main__":
    allreduce, cost = watchdog_cost(MPI.COMM_WORLD, *map(int, sys.argv[1:]))
    if MPI.COMM_WORLD.rank == 0:
        print(
            json.dumps({
                "ranks": MPI.COMM_WORLD.size,
                "allreduce_us": round(allreduce, 3),
                "watchdog_us": round(cost, 3),
                "percent": round(100 * cost / allreduce, 2),
            })
        )  # fmt: skip
