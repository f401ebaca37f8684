"""A synchronised step over MPI.COMM_WORLD beside a bare Allreduce of the same message, us.

For each C, on NumPy arrays of (8, C): `bare`, ``Allreduce(MPI.IN_PLACE, ...)`` of as many bytes as
cupybn's message has; `allreduce`, the same through ``MpiCommunicator.allreduce``, whose watchdog
`no watchdog` leaves out (``timeout=0``); `forward` and `backward` of a SyncBatchNorm, one message
each; `local`, forward and backward of a BatchNorm. All take turns in one run, in blocks between
barriers; a block's time is that of its slowest rank, and the figures are medians of blocks.
`step 20 %` is the bound of the fastest fifth of them, which a busy machine disturbs less. `limit`
is the aim for a step: 4 bare Allreduces and 25 us. `functions` are those of cupybn and NumPy
that a step enters. With one rank nothing is sent.

With ``--device cuda`` on CuPy arrays, by each transport that there is: `allreduce` of a message,
`step` of a SyncBatchNorm, `local`, and `extra`, what a direction of the synchronised layer takes
more than one of the local layer. A block ends when the device has done its work.

Where the machine has a core for each rank, each is bound to one, unless the launcher did that.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from mpi4py import MPI

import cupybn
from cupybn.communicators import MpiCommunicator
from cupybn.launcher import singleton

from .costs import entered
from .report import Report
from .timing import Parts, Turn, interleave, turn_of

WORLD = MPI.COMM_WORLD
_SAMPLES = 8


def measure_comm(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("comm", f"messages between ranks, {args.device}, us")
    if problem := singleton(WORLD.size):
        raise SystemExit(problem)
    node = WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    bind(node)
    library = MPI.Get_library_version().splitlines()[0].rstrip("\0, ")
    section |= {"ranks": WORLD.size, "hosts": WORLD.allreduce(int(node.rank == 0))}
    report.say("{ranks} rank(s) on {hosts} host(s), ".format(**section) + library)
    # Short blocks: the scheduler leaves many of them undisturbed.
    rounds, calls = (20, 10) if args.quick else (10 * args.repeat, 20)
    if WORLD.allreduce(node.size > (os.cpu_count() or 1), MPI.LOR):  # here none
        report.say("more ranks than cores: each message waits for the scheduler as well")
        rounds, calls = rounds // 4, 5
    section["messages"] = records = []
    if args.device == "cuda":
        comms_of_device = transports()
        for channels in (64, 2048):
            records.append(
                {"channels": channels} | on_cuda(channels, comms_of_device, rounds, calls)
            )
            report.flush()
            report.row(f"C = {channels}", records[-1]["us"])
        return
    bare, comms = WORLD.Dup(), [MpiCommunicator(WORLD, timeout=seconds) for seconds in (600, 0)]
    for channels in (16, 64, 256, 2048):
        found = record(channels, bare, comms, rounds, calls)
        records.append({"channels": channels} | found)
        report.flush()
        row = {"bytes": found["bytes"], **found["us"]}
        row |= {"step 20 %": found["fastest fifth us"]["step"], "limit": 4 * row["bare"] + 25}
        report.row(f"C = {channels}", row | {"functions": found["functions"]})


def record(channels: int, bare: Any, comms: Any, rounds: int, calls: int) -> dict[str, Any]:
    """All figures of messages of so many channels, the same on every rank."""
    watched, unwatched = comms
    recorder = Recorder(WORLD)
    step(cupybn.SyncBatchNorm(channels, comm=recorder), channels)["forward"]()
    buffer = np.zeros(recorder.bytes // 8)
    paths: dict[str, Parts] = {
        "bare": {"call": lambda: bare.Allreduce(MPI.IN_PLACE, buffer)},
        "allreduce": {"call": lambda: watched.allreduce(buffer, "bench")},
        "no watchdog": {"call": lambda: unwatched.allreduce(buffer, "bench")},
        "step": step(cupybn.SyncBatchNorm(channels, comm=watched), channels),
        "local": step(cupybn.BatchNorm1d(channels), channels),
    }
    turns = {name: turn_of(parts, WORLD.Barrier) for name, parts in paths.items()}
    blocks = slowest_blocks(turns, rounds, calls)
    return {
        "bytes": recorder.bytes,
        "functions": sum(entered(call).total() for call in paths["step"].values()),
        "us": {name: float(np.median(times)) for name, times in blocks.items()},
        "fastest fifth us": {n: float(np.percentile(t, 20)) for n, t in blocks.items()},
    }


def slowest_blocks(turns: dict[str, Turn], rounds: int, calls: int) -> dict[str, Any]:
    """By path, and by part of the step, us of each block's slowest rank."""
    blocks: dict[str, Any] = {}
    for name, spent in interleave(turns, rounds, calls=calls).items():
        own = np.array([*spent.values()]) * 1e6
        slowest = np.vstack([own, own.sum(axis=0)])
        WORLD.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
        if name == "step":
            blocks |= dict(zip(spent, slowest[:-1], strict=True))
        blocks[name] = slowest[-1]
    return blocks


def transports() -> dict[str, MpiCommunicator]:
    """A communicator for each transport of CuPy arrays that there is."""
    auto = MpiCommunicator(WORLD)
    device = {"device": auto} if auto.transport == "device" else {}
    return device | {"pinned": MpiCommunicator(WORLD, "pinned")}


def on_cuda(channels: int, comms: dict[str, MpiCommunicator], rounds: int, calls: int) -> Any:
    """The figures of arrays on the device, the same on every rank."""
    cupy = import_module("cupy")
    wait = cupy.cuda.Device().synchronize
    message = cupy.zeros(2 * channels + 16)
    on_device = cupybn.BatchNorm1d(channels, device="cuda")
    paths: dict[str, Parts] = {"local": step(on_device, channels, cupy.asarray)}
    for name, comm in comms.items():
        paths[f"allreduce {name}"] = {"call": partial(comm.allreduce, message, "bench")}
        layer = cupybn.SyncBatchNorm(channels, comm=comm, device="cuda")
        paths[f"step {name}"] = step(layer, channels, cupy.asarray)

    def together() -> None:
        wait()
        WORLD.Barrier()

    turns = {name: turn_of(parts, together, wait) for name, parts in paths.items()}
    interleave(turns, 2, calls=calls)
    blocks = slowest_blocks(turns, rounds, calls)
    us = {name: float(np.median(times)) for name, times in blocks.items()}
    extra = {f"extra {name}": (us[f"step {name}"] - us["local"]) / 2 for name in comms}
    return {"bytes": message.nbytes, "us": us | extra}


class Recorder(MpiCommunicator):
    """Notes the bytes of its last message; all of a layer are as long."""

    bytes = 0

    def allreduce(self, message: Any, label: str = "") -> Any:
        self.bytes = message.nbytes
        return super().allreduce(message, label)


def step(layer: Any, channels: int, place: Callable[[Any], Any] = np.asarray) -> Parts:
    """Forward and backward of a layer, on arrays that `place` makes from NumPy arrays."""
    rng = np.random.default_rng(0)
    x, dy = map(place, rng.standard_normal((2, _SAMPLES, channels), np.float32))
    return {"forward": lambda: layer.forward(x), "backward": lambda: layer.backward(dy)}


def bind(node: Any) -> None:
    """Binds this rank to a core of its own, if its machine has one for each rank."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) >= node.size > 1:
        os.sched_setaffinity(0, {cores[node.rank]})
