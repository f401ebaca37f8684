"""``python -m cupybn COMMAND ...`` where the ranks differ: ``hosts.py FAULT COMMAND [options]``.

Ranks 0 and 1 seem to be on host0, ranks 2 and 3 on host1.
"""

import os
import platform
import sys

from mpi4py import MPI

import cupybn
from cupybn.cli import hosts, main, selftest
from cupybn.communicators import mpi

fault, *arguments = sys.argv[1:]
rank = MPI.COMM_WORLD.rank
platform.node = lambda: f"host{rank // 2}"
if fault == "different":
    if rank == 3:
        platform.python_version = lambda: "3.99"
        hosts.__version__ = cupybn.__version__ + ".other"
    if rank // 2:
        os.environ |= {"CUPYBN_TIMEOUT": "77", "CUPYBN_CUDA_AWARE_MPI": "1"}
if fault == "protocols" and rank == 3:
    mpi.PROTOCOL = 9
    os.environ["CUPYBN_TIMEOUT"] = "soon"
crowded = [{0}, {0}, {5}, {6}]  # the ranks of host1 are bound to a core each
os.sched_getaffinity = lambda pid: crowded[rank] if fault == "crowded" else set(range(8))
if fault == "crowded":
    selftest.check_latency = lambda setup, channels: 7300.0 if rank == 1 else 5.0
sys.exit(main(arguments))
