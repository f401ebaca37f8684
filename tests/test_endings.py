"""Ranks that wait for a message that never comes: how the job ends. Real MPI jobs.

Every rank says when it begins to wait; the job must have ended 5 seconds after the timeout, and no
process of it may be left. The jobs mostly wait, so several run at a time.
"""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

PROGRAM = Path(__file__).parent / "mpi" / "endings.py"
TIMEOUT = 3
pytestmark = [pytest.mark.mpi, pytest.mark.timeout(20)]
RANKS = [2, 4]
AT_A_TIME = 3

FIRST, SECOND = "forward of 'first', message 5", "backward of 'second', message 7"
SPOKEN = {
    "raises": FIRST,
    "raises backward": SECOND,
    "exits": FIRST,
    "exits backward": SECOND,
    "is stopped": FIRST,
    "is stopped backward": SECOND,
    "sleeps": FIRST,
    "sleeps backward": SECOND,
    "skips the last backward": "backward of 'first', message 8",
    "stays in evaluation": FIRST,
    "evaluates for one step": "forward of 'first', message 11",
}
SILENT = [
    "is killed", "is killed backward", "exits at once", "exits at once backward",
    "sends another length", "sends another length backward", "is at the gradients",
    "sleeps, nobody listens",
]  # fmt: skip


@pytest.fixture(scope="module")
def endings(request, mpirun):
    """``endings(n, case)``: the job's exit code, output, and seconds since its ranks waited."""

    def job(n, case):
        name = case.removesuffix(" backward")
        direction = "forward" if name == case else "backward"
        if case == "skips the last backward":
            name, direction = case, "forward"
        process = mpirun(
            n, PROGRAM, name, direction,
            timeout=20, check=False, aborting=False, env={"CUPYBN_TIMEOUT": str(TIMEOUT)},
        )  # fmt: skip
        ended = time.time()
        ranks = [json.loads(line) for line in process.stdout.splitlines() if line[:1] == "{"]
        return SimpleNamespace(
            code=process.returncode,
            stderr=process.stderr,
            ranks=ranks,
            seconds=ended - min((line["time"] for line in ranks), default=0),
        )

    wanted = [
        (item.callspec.params["n"], item.callspec.params["case"])
        for item in request.session.items
        if item.module is request.module and {"n", "case"} <= item.callspec.params.keys()
    ]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        jobs = {key: pool.submit(job, *key) for key in dict.fromkeys(wanted)}
        yield lambda n, case: jobs[n, case].result()


def left_over(ranks):
    """Processes of the job that still exist, other than as an entry nobody has collected yet."""

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 2
    while any(alive(line["pid"]) for line in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [line["rank"] for line in ranks if alive(line["pid"])]


@pytest.mark.parametrize("case", list(SPOKEN))
@pytest.mark.parametrize("n", RANKS)
def test_a_waiting_rank_says_where_it_waited_and_ends_the_job(endings, n, case):
    job = endings(n, case)
    assert job.code != 0
    assert job.seconds < TIMEOUT + 5
    said = rf"cupybn: rank [0-{n - 2}] of {n}, {re.escape(SPOKEN[case])} of this communicator: "
    assert re.search(said + rf"waited {TIMEOUT}\.\d s for the other ranks", job.stderr), job.stderr
    assert re.search(r'File ".*endings.py", line \d+ in ', job.stderr)  # the Python stack
    assert left_over(job.ranks) == []


@pytest.mark.parametrize("case", SILENT)
@pytest.mark.parametrize("n", RANKS)
def test_the_job_ends_though_nobody_says_where_it_waited(endings, n, case):
    """The launcher or the MPI library ends it first, or standard error is closed."""
    job = endings(n, case)
    assert job.code != 0
    assert job.seconds < TIMEOUT + 5
    assert left_over(job.ranks) == []


@pytest.mark.parametrize("n", RANKS)
def test_under_mpi4py_an_exception_ends_the_job_at_once(mpirun, n):
    began = time.monotonic()
    process = mpirun(n, PROGRAM, "raises", timeout=20, check=False)
    assert process.returncode != 0
    assert time.monotonic() - began < 10
    assert "a bug in the user's own code" in process.stderr
