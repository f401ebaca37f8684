"""Another process in which a checkout's cupybn takes its turns, asked through pipes.

``--against`` measures both versions so, each in a process of its own that has neither PyTorch nor
the other version in it. What is asked and answered is a line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .machine import ROOT

# This folder is found in this checkout, and cupybn in the other one.
_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import benchmarks
sys.path[0] = sys.argv[2]
from benchmarks import cpu, worker
worker.serve(cpu)
"""

_MOVED = 10  # turns, after which arrays are made anew: where they lie makes some per cent


class Worker:
    """A process with the cupybn of a checkout.

    Raises:
        RuntimeError: what went wrong over there; or another cupybn than the one that was meant.
    """

    def __init__(self, checkout: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(ROOT), str(checkout.resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if (found := Path(self.ask("where")).parent) != checkout.resolve():
            self.close()
            raise RuntimeError(f"{checkout} was meant, but cupybn was found in {found}")

    def ask(self, what: str, *arguments: Any) -> Any:
        """Calls a method of ``_Served`` over there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([what, *arguments]), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"{what}: the process ended with code {self.process.wait()}")
        result, problem = json.loads(answer)
        if problem is not None:
            raise RuntimeError(problem)
        return result

    def close(self) -> None:
        self.process.communicate()


class _Served:
    """What a worker does: it has the paths of one case, by the name of their backend."""

    def __init__(self, cpu: Any) -> None:
        self.cpu, self.turns = cpu, 0
        self.paths: dict[str, Any] = {}

    def where(self) -> str:
        return str(Path(self.cpu.cupybn.__file__).parent)

    def begin(self, backends: list[str], shape: list[int], *rest: Any) -> None:
        self.paths = {}  # the memory of the last case
        case = self.cpu.Case(tuple(shape), *rest)
        tensors = self.cpu.Tensors(self.cpu.np, None, case)
        self.paths = self.cpu.own_paths(backends, case, tensors)
        self.asked = backends, shape, *rest

    def turn(self, backend: str, calls: int, warm: float) -> Any:
        self.turns += 1
        if self.turns % _MOVED == 0:
            self.begin(*self.asked)
        return self.paths[backend].turn(calls, warm)

    def error(self, backend: str) -> Any:
        self.paths[backend].turn(1, 0)  # the last turn may have been before the arrays were made
        return self.paths[backend].error()


def serve(cpu: Any) -> None:
    """Answers until its stdin ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    served = _Served(cpu)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            answer = [getattr(served, what)(*arguments), None]
        except Exception as error:  # it belongs to whoever asked
            answer = [None, f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), file=answers, flush=True)
