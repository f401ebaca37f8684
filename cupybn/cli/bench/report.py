"""What a run prints and writes: the head, tables line by line, the JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ... import __version__
from .threads import cores

_Item = TypeVar("_Item")


class Report:
    """One run.

    Attributes:
        speaks: whether this process prints and writes.
        environment: versions, device and the command, by name.
        sections: the figures of each section.
    """

    def __init__(self, args: argparse.Namespace, speaks: bool = True) -> None:
        self.speaks = speaks
        self.path: Path | None = args.json if speaks else None
        self.environment = _environment(args)
        self.left_out: dict[str, str] = {}
        self.sections: dict[str, Any] = {}

    def head(self, left_out: Mapping[str, str]) -> None:
        """Prints versions, device, threads and command, and what is not measured."""
        self.left_out = dict(left_out)
        self.say(f"$ {self.environment['command']}")
        width = max(map(len, self.environment))
        for name, value in self.environment.items():
            if name != "command":
                self.say(f"{name:{width}}  {'none' if value is None else value}")
        for name, reason in left_out.items():
            self.say(f"left out: --{name}, because {reason}")
        self.flush()

    def add(self, more: Mapping[str, Any]) -> None:
        """Adds to the environment what only a section knows, and prints it."""
        self.environment |= more
        for name, value in more.items():
            self.say(f"{name}: {value}")

    def begin(self, name: str, title: str) -> dict[str, Any]:
        """The dict for the figures of a section, under its printed title."""
        self.say(f"\n== {title}")
        return self.sections.setdefault(name, {})  # type: ignore[no-any-return]

    def say(self, text: str = "") -> None:
        """Prints a line above the progress bar."""
        if not self.speaks:
            return
        tqdm = sys.modules.get("tqdm")
        if tqdm is None:
            print(text, flush=True)
        else:
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, items: Sequence[_Item], unit: str = "case") -> Iterable[_Item]:
        """The items, with a bar on stderr where that is a terminal and tqdm is installed."""
        if not self.speaks or find_spec("tqdm") is None:
            return items
        tqdm = import_module("tqdm").tqdm
        bar: Iterable[_Item] = tqdm(
            items, unit=unit, file=sys.stderr, mininterval=1, smoothing=0.1, disable=None
        )
        return bar

    def flush(self) -> None:
        """Writes the JSON file: the whole of it, or none."""
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".part")
        everything = {"environment": self.environment, "left out": self.left_out, **self.sections}
        partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


class Table:
    """Lines of fixed columns: (title, format) each; "-" where a value is None."""

    def __init__(self, *columns: tuple[str, str]) -> None:
        self.columns = [
            (title, form, max(len(title), int(form.split(".")[0].strip("<>fesd") or 0)))
            for title, form in columns
        ]

    def header(self) -> str:
        return "  ".join(self._fit(title, form, width) for title, form, width in self.columns)

    def line(self, *values: Any) -> str:
        """The values as a line."""
        texts = []
        for value, (_, form, width) in zip(values, self.columns, strict=True):
            text = "-" if value is None else str(value) if form[-1] == "s" else format(value, form)
            texts.append(self._fit(text, form, width))
        return "  ".join(texts).rstrip()

    @staticmethod
    def _fit(text: str, form: str, width: int) -> str:
        return text.ljust(width) if form[0] == "<" else text.rjust(width)


def by_x(shape: Sequence[int]) -> str:
    """A shape as --shapes takes it."""
    return "x".join(map(str, shape))


def load_torch(args: argparse.Namespace) -> Any:
    """The module, or None."""
    if args.no_torch or find_spec("torch") is None:
        return None
    return import_module("torch")


def _environment(args: argparse.Namespace) -> dict[str, Any]:
    torch = load_torch(args)
    return {
        "command": " ".join(["python -m cupybn", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": f"{_processor()}, {cores()} cores, {platform.machine()}",
        "system": f"{platform.system()} {platform.release()}",
        "load": _load(),
        "Python": platform.python_version(),
        "cupybn": __version__,
        "NumPy": np.__version__,
        "PyTorch": None if torch is None else str(torch.__version__),
    }


def _load() -> str | None:
    """What else the machine does: beside many others no time here is worth much."""
    if not hasattr(os, "getloadavg"):
        return None
    return f"{os.getloadavg()[0]:.1f} processes at work in the minute before"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
