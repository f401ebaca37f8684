"""Records what the library computes, bit for bit, and compares another version with it.

    python tests/recording.py record FILE.json     what this version computes, into FILE.json
    python tests/recording.py compare FILE.json    lists all that differs; ends with 1 if any does

The version is the one in the current directory, whatever checkout this script comes from::

    cd OLD_CHECKOUT && python NEW_CHECKOUT/tests/recording.py record /tmp/before.json
    cd NEW_CHECKOUT && python tests/recording.py compare /tmp/before.json

Options of both commands:

    --backends numpy,numba   CPU backends; each runs in a process of its own
    --ranks 1,2,4            numbers of ranks. Three ranks can be recorded too; they may differ in
                             the last bits from version to version, so they are left out by default
    --mpi N                  N real MPI ranks, in place of ranks that are threads
    --only TEXT              only cases whose name contains TEXT

The cases are in ``recorded_cases.py``. They use the public API alone, so that they run on any
version. Recorded are digests of y, dx, dresidual, the gradients, parameters, buffers (running
statistics and ``num_batches_tracked``), every message as it is handed to ``allreduce``, and the
texts of errors. Every case takes several steps with new arrays of the same shapes.

Digests belong to a machine, a NumPy and a PyTorch: another processor or another build of BLAS may
add up in another order. So no file of digests is kept in the repository: record the old version and
compare the new one on the same machine. A backend takes about a minute, and Numba's compilation
before that, once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

CASES = Path(__file__).resolve().parent / "recorded_cases.py"
Digests = dict[str, dict[str, str]]


def run_cases(backend: str, options: argparse.Namespace) -> tuple[dict[str, str], Digests]:
    """What the version in the current directory is and computes, from a fresh process."""
    path = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "CUPYBN_CPU_BACKEND": backend,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "2",  # what threads share is recorded too
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digests.json"
        command = [sys.executable, str(CASES), str(file), f"--only={options.only}"]
        if options.mpi:
            beside = Path(sys.executable).parent / "mpiexec"
            mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
            if mpiexec is None:
                sys.exit("no mpiexec: pip install mpich")
            command = [mpiexec, "-n", str(options.mpi), *command[:1], "-m", "mpi4py", *command[1:]]
            command.append("--mpi")
        else:
            command.append(f"--ranks={options.ranks}")
        subprocess.run(command, env=env, check=True)
        recorded = json.loads(file.read_text())
    return recorded["about"], recorded["digests"]


def differences(before: Digests, now: Digests) -> list[str]:
    """A line for each digest that differs or is there on one side only."""
    lines = []
    for case in dict.fromkeys([*before, *now]):
        old, new = before.get(case), now.get(case)
        if old is None or new is None:
            lines.append(f"{case}: {'not recorded before' if old is None else 'is missing now'}")
            continue
        lines += [
            f"{case}, {item}: {old.get(item, 'nothing')} before, {new.get(item, 'nothing')} now"
            for item in dict.fromkeys([*old, *new])
            if old.get(item) != new.get(item)
        ]
    return lines


def summary(lines: list[str]) -> list[str]:
    """How many of the lines belong to each backend, number of ranks and kind of case."""
    kinds = Counter(" | ".join(line.split(" | ")[:3]).partition(":")[0] for line in lines)
    return [f"{count} in {kind}" for kind, count in kinds.items()]


def selected(digests: Digests, backends: list[str], options: argparse.Namespace) -> Digests:
    """The cases that a run with these options computes."""
    ranks = [f"MPI {options.mpi}"] if options.mpi else options.ranks.split(",")
    begins = tuple(f"{backend} | {number} ranks | " for backend in backends for number in ranks)
    return {
        case: items
        for case, items in digests.items()
        if case.startswith(begins) and options.only in case
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--backends", default="numpy,numba")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--mpi", type=int)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    backends = options.backends.split(",")
    kept = json.loads(options.file.read_text()) if options.command == "compare" else None

    digests: Digests = {}
    for backend in backends:
        about, found = run_cases(backend, options)
        digests |= found
    count = sum(map(len, digests.values()))
    print(f"{count} digests of {len(digests)} cases: {about.pop('code')}", file=sys.stderr)

    if kept is None:
        options.file.write_text(json.dumps({"about": about, "digests": digests}, indent=0) + "\n")
        return
    if kept["about"] != about:
        print(f"recorded with {kept['about']}, now {about}: digests may differ for that reason")
    lines = differences(selected(kept["digests"], backends, options), digests)
    print("\n".join([*lines, *summary(lines), f"{len(lines)} differences"]))
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
