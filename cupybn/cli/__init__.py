"""The command line. A command is a module beside this one, with ``add_arguments(parser)`` and
``run(args) -> exit code``; only the module of the command that was given is imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__

COMMANDS = {
    "compile": "compiles the CPU loops of the extra 'cpu' to disk, before they are needed",
    "info": "what this installation consists of: versions, GPUs, the MPI library",
    "selftest": "whether synchronised layers work here; start it with mpiexec -n 4",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in argv (without the program's name); returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m cupybn")
    parser.add_argument("--version", action="version", version=f"cupybn {__version__}")
    if given[:1] == ["bench"]:
        parser.error("the bench is in the checkout: run python -m benchmarks there")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in given[:1]:
            import_module(f".{name}", __name__).add_arguments(command)
    args = parser.parse_args(given)
    return int(import_module(f".{args.command}", __name__).run(args))
