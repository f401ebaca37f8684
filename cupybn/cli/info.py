"""``python -m cupybn info``: what this installation consists of."""

from __future__ import annotations

import argparse
import json
import platform

import numpy as np

from .. import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    found = collect()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:{width}}  {value}")
    return 0


def collect() -> dict[str, object]:
    """What was found, by name."""
    return {
        "cupybn": __version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }
