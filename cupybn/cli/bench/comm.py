"""Messages between ranks: cupybn's beside a bare Allreduce, and the all_gather that PyTorch uses.

Over ``MPI.COMM_WORLD``, on NumPy arrays. For each number of channels, forward and backward:

* `allreduce`: ``Allreduce(MPI.IN_PLACE, ...)`` of as many bytes as cupybn's message has;
* `cupybn`: all that a layer does between its two passes over the data: the joint call, fingerprint,
  message, allreduce under the watchdog, header; `no watchdog`: the same with ``timeout=0``;
* `gather`: forward, an Allgather of mean, invstd and count in float32 and the merging of them in
  NumPy; backward, an Allreduce of 2 C float32 numbers, as ``torch.nn.SyncBatchNorm`` does it.

All take turns in one run, in blocks between barriers; a block's time is that of its slowest rank,
and the figures are medians of blocks; the JSON file also has the bound of the fastest fifth of
them, which a busy machine disturbs less. `limit` is 1.25 times the bare Allreduce plus 15 us: what
we aim at. With one rank cupybn sends nothing.

`watchdog` is what the timeout costs a ``MpiCommunicator.allreduce`` at C = 64: what a call takes
longer with a timeout than without, and what it writes down for the watchdog in either case, which
is timed by itself.

The table of the model says what the alpha-beta model expects for up to 4096 ranks, with alpha and
beta fitted to the fastest fifths of the bare Allreduces, and with those of a cluster. It is a
model: only the merging of gathered statistics is measured here, with that many ranks' statistics
made up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np

from ...arrays import Array
from ...communicators.mpi import MpiCommunicator, load_mpi
from ...communicators.watchdog import Watch
from ...joint import Started, Steps, joint
from ...passes import joint_pass
from ...statistics import message_length
from ..launch import library_version, strangers
from . import scaling
from .model import message_bytes
from .report import Report, Table
from .timing import Times, interleave

CHANNELS = (64, 256, 2048)
PATHS = ("allreduce", "cupybn", "no watchdog", "gather")
_SETTINGS = "C=64, eps=1e-05, float32, weight=True, bias=True, activation=None, momentum=0.1"
_FACTOR, _PYTHON = 1.25, 15.0  # what we aim at, microseconds


def measure(args: argparse.Namespace, report: Report) -> None:
    section = report.begin("comm", "messages between ranks, us")
    if args.ranks:
        from .mpiexec import run_under_mpiexec

        section["runs"] = runs = []
        for ranks in args.ranks:
            runs.append(run_under_mpiexec(ranks, args))
            say_run(report, runs[-1])
            report.flush()
    else:
        section["runs"] = runs = [one_run(args, report)]
        say_run(report, runs[-1])
    if report.speaks:
        section["model"] = scaling.model(runs, quick=args.quick)
        scaling.say_model(report, section["model"])


def one_run(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    """The figures of the ranks that take part in this; the same on all of them."""
    mpi = load_mpi()
    world = mpi.COMM_WORLD
    ranks = Ranks(mpi)
    # Short blocks, of which the scheduler lets many through undisturbed.
    rounds, calls = (20, 10) if args.quick else (10 * args.repeat, 20)
    if ranks.crowded:  # here none
        rounds, calls = rounds // 4, 5
    found: dict[str, Any] = {
        "ranks": world.size, "cores": ranks.cores, "hosts": ranks.hosts,
        "crowded": ranks.crowded, "library": library_version(mpi),
        "rounds": rounds, "calls": calls, "messages": [],
    }  # fmt: skip
    messages = [(c, way) for c in CHANNELS for way in ("forward", "backward")]
    for channels, way in report.progress(messages, unit="message"):
        paths = {name: {"call": call} for name, call in ranks.paths(channels, way).items()}
        blocks = ranks.slowest(interleave(paths, rounds, calls=calls, before=world.Barrier))
        found["messages"].append({
            "channels": channels, "direction": way, "bytes": message_bytes(channels),
            "us": _at(blocks, 50), "fastest fifth us": _at(blocks, 20),
        })  # fmt: skip
    paths = {name: {"call": call} for name, call in ranks.allreduces(64).items()}
    blocks = ranks.slowest(interleave(paths, 3 * rounds, calls=calls, before=world.Barrier))
    times = _at(blocks, 50)
    # What a call writes down for the watchdog it writes with and without a timeout.
    cost = times["with timeout"] - times["without timeout"] + _writing_down()
    found["watchdog"] = {
        "us": times, "cost us": cost, "percent": 100 * cost / times["without timeout"]
    }  # fmt: skip
    return found


class Ranks:
    """The ranks of COMM_WORLD, and what they can do together."""

    def __init__(self, mpi: Any) -> None:
        self.mpi, self.world = mpi, mpi.COMM_WORLD
        if (problem := strangers(self.world.size)) is not None:
            raise SystemExit(f"python -m cupybn bench: {problem}")
        self.watched = MpiCommunicator(self.world, timeout=600)
        self.unwatched = MpiCommunicator(self.world, timeout=0)
        self.bare = self.world.Dup()
        node = self.world.Split_type(mpi.COMM_TYPE_SHARED)
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        self.hosts = self.world.allreduce(int(node.rank == 0))
        crowded = bool(self.cores and self.world.allreduce(node.size, mpi.MAX) > _all_cores())
        self.crowded = bool(self.world.allreduce(crowded, mpi.LOR))

    def slowest(self, times: Times) -> dict[str, Array]:
        """{path: microseconds of a call, for each block}: those of the block's slowest rank."""
        found = {}
        for name, parts in times.items():
            found[name] = np.array(parts["call"]) * 1e6
            self.world.Allreduce(self.mpi.IN_PLACE, found[name], self.mpi.MAX)
        return found

    def paths(self, channels: int, way: str) -> dict[str, Callable[[], Any]]:
        buffer = np.zeros(message_length(channels))
        calls = {
            "allreduce": lambda: self.bare.Allreduce(self.mpi.IN_PLACE, buffer),
            "cupybn": self._message(self.watched, channels, way),
            "no watchdog": self._message(self.unwatched, channels, way),
        }
        if way == "forward":
            return calls | {"gather": self._gather(channels)}
        sums = np.zeros(2 * channels, np.float32)
        return calls | {"gather": lambda: self.bare.Allreduce(self.mpi.IN_PLACE, sums)}

    @staticmethod
    def _message(comm: MpiCommunicator, channels: int, way: str) -> Callable[[], Array]:
        data, numbers = np.zeros((1, channels, 1), np.float32), np.zeros(2 * channels)

        def steps(joined: joint) -> Steps[Array]:
            joined.agree(_SETTINGS)
            payload = joined.payload(data, 2 * channels)
            if payload is None:
                return numbers
            payload[...] = numbers
            _, total = yield 1000, 2 * channels
            return total

        def call() -> Array:
            joined = joint_pass(comm, way, "features.bn1", channels)
            return Started(joined, steps(joined)).run()

        return call

    def _gather(self, channels: int) -> Callable[[], Array]:
        own = np.ones(2 * channels + 1, np.float32)
        table = np.empty((self.world.size, own.size), np.float32)

        def call() -> Array:
            self.bare.Allgather(own, table)
            return scaling.merge(table, channels)

        return call

    def allreduces(self, channels: int) -> dict[str, Callable[[], Any]]:
        buffer = np.zeros(message_length(channels))
        return {
            "bare": lambda: self.bare.Allreduce(self.mpi.IN_PLACE, buffer),
            "with timeout": lambda: self.watched.allreduce(buffer, "bench"),
            "without timeout": lambda: self.unwatched.allreduce(buffer, "bench"),
        }


def _at(blocks: dict[str, Array], percent: float) -> dict[str, float]:
    return {name: float(np.percentile(times, percent)) for name, times in blocks.items()}


def _writing_down() -> float:
    """Microseconds for which a call writes to its ``Watch``."""
    names = {"watch": Watch("", 0, print), "label": "forward of 'layer'"}
    marks = "watch.sequence += 1; watch.label = label; watch.label = None"
    loops = 20_000
    marked, empty = (
        statistics.median(timeit.repeat(statement, globals=names, number=loops, repeat=7))
        for statement in (marks, "pass")
    )
    return (marked - empty) / loops * 1e6


def _all_cores() -> int:
    # A launcher may bind each rank to a core of its own: what counts is what the machine has.
    return os.cpu_count() or 1


def say_run(report: Report, run: dict[str, Any]) -> None:
    report.say(f"\n{run['ranks']} rank(s) on {run['hosts']} host(s), {run['library']}")
    if run["crowded"]:
        report.say("more ranks than cores: each message waits for the scheduler as well")
    table = Table(
        ("C", ">4d"), ("direction", "<9s"), ("bytes", ">6d"),
        *((name, ">9.2f") for name in PATHS), ("limit", ">9.2f"),
        ("cupybn - allreduce", ">8.2f"), ("cupybn / gather", ">6.2f"),
    )  # fmt: skip
    report.say(table.header())
    for message in run["messages"]:
        us = message["us"]
        report.say(table.line(
            message["channels"], message["direction"], message["bytes"],
            *(us[name] for name in PATHS), _FACTOR * us["allreduce"] + _PYTHON,
            us["cupybn"] - us["allreduce"], us["cupybn"] / us["gather"],
        ))  # fmt: skip
    watchdog = run["watchdog"]
    report.say(
        f"watchdog: {watchdog['cost us']:.2f} us, {watchdog['percent']:.1f} % of "
        f"{watchdog['us']['without timeout']:.2f} us without it (C = 64; a bare Allreduce takes "
        f"{watchdog['us']['bare']:.2f} us)"
    )
