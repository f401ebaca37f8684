"""A synchronised step over MPI.COMM_WORLD beside a bare Allreduce of the same message, us.

For each C, on NumPy arrays of (8, C): `bare`, ``Allreduce(MPI.IN_PLACE, ...)`` of as many bytes as
cupybn's message has; `allreduce`, the same through ``MpiCommunicator.allreduce``, whose watchdog
`no watchdog` leaves out (``timeout=0``); `forward` and `backward` of a SyncBatchNorm, one message
each; `local`, forward and backward of a BatchNorm. All take turns in one run, in blocks between
barriers; a block's time is that of its slowest rank, and the figures are medians of blocks.
`step 20 %` is the bound of the fastest fifth of them, which a busy machine disturbs less; the JSON
file has it of all. `limit` is what we aim at for a step: 4 bare Allreduces and 25 us. With one rank
nothing is sent.

Where the machine has a core for each rank, each is bound to one, unless the launcher did that.
`functions` are those of cupybn and NumPy that a step enters.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from typing import Any

import numpy as np

import cupybn
from cupybn.communicators import MpiCommunicator

from .machine import launched
from .overhead import entered
from .report import Report
from .timing import Parts, interleave, turn_of

CHANNELS = (16, 64, 256, 2048)
_SAMPLES = 8
_MESSAGES, _PYTHON = 4, 25.0  # what we aim at: so many bare Allreduces, and microseconds


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("comm", "messages between ranks, us")
    ranks = Ranks()
    section |= ranks.described()
    report.say(f"{section['ranks']} rank(s) on {section['hosts']} host(s), {section['library']}")
    # Short blocks, of which the scheduler lets many through undisturbed.
    rounds, calls = (20, 10) if args.quick else (10 * args.repeat, 20)
    if ranks.crowded:  # here none
        report.say("more ranks than cores: each message waits for the scheduler as well")
        rounds, calls = rounds // 4, 5
    section["messages"] = records = []
    for channels in report.progress(CHANNELS, unit="message"):
        records.append(found := ranks.record(channels, rounds, calls))
        report.flush()
        limit = _MESSAGES * found["us"]["bare"] + _PYTHON
        fifth = found["fastest fifth us"]["step"]
        columns = {"bytes": found["bytes"], **found["us"], "step 20 %": fifth, "limit": limit}
        report.row(f"C = {channels}", columns | {"functions": found["functions"]})


class Recorder:
    """A communicator that notes the bytes of its messages."""

    def __init__(self, comm: MpiCommunicator) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.bytes: list[int] = []

    def allreduce(self, message: Any, label: str = "") -> Any:
        self.bytes.append(message.nbytes)
        return self.comm.allreduce(message, label)


class Ranks:
    """The ranks of COMM_WORLD, and what they do together."""

    def __init__(self) -> None:
        self.mpi = import_module("mpi4py.MPI")
        self.world = self.mpi.COMM_WORLD
        if launched() and self.world.size == 1:
            raise SystemExit("mpiexec belongs to another MPI than the library that mpi4py loaded")
        self.watched = MpiCommunicator(self.world, timeout=600)
        self.unwatched = MpiCommunicator(self.world, timeout=0)
        self.bare = self.world.Dup()
        self.node = self.world.Split_type(self.mpi.COMM_TYPE_SHARED)
        bind(self.node)
        crowded = self.node.size > (os.cpu_count() or 1)
        self.crowded = bool(self.world.allreduce(crowded, self.mpi.LOR))

    def described(self) -> dict[str, Any]:
        hosts = self.world.allreduce(int(self.node.rank == 0))
        library = " ".join(self.mpi.Get_library_version().splitlines()[0].split()).rstrip("\0, ")
        return {"ranks": self.world.size, "hosts": hosts, "library": library}

    def record(self, channels: int, rounds: int, calls: int) -> dict[str, Any]:
        """All figures of messages of so many channels, the same on every rank."""
        size = self.message_bytes(channels)
        paths = self.paths(channels, size)
        turns = {name: turn_of(parts, ready=self.world.Barrier) for name, parts in paths.items()}
        blocks: dict[str, Any] = {}
        for name, parts in interleave(turns, rounds, calls=calls).items():
            own = np.array([*parts.values()]) * 1e6
            slowest = np.vstack([own, own.sum(axis=0)])
            self.world.Allreduce(self.mpi.IN_PLACE, slowest, self.mpi.MAX)
            if name == "step":
                blocks |= dict(zip(parts, slowest[:-1], strict=True))
            blocks[name] = slowest[-1]
        functions = entered(lambda: [call() for call in paths["step"].values()])
        return {
            "channels": channels,
            "bytes": size,
            "functions": functions.total(),
            "us": {name: float(np.median(times)) for name, times in blocks.items()},
            "fastest fifth us": {n: float(np.percentile(t, 20)) for n, t in blocks.items()},
        }

    def message_bytes(self, channels: int) -> int:
        """Of the message of a forward, and of a backward, which is as long."""
        recorder = Recorder(self.watched)
        for call in step(cupybn.SyncBatchNorm(channels, comm=recorder), channels).values():
            call()
        return max(recorder.bytes, default=0)

    def paths(self, channels: int, size: int) -> dict[str, Parts]:
        buffer = np.zeros(size // 8)
        return {
            "bare": {"call": lambda: self.bare.Allreduce(self.mpi.IN_PLACE, buffer)},
            "allreduce": {"call": lambda: self.watched.allreduce(buffer, "bench")},
            "no watchdog": {"call": lambda: self.unwatched.allreduce(buffer, "bench")},
            "step": step(cupybn.SyncBatchNorm(channels, comm=self.watched), channels),
            "local": step(cupybn.BatchNorm1d(channels), channels),
        }


def step(layer: Any, channels: int) -> Parts:
    """Forward and backward of a layer."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, _SAMPLES, channels), np.float32)
    return {"forward": lambda: layer.forward(x), "backward": lambda: layer.backward(dy)}


def bind(node: Any) -> None:
    """This rank to a core of its own among those of its machine, if there is one for each."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= node.size > 1:
        os.sched_setaffinity(0, {cores[node.rank]})
