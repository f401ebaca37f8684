"""``python -m cupybn bench``: where the library stands on this machine. It measures, and judges
nothing.

    python -m cupybn bench                          what this machine can do, some minutes
    python -m cupybn bench --quick                  well under a minute
    python -m cupybn bench --cpu --full             all shapes
    python -m cupybn bench --gpu --json gpu.json --plot gpu.png
    python -m cupybn bench --comm --ranks 1,2,4     or under mpiexec -n 4
    python -m cupybn bench --overhead --memory

Each section says in its module what it measures and how. In all of them what is compared takes
turns, repetition by repetition, and figures are medians. The JSON file is written again after
every case, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ..launch import launched_processes

SECTIONS = {
    "cpu": "the CPU backends beside PyTorch on the CPU",
    "gpu": "CuPy arrays beside PyTorch's CUDA paths, and the copy rate",
    "comm": "messages between ranks; under mpiexec, or with --ranks",
    "overhead": "what a call on a tiny tensor costs, and where it goes",
    "memory": "peak memory of forward and backward",
}
DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("rows", "columns")
BACKENDS = ("numpy", "numba")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sections; without one, those that this machine can do")
    for name, text in SECTIONS.items():
        add.add_argument(f"--{name}", action="store_true", help=text)
    add = parser.add_argument_group("all sections")
    add.add_argument("--quick", action="store_true", help="few cases, few repetitions")
    add.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    add.add_argument("--plot", type=Path, metavar="FILE.png",
                     help="a picture; of several sections FILE-SECTION.png each")  # fmt: skip
    add.add_argument("--repeat", type=_positive, default=20, help="repetitions, 20")
    add.add_argument("--seconds", type=float, default=4.0,
                     help="after which a case on the CPU gets no more repetitions, 4")  # fmt: skip
    add.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    add = parser.add_argument_group("--cpu and --gpu")
    add.add_argument("--full", action="store_true", help="every shape, batch, dtype and layout")
    add.add_argument("--shapes", nargs="+", type=_shape, metavar="NxCxHxW", help="these only")
    add.add_argument("--dtypes", nargs="+", choices=DTYPES)
    add.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    add.add_argument("--batches", nargs="+", type=_positive, help="N of the ResNet-50 shapes")
    add.add_argument("--only", nargs="+", choices=["resnet", "odd"], help="groups of shapes")
    add.add_argument("--paths", nargs="+", help="what to measure of the columns of the table")
    add.add_argument("--threads", nargs="+", type=_positive, help="CPU: one, and all cores")
    add.add_argument("--backend", nargs="+", help="CPU backends to measure; all there are")
    add = parser.add_argument_group("--comm")
    add.add_argument("--ranks", type=_ranks, metavar="1,2,4",
                     help="starts mpiexec for each of these numbers of ranks")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    chosen = [name for name in SECTIONS if getattr(args, name)]
    launched = launched_processes() > 1
    left_out: dict[str, str] = {}
    if not chosen:
        left_out = {"comm": "it is measured between ranks: mpiexec -n 2 python -m cupybn bench "
                            "--comm, or bench --comm --ranks 1,2,4"}  # fmt: skip
        chosen = ["cpu", "overhead", "memory"]
        if reason := _no_gpu():
            left_out["gpu"] = reason
        else:
            chosen.insert(1, "gpu")
        if launched or args.ranks:
            left_out = dict.fromkeys(chosen, "they are measured in one process, without mpiexec")
            chosen = ["comm"]
    if problem := _problem(args, chosen, launched):
        print(f"python -m cupybn bench: {problem}", file=sys.stderr)
        return 2
    from .report import Report

    report = Report(args, speaks="comm" not in chosen or _speaks(args))
    report.head(left_out)
    for name in chosen:
        import_module(f".{name}", __name__).measure(args, report)
        report.flush()
        if args.plot is not None and report.speaks:
            from . import pictures

            path = args.plot
            if len(chosen) > 1:
                path = path.with_name(f"{path.stem}-{name}{path.suffix}")
            pictures.draw(name, report.sections[name], report.environment, path)
            report.say(f"wrote {path}")
    return 0


def _problem(args: argparse.Namespace, chosen: list[str], launched: bool) -> str | None:
    """Why this cannot be measured, in words for the user."""
    if launched and chosen != ["comm"]:
        return "under mpiexec only --comm can be measured"
    if launched and args.ranks:
        return "--ranks starts mpiexec itself: call it without mpiexec, or leave --ranks out"
    if unknown := sorted(set(args.backend or ()) - set(BACKENDS)):
        return f"--backend must be of {', '.join(BACKENDS)}, got {', '.join(unknown)}"
    for file in (args.json, args.plot):
        if file is not None and not file.parent.is_dir():
            return f"{file} cannot be written: {file.parent} is no folder"
    if args.plot is not None and find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install 'cupybn[bench]'"
    if "gpu" in chosen and (reason := _no_gpu()):
        return f"--gpu: {reason}"
    if "comm" in chosen and not args.ranks and (reason := _no_mpi()):
        return f"--comm: {reason}"
    return None


def _no_gpu() -> str | None:
    from ...arrays import check_device
    from ...errors import DeviceError

    try:
        check_device("cuda")
    except DeviceError as error:
        return str(error)
    return None


def _no_mpi() -> str | None:
    from ...communicators.mpi import load_mpi

    try:
        load_mpi()
    except RuntimeError as error:
        return str(error)
    return None


def _speaks(args: argparse.Namespace) -> bool:
    """Whether this process prints; asking starts MPI."""
    if args.ranks:
        return True
    from ...communicators.mpi import load_mpi

    return int(load_mpi().COMM_WORLD.rank) == 0


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text!r}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(map(_positive, text.split("x")))
    if len(shape) < 2:
        raise argparse.ArgumentTypeError(f"must look like 32x64x56x56, got {text!r}")
    return shape


def _ranks(text: str) -> list[int]:
    return [_positive(number) for number in text.split(",")]
