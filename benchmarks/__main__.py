"""``python -m benchmarks``: measures the library on this machine, beside others. It judges nothing.

    python -m benchmarks                            what this machine can do, some minutes
    python -m benchmarks --quick                    well under a minute
    python -m benchmarks cpu --threads 2 --plot cpu.png
    python -m benchmarks --of bench.json --plot cpu.png
    python -m benchmarks cpu --against ../before    beside another checkout of cupybn
    python -m benchmarks gpu overhead memory --json gpu.json
    python -m benchmarks kernels                    each kernel by itself, and variants
    mpiexec -n 2 python -m mpi4py -m benchmarks comm
    mpiexec -n 2 python -m mpi4py -m benchmarks comm --device cuda

Each section's module says what it measures. The compared take turns, repetition by repetition, and
figures are medians. The JSON file is written again after every case.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from . import DTYPES, LAYOUTS, SECTIONS


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    # Read when NumPy, PyTorch, Numba and XLA are imported, which is after this.
    for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        os.environ[f"{name}_NUM_THREADS"] = str(args.threads)
    os.environ["NPROC"] = str(args.threads)
    if problem := problem_with(args):
        parser.error(problem)
    from .report import Report, draw

    if args.of is not None:
        draw(json.loads(args.of.read_text(encoding="utf-8")), args.plot)
        return
    try:
        modules = [import_module(f".{SECTIONS[name]}", __package__) for name in args.sections]
    except (ImportError, RuntimeError) as error:  # of mpi4py, without an MPI library
        parser.error(str(error))
    report = Report(args)
    for name, module in zip(args.sections, modules, strict=True):
        getattr(module, f"measure_{name}")(args, report)
        report.flush()
    report.draw(args.plot)


def argument_parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", None, __doc__, formatter_class=text)
    add = parser.add_argument
    here = f"{', '.join(SECTIONS)}; without one, those that can be measured here"
    add("sections", nargs="*", metavar="SECTION", help=here)
    add("--quick", action="store_true", help="few cases, few repetitions")
    add("--json", type=Path, metavar="FILE", help="all figures")
    add(
        "--plot", type=Path, metavar="FILE.png", help="bars of the ratios to the best of the others"
    )
    add("--of", type=Path, metavar="FILE", help="draw what an earlier run wrote; measures nothing")
    add("--repeat", type=int, default=20, help="repetitions, 20")
    add("--threads", type=int, default=1, help="of everything on the CPU, 1")
    add("--paths", nargs="+", help="cpu, gpu: what to measure of the columns of the table")
    add("--shapes", nargs="+", metavar="NxCxHxW", help="cpu, gpu: these only")
    batches = "cpu, gpu: the 12 shapes of ResNet-50 with so many samples"
    add("--batches", nargs="+", type=int, metavar="N", help=batches)
    add("--dtypes", nargs="+", choices=DTYPES, help="cpu, gpu: these only")
    add("--layouts", nargs="+", choices=LAYOUTS, help="cpu, gpu: these only")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="comm: of the arrays, cpu")
    add("--against", type=Path, metavar="CHECKOUT", help="cpu: another version, in turns with this")
    return parser


def problem_with(args: argparse.Namespace) -> str | None:
    """Why this cannot be measured, for the user; chooses the sections if none is given."""
    from .report import launched, no_gpu

    if not args.sections and launched():
        args.sections = ["comm"]
    elif not args.sections:
        args.sections = ["cpu", "overhead", "memory", *([] if no_gpu() else ["gpu"])]
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        return f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}"
    if launched() and args.sections != ["comm"]:
        return "under mpiexec only comm can be measured"
    if min(args.repeat, args.threads, *(args.batches or [1])) < 1:
        return "--repeat, --threads and --batches must be at least 1"
    for text in args.shapes or []:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
            return f"--shapes: must look like 32x64x56x56, got {text!r}"
    for file in (args.json, args.plot):
        if file is not None and not file.parent.is_dir():
            return f"{file} cannot be written: {file.parent} is no folder"
    if args.of is not None and (args.plot is None or not args.of.is_file()):
        return f"--of {args.of}: a file of --json, and --plot says where the picture goes"
    if args.plot is not None and find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install matplotlib"
    if args.against is not None and not (args.against / "cupybn" / "__init__.py").is_file():
        return f"--against: {args.against} is no checkout of cupybn"
    on_gpu = [name for name in args.sections if name in ("gpu", "kernels")]
    return f"{on_gpu[0]}: {text}" if on_gpu and (text := no_gpu()) else None


if __name__ == "__main__":
    main()
