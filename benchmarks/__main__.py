"""``python -m benchmarks``: where the library stands on this machine. It measures, and judges
nothing.

    python -m benchmarks                            what this machine can do, some minutes
    python -m benchmarks --quick                    well under a minute
    python -m benchmarks cpu --threads 2 --plot cpu.png
    python -m benchmarks cpu --against ../before    beside another checkout of cupybn
    python -m benchmarks gpu overhead memory --json gpu.json
    mpiexec -n 2 python -m mpi4py -m benchmarks comm

Each section says in its module what it measures and how. In all of them what is compared takes
turns, repetition by repetition, and figures are medians. The JSON file is written again after
every case, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from . import DTYPES, LAYOUTS, SECTIONS, machine


def main(argv: list[str] | None = None) -> int:
    """Runs the sections in argv; returns the exit code."""
    parser = argument_parser()
    args = parser.parse_args(argv)
    # Read when NumPy, PyTorch and Numba are imported, which is after this.
    for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        os.environ[f"{name}_NUM_THREADS"] = str(args.threads)
    if not args.sections and machine.launched():
        args.sections = ["comm"]
    elif not args.sections:
        args.sections = ["cpu", "overhead", "memory", *([] if machine.no_gpu() else ["gpu"])]
    if problem := problem_with(args):
        parser.error(problem)
    from .report import Report

    report = Report(args)
    for name in args.sections:
        import_module(f".{name}", __package__).measure(args, report)
        report.flush()
    report.draw(args.plot)
    return 0


def argument_parser() -> argparse.ArgumentParser:
    sections = "; ".join(f"{name}: {text}" for name, text in SECTIONS.items())
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=sections)
    add = parser.add_argument
    here = f"{', '.join(SECTIONS)}; without one, those that this machine can do"
    add("sections", nargs="*", type=_section, metavar="SECTION", help=here)
    add("--quick", action="store_true", help="few cases, few repetitions")
    add("--json", type=Path, metavar="FILE", help="all figures")
    add("--plot", type=Path, metavar="FILE.png", help="bars of the ratios to PyTorch")
    add("--repeat", type=_positive, default=20, help="repetitions, 20")
    add("--seconds", type=float, default=3.0, help="after which a case on the CPU has enough, 3")
    add("--threads", type=_positive, default=1, help="of everything on the CPU, 1")
    add("--paths", nargs="+", help="cpu, gpu: what to measure of the columns of the table")
    add("--shapes", nargs="+", type=_shape, metavar="NxCxHxW", help="cpu, gpu: these only")
    batches = "cpu, gpu: the 12 shapes of ResNet-50 with so many samples"
    add("--batches", nargs="+", type=_positive, metavar="N", help=batches)
    add("--dtypes", nargs="+", choices=DTYPES, help="cpu, gpu: these only")
    add("--layouts", nargs="+", choices=LAYOUTS, help="cpu, gpu: these only")
    add("--against", type=Path, metavar="CHECKOUT", help="cpu: another version, in turns with this")
    return parser


def problem_with(args: argparse.Namespace) -> str | None:
    """Why this cannot be measured, in words for the user."""
    if machine.launched() and args.sections != ["comm"]:
        return "under mpiexec only comm can be measured"
    for file in (args.json, args.plot):
        if file is not None and not file.parent.is_dir():
            return f"{file} cannot be written: {file.parent} is no folder"
    if args.plot is not None and find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install 'cupybn[bench]'"
    if args.against is not None and not (args.against / "cupybn" / "__init__.py").is_file():
        return f"--against: {args.against} is no checkout of cupybn"
    for name, reason in (("gpu", machine.no_gpu), ("comm", machine.no_mpi)):
        if name in args.sections and (text := reason()):
            return f"{name}: {text}"
    return None


def _section(text: str) -> str:
    if text not in SECTIONS:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(SECTIONS)}, got {text!r}")
    return text


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


if __name__ == "__main__":
    sys.exit(main())
