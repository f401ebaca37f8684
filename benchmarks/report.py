"""What a run prints and writes: the head, rows of figures, the JSON file, the picture."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import cupybn

from . import machine
from .picture import draw

_Item = TypeVar("_Item")


class Report:
    """One run; only the first rank prints and writes.

    Attributes:
        environment: versions, device and the command, by name.
        sections: the figures of each section.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.speaks = machine.is_first_rank()
        self.path: Path | None = args.json
        self.sections: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}
        self.titles: list[str] = []
        self.add(environment(args))

    def add(self, more: dict[str, Any]) -> None:
        """Adds to the environment, and prints it."""
        self.environment |= more
        for name, value in more.items():
            self.say(f"{name:10}  {'none' if value is None else value}")

    def begin(self, name: str, title: str) -> dict[str, Any]:
        """The dict for the figures of a section, under its printed title."""
        self.titles = []
        self.say(f"\n== {title}")
        return self.sections.setdefault(name, {})  # type: ignore[no-any-return]

    def row(self, name: str, values: dict[str, Any]) -> None:
        """Prints figures under their titles, which are printed where they change."""
        if list(values) != self.titles:
            self.titles = list(values)
            self.say(" " * 34 + "".join(f"  {title:>8}" for title in values))
        texts = (f"  {written(value):>{max(8, len(title))}}" for title, value in values.items())
        self.say(f"{name:34}{''.join(texts)}")

    def notes(self, failed: dict[str, str]) -> None:
        """Prints why paths have no figures."""
        for name, reason in failed.items():
            self.say(f"    {name}: {reason}")

    def say(self, text: str = "") -> None:
        """Prints a line above the progress bar."""
        if not self.speaks:
            return
        if tqdm := sys.modules.get("tqdm"):
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(text, flush=True)

    def progress(self, items: Sequence[_Item], unit: str = "case") -> Iterable[_Item]:
        """The items, with a bar on stderr where that is a terminal and tqdm is installed."""
        if not self.speaks or find_spec("tqdm") is None:
            return items
        bar: Iterable[_Item] = import_module("tqdm").tqdm(
            items, unit=unit, file=sys.stderr, mininterval=1, smoothing=0.1, disable=None
        )
        return bar

    def flush(self) -> None:
        """Writes the JSON file: the whole of it, or none."""
        if self.path is None or not self.speaks:
            return
        partial = self.path.with_name(self.path.name + ".part")
        everything = {"environment": self.environment, **self.sections}
        partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def draw(self, path: Path | None) -> None:
        """Writes the picture."""
        if path is not None and self.speaks:
            drawn = draw(self.sections, self.environment, path)
            self.say(f"\nwrote {path}" if drawn else "\nno picture: nothing beside PyTorch")


def written(value: Any) -> str:
    """A figure in about four digits; "-" where there is none."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if 0 < abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What figures depend on, by name."""
    found = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": machine.processor(),
        "threads": args.threads,
        "python": sys.version.split()[0],
        "cupybn": f"{cupybn.__version__} {machine.commit()}".strip(),
    }
    if args.against is not None:
        found["before"] = machine.commit(args.against)
    installed = {d.name.lower(): d.version for d in metadata.distributions()}
    return found | {name: installed.get(name) for name in ("numpy", "numba", "torch", "jax")}
