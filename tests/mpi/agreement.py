"""What the ranks of a new communicator agree on: ``agreement.py CASE``. The last rank differs.

The ranks seem to be on hosts of their own, host0, host1 ...
"""

import os
import platform
import sys
import warnings

import numpy as np
from mpi4py import MPI

import cupybn
from cupybn.communicators import MpiCommunicator, mpi
from cupybn.communicators.watchdog import watchdog

world = MPI.COMM_WORLD
rank, size = world.rank, world.size
last = rank == size - 1
platform.node = lambda: f"host{rank}"


def raised(call, *args, **options):
    try:
        call(*args, **options)
    except Exception as error:
        return error
    return None


def check_versions(error, theirs):
    assert type(error) is cupybn.CollectiveMismatchError, repr(error)
    first, *lines = str(error).splitlines()
    assert "the ranks run versions of cupybn that do not understand each other" in first
    own = [f"  rank {i}: cupybn {cupybn.__version__}, protocol 1, host{i}" for i in range(size - 1)]
    assert lines == [*own, f"  rank {size - 1}: {theirs}"], lines


def another_protocol():
    if last:
        mpi.PROTOCOL, mpi.__version__ = 7, "9.9"
    error = raised(MpiCommunicator, world)
    check_versions(error, f"cupybn 9.9, protocol 7, host{size - 1}")
    # A rank that also has a bad argument hears of the versions first, as the others do.
    error = raised(MpiCommunicator, world, timeout=-1 if last else None)
    check_versions(error, f"cupybn 9.9, protocol 7, host{size - 1}")
    layer = cupybn.SyncBatchNorm(3)
    before = layer.state_dict()["running_mean"].tobytes()
    check_versions(raised(layer.forward, np.ones((2, 3), "f")), "cupybn 9.9, protocol 7, " + node())
    assert layer.running_mean.tobytes() == before


def node():
    return f"host{size - 1}"


def frozen():
    """The last rank is a version of the future, which has only this in common with today's.

    What it sends may never change: not the length, not the dtype, not the operations.
    """
    if not last:
        check_versions(raised(MpiCommunicator, world), "cupybn 3000, protocol 99, in the future")
        return
    dup = world.Dup()
    words = np.full(16, -5, np.int64)
    words[:2] = 99, -99
    dup.Allreduce(MPI.IN_PLACE, words, MPI.MIN)
    assert words[0] == 1
    assert words[1] == -99
    mine = np.zeros(256, np.uint8)
    text = b"cupybn 3000, protocol 99, in the future"
    mine[: len(text)] = list(text)
    table = np.zeros((size, 256), np.uint8)
    dup.Allgather(mine, table)
    texts = [bytes(line).rstrip(b"\0").decode() for line in table]
    expected = [f"cupybn {cupybn.__version__}, protocol 1, host{i}" for i in range(size - 1)]
    assert texts[:-1] == expected


def timeouts():
    def make(seconds, expected, shown, by_variable=False):
        options = {"timeout": seconds}
        if by_variable:
            os.environ["CUPYBN_TIMEOUT"], options = str(seconds), {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            comm = MpiCommunicator(world, **options)
        assert comm.timeout == expected, (comm.timeout, expected)
        assert comm._watch.timeout == (expected or np.inf)
        assert not expected or comm._watch in watchdog
        assert comm.allreduce(np.ones(1))[0] == size
        told = [str(warning.message) for warning in caught]
        if rank or shown is None:
            assert told == []
        else:
            (text,) = told
            first, *lines = text.splitlines()
            assert "the ranks have different timeouts, and all take the longest" in first
            others = [f"  rank {i}: {shown[0]}, host{i}" for i in range(size - 1)]
            assert lines == [*others, f"  rank {size - 1}: {shown[1]}, {node()}"], lines

    for by_variable in (False, True):
        make(30, 30, None, by_variable)
        make(31.5 if last else 30, 31.5, ("30 s", "31.5 s"), by_variable)
        make(30 if last else 1e9 + 0.1, 1e9 + 0.1, ("1e+09 s", "30 s"), by_variable)
        make(0 if last else 30, 0, ("30 s", "no limit"), by_variable)
        make(30 if last else 0, 0, ("no limit", "30 s"), by_variable)
        make(0, 0, None, by_variable)
    warnings.simplefilter("error")  # what rank 0 thinks of warnings is its own affair
    assert MpiCommunicator(world, timeout=30 + rank).timeout == 30 + size - 1
    # A rank whose timeout cannot be read has none to be compared with.
    error = raised(MpiCommunicator, world, timeout=-1 if last else 30)
    assert type(error) is (ValueError if last else cupybn.PeerError)


{"another protocol": another_protocol, "frozen": frozen, "timeouts": timeouts}[sys.argv[1]]()
