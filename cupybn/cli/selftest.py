"""``mpiexec -n 4 python -m cupybn selftest``: do synchronised layers work on these machines?

Rank 0 prints a table of the ranks, and a table of checks with a row for each device and transport.
The exit code is 0 if all is well on every rank, else 1; 124 if a rank did not come, as in any job.
What makes a job slow is a warning.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from .. import __version__
from ..communicators import MpiCommunicator
from ..communicators.base import by_rank
from ..communicators.process import library_version, load_mpi
from ..distributed import local_device
from ..launcher import singleton
from . import hosts
from .selfchecks import (
    Setup,
    check_against_one_process,
    check_bad_input,
    check_latency,
    check_mismatch,
    check_same_bits,
)

_SLOW = 1000.0  # us for a message of C = 64
_TIMEOUT = 120.0  # seconds, where CUPYBN_TIMEOUT does not say: long enough to compile kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    places = "default: the CPU, and CUDA where every rank has a device"
    parser.add_argument("--device", choices=("cpu", "cuda", "all"), default="all", help=places)
    parser.add_argument(
        "--repeat", type=int, default=200, help="messages for a latency (default %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    try:
        world = load_mpi().COMM_WORLD
    except RuntimeError as error:
        print(f"selftest: {error}", file=sys.stderr)
        return 1
    try:
        return _selftest(world, args)
    except Exception:  # whatever it is, the others wait for this rank: shown, and the job ended
        traceback.print_exc()
        sys.stderr.flush()
        world.Abort(1)
        raise


def _selftest(world: Any, args: argparse.Namespace) -> int:
    # Rank 0 speaks for all of them.
    say: Callable[..., Any] = partial(print, flush=True) if world.rank == 0 else lambda *words: None
    if problem := singleton(world.size):
        say(f"FAILED: {problem}")
        return 1
    ranks = world.allgather(hosts.facts(load_mpi()))
    machines = len({rank["host"] for rank in ranks})
    say(
        f"cupybn {__version__} selftest: {world.size} rank{'s' * (world.size > 1)} on {machines} "
        f"machine{'s' * (machines > 1)}, {library_version(load_mpi())}\n"
    )
    say("\n".join([*hosts.table(ranks), ""]))
    make_comm = partial(
        MpiCommunicator, world, timeout=None if os.environ.get("CUPYBN_TIMEOUT") else _TIMEOUT
    )
    problems: list[str] = []
    device, reason = _cuda_device(world) if args.device != "cpu" else (None, "not asked for")
    if args.device == "cuda" and device is None:
        problems.append(f"CUDA: {reason}")
    places = [] if args.device == "cuda" else [("cpu", "host")]
    if device is not None:
        probe = make_comm()
        say(f"CUDA: transport={probe.transport!r} is what CuPy arrays take: {probe.why}")
        aware = ["device"] if probe.transport == "device" else []
        places += [(device, transport) for transport in [*aware, "pinned", "host"]]
    elif args.device == "all":
        say(f"CUDA is not tried: {reason}")
    warnings = hosts.warnings(ranks)
    say("\n" + "  ".join(["device  transport", *_columns(world.size)]))
    for place, transport in places:
        setup = Setup(place, partial(make_comm, transport), max(1, args.repeat))
        cells, failures, slow = _check(world, setup)
        say("  ".join([f"{place:6}  {transport:9}", *cells]))
        problems += [f"{place}, {transport}, {text}" for text in failures]
        warnings += [f"{place}, {transport}: {text}" for text in slow]
    say()
    for warning in warnings:
        say(f"WARNING: {warning}")
    for problem in problems:
        say(f"FAILED: {problem}")
    if not problems:
        say("all is well" + (" (with one rank: try mpiexec -n 4)" if world.size == 1 else ""))
    return int(world.bcast(bool(problems)))


def _check(world: Any, setup: Setup) -> tuple[list[str], list[str], list[str]]:
    """The cells of a row, what went wrong, and messages that take too long."""
    cells, problems, slow = [], [], []
    for name, (check, shown) in _columns(world.size).items():
        worst, failures = _everywhere(world, check, setup)
        problems += [f"{name.strip()}: {text}" for text in failures]
        text = "FAILED" if failures else "-" if worst is None else shown.format(worst)
        cells.append(f"{text:>{len(name)}}")
        if name.strip() == "C = 64" and not failures and worst > _SLOW:
            slow.append(
                f"a message of C = 64 takes {worst:.0f} us; 1 to 100 us are usual within a "
                "machine, up to 1000 over a network. Other load on these machines, more ranks than "
                "cores, or a slow network interface?"
            )
    return cells, problems, slow


def _cuda_device(world: Any) -> tuple[str | None, str]:
    """This rank's device, if every rank has one; else why not."""
    try:
        device, reason = local_device(), ""
    except Exception as error:  # told to all ranks
        device, reason = "", f"{type(error).__name__}: {error}"
    for rank, text in enumerate(world.allgather(reason)):
        if text:
            return None, f"rank {rank}: {text}"
    return device, ""


def _columns(ranks: int) -> dict[str, tuple[Callable[[Setup], Any], str]]:
    """What is checked, by the heading of its column, and how its figure is shown."""
    even = [3] * ranks
    uneven = [3] if ranks == 1 else [0, *(2 + rank % 3 for rank in range(1, ranks))]
    against = check_against_one_process
    return {
        "float32": (partial(against, dtype="float32", sizes=even), "{:.1e}"),
        "float16": (partial(against, dtype="float16", sizes=even), "{:.1e}"),
        "uneven float32": (partial(against, dtype="float32", sizes=uneven), "{:.1e}"),
        "uneven float16": (partial(against, dtype="float16", sizes=uneven), "{:.1e}"),
        "same bits": (check_same_bits, "{}"),
        "mismatch": (check_mismatch, "{}"),
        "bad input": (check_bad_input, "{}"),
        "    C = 64": (partial(check_latency, channels=64), "{:.1f} us"),
        "    C = 2048": (partial(check_latency, channels=2048), "{:.1f} us"),
    }


def _everywhere(world: Any, check: Callable[[Setup], Any], setup: Setup) -> tuple[Any, list[str]]:
    """Runs a check on every rank: the largest result, and what went wrong on which rank."""
    result, fault = None, ""
    try:
        result = check(setup)
    except Exception as error:  # in the table, on all ranks
        fault = f"{type(error).__name__}: {error}"[:600]
    results, faults = zip(*world.allgather((result, fault)), strict=True)
    named = [f"{text} ({who})" for text, who in by_rank(faults).items() if text]
    measured = [result for result in results if result is not None]
    return max(measured, default=None), named
