"""``python -m cupybn COMMAND ...`` where the ranks differ: ``hosts.py FAULT COMMAND [options]``.

Ranks 0 and 1 seem to be on host0, ranks 2 and 3 on host1.
"""

import os
import platform
import sys

from mpi4py import MPI

import cupybn
from cupybn.cli import hosts, main
from cupybn.communicators import mpi

fault, *arguments = sys.argv[1:]
rank = MPI.COMM_WORLD.rank
platform.node = lambda: f"host{rank // 2}"
if fault == "versions" and rank == 3:
    platform.python_version = lambda: "3.99"
    hosts.__version__ = cupybn.__version__ + ".other"
if fault == "protocols" and rank == 3:
    mpi.PROTOCOL = 9
if fault == "timeouts" and rank // 2:
    os.environ["CUPYBN_TIMEOUT"] = "77"
if fault == "variables" and rank == 3:
    os.environ["CUPYBN_TIMEOUT"] = "soon"
if fault == "aware" and rank // 2:
    os.environ["CUPYBN_CUDA_AWARE_MPI"] = "1"
masks = {"crowded": [{0}, {0}, {5}, {6}], "bound": [{4}, {5}, {6}, {7}]}
os.sched_getaffinity = lambda pid: masks.get(fault, [set(range(8))] * 4)[rank]
if fault == "slow":
    from cupybn.cli import selftest

    selftest.check_latency = lambda setup, channels: 7300.0 if rank == 1 else 5.0
sys.exit(main(arguments))
