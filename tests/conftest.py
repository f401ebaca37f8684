"""Shared fixtures: real MPI jobs, and the data types the library takes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from processes import family, shared_memory

from cupybn import backends

try:
    import ml_dtypes

    BFLOAT16 = [np.dtype(ml_dtypes.bfloat16)]
except ImportError:
    BFLOAT16 = []

NUMBA = find_spec("numba") is not None
# The reference computes, unless a run of the tests says otherwise; test_primitives.py takes both.
os.environ.setdefault("CUPYBN_CPU_BACKEND", "numpy")

DTYPES = [np.dtype(name) for name in ("float16", "float32", "float64")] + BFLOAT16
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5, "float64": 1e-10}
ROOT = Path(__file__).resolve().parent.parent
STARTUP = 120  # seconds for a job's ranks to start
STARTS = 3  # how often a job is started at most
# What Open MPI's mpiexec says in one start of very many, before it has started any rank: the fault
# is the launcher's, and nothing of the job has happened.
NO_LISTENER = "The PMIx server's listener thread failed to start"
# MPICH: ranks that wait sleep, as Open MPI's do where they are more than the cores; they spin else.
SLEEPING = {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"}
# The first files of a run: in the first Numba compiles what many tests use. Files that start MPI's
# processes come last, beside each other: ranks that wait keep the cores busy.
FIRST = ("test_numba", "test_cuda_layers", "test_mask")


@pytest.fixture(autouse=True)
def _own_backend() -> Iterator[None]:
    """The backend that a test chooses is the backend of that test alone."""
    before = backends.cpu_backend()
    yield
    backends.use_cpu_backend(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(FIRST)}
    mpi = {item.path for item in items if item.get_closest_marker("mpi")}
    items.sort(key=lambda item: (order.get(item.path.stem, len(FIRST)), item.path in mpi))


def _mpiexec() -> str | None:
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def rank_environment(ranks: int = 1, /, **more: str) -> dict[str, str]:
    """One thread a rank; and what an MPI wants before it starts as root or on few cores."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONFAULTHANDLER": "1",
    }
    return env | (SLEEPING if ranks > (os.cpu_count() or 1) else {}) | more


def run_job(
    command: list[str],
    env: dict[str, str],
    timeout: float,
    ready: int = 0,
    interrupted: bool = False,
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run``, again where the launcher fails before it has started any rank.

    `ready`: the timeout counts from when there are so many lines of output. On a busy machine most
    of a job's time goes into its start, which has ``STARTUP`` seconds of its own then.
    `interrupted`: the command gets a SIGINT, as by Ctrl-C, a second after that.
    """
    for _ in range(STARTS):
        process = _run_once(command, env, timeout, ready, interrupted)
        if NO_LISTENER not in process.stderr:
            break
    return process


def _run_once(
    command: list[str], env: dict[str, str], timeout: float, ready: int, interrupted: bool
) -> subprocess.CompletedProcess[str]:
    """Takes away the shared memory that ranks leave when they are killed."""
    deadline = time.monotonic() + (STARTUP if ready else timeout)
    files: set[Path] = set()
    with subprocess.Popen(
        command, env=env, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            while True:
                try:
                    stdout, stderr = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired as running:
                    files |= shared_memory(family(process.pid))
                    now = time.monotonic()
                    if ready and (running.stdout or b"").count(b"\n") >= ready:
                        ready, deadline = 0, now + timeout
                        if interrupted:
                            time.sleep(1)
                            process.send_signal(signal.SIGINT)
                    if now > deadline:
                        raise
        finally:
            process.kill()  # if it still runs
            for file in files:
                file.unlink(missing_ok=True)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``torchrun(n, script, *args)``: n processes that torchrun starts, on this machine alone."""

    def run(
        n: int, script: str | Path, *args: object, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        options = ["--standalone", "--local-addr", "127.0.0.1", f"--nproc-per-node={n}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", *options]
        env = rank_environment(GLOO_SOCKET_IFNAME="lo")
        process = run_job([*launcher, str(script), *map(str, args)], env, timeout)
        if check and process.returncode != 0:
            said = f"{process.stdout}\n{process.stderr}"
            pytest.fail(f"torchrun {script} {args}: {process.returncode}\n{said}", pytrace=False)
        return process

    return run


@pytest.fixture(scope="session")
def mpirun() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``mpirun(n, script, *args)``: a real MPI job; shows every rank's output when it fails.

    `aborting`: under ``python -m mpi4py``, with which an exception on one rank ends the job.
    `options`: of mpiexec. `under`: what runs each rank's Python. `ready`, `interrupted`: see
    ``run_job``.
    """
    mpiexec = _mpiexec()
    if mpiexec is None:
        pytest.skip("no mpiexec: pip install mpich")

    def run(
        n: int,
        script: str | Path,
        *args: object,
        timeout: float = 120,
        check: bool = True,
        env: dict[str, str] | None = None,
        aborting: bool = True,
        options: Sequence[str] = (),
        under: Sequence[str] = (),
        ready: int = 0,
        interrupted: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        python = [sys.executable, "-m", "mpi4py"] if aborting else [sys.executable]
        command = [mpiexec, *options, "-n", str(n), *under, *python, str(script), *map(str, args)]
        try:
            environment = rank_environment(n, **(env or {}))
            process = run_job(command, environment, timeout, ready, interrupted)
        except subprocess.TimeoutExpired as job:
            if not check:
                raise
            said = "\n".join((text or b"").decode() for text in (job.stdout, job.stderr))
            pytest.fail(f"{n} ranks of {script} {args} did not end\n{said}", pytrace=False)
        if check and process.returncode != 0:
            pytest.fail(
                f"{n} ranks of {script} {args} ended with {process.returncode}\n"
                f"{process.stdout}\n{process.stderr}",
                pytrace=False,
            )
        return process

    return run
