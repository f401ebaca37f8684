"""What a lost rank, host or network leads to, launched over ssh and by Slurm.

The survivors end within the timeout and say where they waited, and the checkpoint is whole. Where
the launcher itself stays, ``timeout`` ends it, as docs/clusters.md advises.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import jobs
import pytest

import cupybn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from processes import family

TIMEOUT = 5  # seconds
LIMIT = 20  # seconds in which the survivors have to be gone
LAUNCHER = 10  # seconds in which it ends by itself, or stays

LONG = " --epochs 1000 --save-every 5"

pytestmark = pytest.mark.timeout(900)


def signal_ranks(number):
    for pid in jobs.ranks("n2"):
        os.kill(pid, number)


def cut_link():
    subprocess.run(["ip", "link", "set", "p2", "down"], check=True)


def lose_host():
    cut_link()
    os.kill(jobs.first_process("n2"), signal.SIGKILL)


FAULTS = {
    "killed": lambda: signal_ranks(signal.SIGKILL),
    "stopped": lambda: signal_ranks(signal.SIGSTOP),
    "link cut": cut_link,
    "host gone": lose_host,
}


def quickly(*chosen):
    """Parameters for the faults; all but these are slow."""
    return pytest.mark.parametrize(
        "fault", [pytest.param(f, marks=() if f in chosen else pytest.mark.slow) for f in FAULTS]
    )


@pytest.fixture(params=list(jobs.VENVS))
def mpi(request):
    yield request.param
    jobs.clean_up()


def shorter(text, fault):
    """A block of the document that has less time; but where the launcher has to be the faster."""
    assert "CUPYBN_TIMEOUT=300" in text
    if fault != "killed":
        text = text.replace("CUPYBN_TIMEOUT=300", f"CUPYBN_TIMEOUT={TIMEOUT}")
    return text.replace("--requeue ", "").strip()


def after(fault, where):
    """Seconds until n1 has no rank any more, after the fault befell the rank on n2."""
    jobs.wait_for((where / "state.npz").exists, jobs.START)
    FAULTS[fault]()
    return jobs.wait_for(lambda: not jobs.ranks("n1"), LIMIT)


def outcome(launcher):
    """The code of ``timeout mpiexec``; if mpiexec stays, the time of ``timeout`` is over."""
    with suppress(subprocess.TimeoutExpired):
        return launcher.wait(LAUNCHER), ""
    os.kill(timeout_of(launcher), signal.SIGALRM)
    return launcher.wait(20), ", after mpiexec stayed"


def timeout_of(launcher):
    """The process ``timeout``, which hands signals on to mpiexec."""
    (found,) = [pid for pid in family(launcher.pid)
                if Path(f"/proc/{pid}/comm").read_text() == "timeout\n"]  # fmt: skip
    return found


def assert_said(fault, output):
    if fault == "killed":
        return
    assert f"the limit is {TIMEOUT} s, CUPYBN_TIMEOUT" in output, output
    assert "rank 0 of 2 on n1" in output


@quickly("killed", "stopped", "link cut")
def test_under_mpiexec(fault, mpi):
    where = jobs.folder(mpi)
    command = shorter(jobs.BLOCKS[f"ssh-{mpi}"], fault) + LONG
    with jobs.launched(command, where) as launcher:
        seconds = after(fault, where)
        code, stays = outcome(launcher)
    output = (where / "out").read_text()
    print(f"{mpi}, mpiexec, {fault}: ranks gone after {seconds:.0f} s, code {code}{stays}")
    assert code != 0, output
    assert_said(fault, output)
    cupybn.load(where / "state.npz")


def test_ctrl_c_under_mpiexec(mpi):
    where = jobs.folder(mpi)
    command = jobs.BLOCKS[f"ssh-{mpi}"].strip() + LONG
    with jobs.launched(command, where) as launcher:
        jobs.wait_for((where / "state.npz").exists, jobs.START)
        os.kill(timeout_of(launcher), signal.SIGINT)
        seconds = jobs.wait_for(lambda: not jobs.ranks(), LIMIT)
        code = launcher.wait(LAUNCHER)
    print(f"{mpi}, mpiexec, Ctrl-C: ranks gone after {seconds:.0f} s, code {code}")
    assert code != 0
    cupybn.load(where / "state.npz")


@pytest.mark.slow
def test_under_srun_without_k_the_timeout_ends_the_others(mpi):
    where = jobs.folder(mpi)
    text = shorter((where / "job.sh").read_text(), "stopped")
    (where / "job.sh").write_text(text.replace(" -K ", " "))
    job = jobs.submit(where, LONG)
    seconds = after("killed", where)
    state = jobs.ended(job, jobs.WHOLE)
    print(f"{mpi}, srun without -K: ranks gone after {seconds:.0f} s, {state}")


@quickly("killed", "stopped", "host gone")
def test_under_srun(fault, mpi):
    where = jobs.folder(mpi)
    (where / "job.sh").write_text(shorter((where / "job.sh").read_text(), fault))
    job = jobs.submit(where, LONG)
    seconds = after(fault, where)
    state = jobs.ended(job, jobs.WHOLE)
    output = (where / "job.out").read_text()
    print(f"{mpi}, srun, {fault}: ranks gone after {seconds:.0f} s, {state}")
    assert state in ("FAILED", "NODE_FAIL"), output
    assert_said(fault, output)
    cupybn.load(where / "state.npz")
