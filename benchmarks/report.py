"""The machine of this process, and the output of a run: printed, written and drawn."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import cupybn

from .cases import Case

ROOT = Path(__file__).resolve().parent.parent
_LONGEST = 3.0  # a bar that would be longer is cut there and has its number beside it
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # behind numbers, over the line
_OURS = ("numba", "numpy", "cupybn")
_OTHERS = ("torch", "compiled", "jax", "native", "cudnn")
_SHOWN = ("processor", "device", "threads", "cupybn", "torch", "numba", "jax")


def no_gpu() -> str | None:
    """Why nothing can be measured on a GPU."""
    try:
        cupybn.BatchNorm1d(1, device="cuda")
    except cupybn.DeviceError as error:
        return str(error)
    return None


def launched() -> bool:
    """Whether mpiexec says that it started several of these processes."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI
    return any(os.environ.get(name, "1") != "1" for name in names)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """All that the figures depend on, by name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": f"{name[1] if name else platform.processor()}, {cores} cores",
        "threads": args.threads,
        "python": f"{platform.python_version()}, {platform.machine()}",
        "cupybn": f"{cupybn.__version__} {_commit(ROOT)}".strip(),
    }
    if args.against is not None:
        found["before"] = _commit(args.against)
    installed = {d.name.lower(): d.version for d in metadata.distributions()}
    return found | {name: installed.get(name) for name in ("numpy", "numba", "torch", "jax")}


def _commit(checkout: Path) -> str:
    """git's name for the commit of a checkout."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    return found.stdout.strip() if found else ""


class Report:
    """The figures of each section, and their environment. The first rank prints and writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.speaks = not launched() or import_module("mpi4py.MPI").COMM_WORLD.rank == 0
        self.path: Path | None = args.json
        self.sections: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}
        self.add(environment(args))

    def add(self, more: dict[str, Any]) -> None:
        """Adds to the environment, and prints it."""
        self.environment |= more
        for name, value in more.items():
            self.say(f"{name:10}  {'none' if value is None else value}")

    def begin(self, name: str, title: str) -> dict[str, Any]:
        """The dict for the figures of a section, under its printed title."""
        self.titles: list[str] = []
        self.say(f"\n== {title}")
        return self.sections.setdefault(name, {})  # type: ignore[no-any-return]

    def row(self, name: str, values: dict[str, Any], failed: dict[str, str] | None = None) -> None:
        """Prints figures, with titles if these change, and the reasons for missing ones."""
        if list(values) != self.titles:
            self.titles = list(values)
            self.say(" " * 34 + "".join(f"  {title:>8}" for title in values))
        texts = (f"  {written(value):>{max(8, len(title))}}" for title, value in values.items())
        self.say(f"{name:34}{''.join(texts)}")
        for path, reason in (failed or {}).items():
            self.say(f"    {path}: {reason}")

    def say(self, text: str) -> None:
        if self.speaks:
            print(text, flush=True)

    def flush(self) -> None:
        """Writes the JSON file, whole or not at all."""
        if self.path is None or not self.speaks:
            return
        partial = self.path.with_name(self.path.name + ".part")
        everything = {"environment": self.environment, **self.sections}
        partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def draw(self, path: Path | None) -> None:
        """Writes the picture, in the format of the file's name."""
        if path is not None and self.speaks:
            drawn = draw({"environment": self.environment, **self.sections}, path)
            self.say(f"\nwrote {path}" if drawn else "\nno picture: nothing beside PyTorch or JAX")


def draw(run: dict[str, Any], path: Path) -> bool:
    """Draws a run's ratios to the best of the others as bars; False if it has none."""
    bars = bars_of(run)
    if not bars:
        return False
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7.5, 1.7 + 0.17 * len(bars)), layout="constrained")
    cases, names = ([*dict.fromkeys(column)] for column in list(zip(*bars, strict=True))[:2])
    places = [i + 0.7 * cases.index(case) for i, (case, _, _) in enumerate(bars)]
    for name in names:
        own = [(place, x) for place, (_, n, x) in zip(places, bars, strict=True) if n == name]
        lengths = [min(x, _LONGEST) for _, x in own]
        drawn = axes.barh([place for place, _ in own], lengths, 0.9, label=f"cupybn, {name}")
        texts = [f"{x:.2f}" for _, x in own]
        axes.bar_label(drawn, texts, padding=2, fontsize=6, bbox=_WHITE, zorder=4)
    axes.axvline(1, color="black", linewidth=1, zorder=3)
    first = [places[[case for case, _, _ in bars].index(case)] for case in cases]
    axes.set_yticks(first, cases, fontsize=8)
    axes.set(xlim=(0, _LONGEST + 0.25), ylim=(places[-1] + 0.8, -0.8))
    axes.set_xlabel(
        "time as a multiple of the best of the others, PyTorch eager and compiled, and JAX:\n"
        "left of the line is faster", fontsize=9,
    )  # fmt: skip
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    shown = [f"{name} {x}" for name, x in run["environment"].items() if name in _SHOWN and x]
    figure.suptitle(f"forward + backward; {'; '.join(shown)}", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def bars_of(run: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(case, a path of cupybn's, its time over the best time of the others), case by case."""
    found = []
    for record in [r for name in ("cpu", "gpu") for r in run.get(name, {}).get("cases", [])]:
        case = str(Case(*(record[field] for field in Case._fields)))
        us = {name: times["both"] for name, times in record["us"].items()}
        others = [us[name] for name in _OTHERS if name in us]
        found += [(case, name, us[name] / min(others)) for name in _OURS if name in us and others]
    return found


def written(value: Any) -> str:
    """A figure in about four digits; "-" where there is none."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if 0 < abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"
