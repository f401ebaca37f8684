"""Ranks that wait for a message that never comes: how the job ends. Real MPI jobs.

Every rank says when it begins to wait; the job must have ended SLACK seconds after the timeout, and
no process of it may be left. On an idle machine it takes one or two; what must not end it, such as
a culprit that sleeps or a shell that lingers, takes longer than SLACK on any. A job that has not
ended LIMIT seconds after its ranks were ready is killed, and its test fails. The jobs mostly wait,
so several run at a time.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SLEEPING, STARTUP, rank_environment, run_job

from cupybn.communicators.watchdog import EXIT_CODE, Watch, _give_up

PROGRAM = Path(__file__).parent / "mpi" / "endings.py"
TIMEOUT = 3
SLACK = 17  # seconds for a machine that is busy with other things
LIMIT = 25  # seconds from when all ranks are ready
pytestmark = [pytest.mark.mpi, pytest.mark.timeout(2 * (STARTUP + LIMIT))]
RANKS = [2, 4]
AT_A_TIME = 8

FIRST, SECOND = "forward of 'first', message 5", "backward of 'second', message 7"
SPOKEN = {
    "raises": FIRST,
    "raises backward": SECOND,
    "misspells an argument": FIRST,
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
# The launcher ends the job as soon as its own child is gone, and kills the waiting ranks unheard. A
# shell as its child, which outlives the rank by more than the timeout, lets them speak.
AT_ONCE = ["is killed", "is killed backward", "exits at once", "exits at once backward"]
LINGERING = ["sh", "-c", '"$@" || { code=$?; sleep 30; exit $code; }', "rank"]
HEARD = {
    "is killed, under a shell": FIRST,
    "is killed, under a shell backward": SECOND,
    "exits at once, under a shell": FIRST,
    "exits at once, under a shell backward": SECOND,
}
LENGTHS = ["sends another length", "sends another length backward", "is at the gradients"]


@pytest.fixture(scope="module")
def endings(request, mpirun):
    """``endings(n, case)``: what ``ending`` returns, of jobs that were started ahead."""
    here = [item for item in request.session.items if item.module is request.module]
    parameters = [item.callspec.params for item in here if hasattr(item, "callspec")]
    wanted = [(chosen["n"], chosen["case"]) for chosen in parameters if "case" in chosen]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        jobs = {key: pool.submit(ending, mpirun, *key) for key in dict.fromkeys(wanted)}
        yield lambda n, case: jobs[n, case].result()


def ending(mpirun, n, case, **more):
    """The job's exit code, output, and seconds since its ranks waited."""
    name = case.removesuffix(" backward")
    direction = "forward" if name == case else "backward"
    if case == "skips the last backward":
        name, direction = case, "forward"
    if name.endswith(", under a shell"):
        name, more = name.removesuffix(", under a shell"), {"under": LINGERING}
    if name.endswith(", under mpi4py"):
        name, more = name.removesuffix(", under mpi4py"), {"aborting": True}
    env = SLEEPING | {"CUPYBN_TIMEOUT": str(TIMEOUT)}
    options = {"aborting": False, "check": False, "env": env} | more
    for attempt in (1, 2):
        try:
            process = mpirun(n, PROGRAM, name, direction, timeout=LIMIT, ready=n, **options)
            break
        except subprocess.TimeoutExpired as hanging:
            # About one time in 150, prterun 5.0.11 hangs by itself when all its ranks are gone.
            aborted = b"MPI_ABORT was invoked" in (hanging.stderr or b"")
            if attempt == 2 or not aborted or left_over(said(hanging.stdout.decode())):
                raise
    ended = time.time()
    ranks = said(process.stdout)
    return SimpleNamespace(
        code=process.returncode,
        stderr=process.stderr,
        ranks=ranks,
        library=ranks[0]["library"],
        seconds=ended - min(line["time"] for line in ranks),
    )


def said(stdout):
    return [json.loads(line) for line in stdout.splitlines() if line[:1] == "{"]


def alive(pid):
    """Whether there is such a process, other than as an entry nobody has collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it was gone, or went between open and read
        return False


def left_over(ranks):
    """The ranks whose processes still exist."""
    deadline = time.monotonic() + 10
    while any(alive(line["pid"]) for line in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [line["rank"] for line in ranks if alive(line["pid"])]


def check_spoken(job, n, where):
    assert job.code != 0
    assert job.seconds < TIMEOUT + SLACK
    said = (
        rf"cupybn: rank ([0-{n - 2}]) of {n} on ([^,\n]*), process (\d+), {re.escape(where)} of "
        r"this communicator: waited (?:[3-9]|1\d)\.\d s for the other ranks"
    )
    found = re.findall(said, job.stderr)
    assert found, job.stderr
    pids = {str(line["rank"]): str(line["pid"]) for line in job.ranks}
    for rank, host, pid in found:
        assert host == platform.node()
        assert pid == pids[rank]
    assert "suspect the ranks that say nothing" in job.stderr
    assert re.search(r'File ".*endings.py", line \d+ in ', job.stderr)  # the Python stack
    assert left_over(job.ranks) == []


@pytest.mark.parametrize("case", list(SPOKEN))
@pytest.mark.parametrize("n", RANKS)
def test_a_waiting_rank_says_where_it_waited_and_ends_the_job(endings, n, case):
    check_spoken(endings(n, case), n, SPOKEN[case])


@pytest.mark.parametrize("case", list(HEARD))
@pytest.mark.parametrize("n", RANKS)
def test_under_a_shell_that_lingers_the_ranks_outlive_one_that_is_gone(endings, n, case):
    check_spoken(endings(n, case), n, HEARD[case])


@pytest.mark.parametrize("case", AT_ONCE)
@pytest.mark.parametrize("n", RANKS)
def test_the_launcher_ends_the_job_when_a_process_is_gone(endings, n, case):
    job = endings(n, case)
    assert job.code != 0
    assert job.seconds < TIMEOUT + SLACK
    assert "cupybn: " not in job.stderr
    assert left_over(job.ranks) == []


@pytest.mark.parametrize("case", ["exits at once with 0"])
@pytest.mark.parametrize("n", RANKS)
def test_a_process_that_is_gone_without_an_error_ends_the_job_too(endings, mpirun, n, case):
    """MPICH's launcher may then give the code of that process, 0, for the whole job."""
    job = endings(n, case)
    assert job.code != 0 or job.library == "MPICH"
    assert job.seconds < TIMEOUT + SLACK
    assert "cupybn: " not in job.stderr
    assert left_over(job.ranks) == []
    if job.library == "MPICH":
        check_spoken(ending(mpirun, n, case, options=["-disable-auto-cleanup"]), n, FIRST)


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("n", RANKS)
def test_messages_of_different_length_end_the_job(endings, n, case):
    """MPICH aborts; with Open MPI a rank raises or crashes, or the others wait in vain."""
    job = endings(n, case)
    assert job.code != 0
    assert job.seconds < TIMEOUT + SLACK
    assert not (job.library == "MPICH" and "cupybn: " in job.stderr)
    assert left_over(job.ranks) == []


@pytest.mark.parametrize("case", ["sleeps, nobody listens"])
@pytest.mark.parametrize("n", RANKS)
def test_a_waiting_rank_ends_the_job_even_if_it_cannot_say_why(endings, n, case):
    """Standard error is closed: writing to it raises in the watchdog's thread."""
    job = endings(n, case)
    assert job.code != 0
    assert TIMEOUT < job.seconds < TIMEOUT + SLACK
    assert left_over(job.ranks) == []


@pytest.mark.parametrize("seconds", [0, 60])
def test_the_limit_of_a_job_counts_from_when_its_ranks_are_ready(seconds):
    """So none of these tests depends on how busy the machine is while a job starts."""
    command = ["sh", "-c", f"sleep 1.5; echo ready; sleep {seconds}"]
    began = time.monotonic()
    if seconds:
        with pytest.raises(subprocess.TimeoutExpired):
            run_job(command, rank_environment(), timeout=1, ready=1)
        assert 2.5 < time.monotonic() - began < 30
    else:
        assert run_job(command, rank_environment(), timeout=1, ready=1).stdout == "ready\n"


LISTENER = "The PMIx server's listener thread failed to start. We cannot continue."


@pytest.mark.parametrize(
    "failures, says, starts",
    [
        (1, LISTENER, 2),
        (2, LISTENER, 3),
        (9, LISTENER, 3),
        (1, "The PMIx server failed to start. We cannot continue.", 1),
    ],
)
def test_a_launcher_that_fails_before_any_rank_is_started_again(failures, says, starts, tmp_path):
    """And one that fails otherwise is not."""
    log, launcher = tmp_path / "starts", tmp_path / "mpiexec"
    launcher.write_text(
        f'#!/bin/sh\necho >>{log}\n[ "$(wc -l <{log})" -le {failures} ] || exec echo ranks\n'
        f'echo "{says}" >&2\nexit 213\n'
    )
    launcher.chmod(0o755)
    process = run_job([str(launcher)], rank_environment(), timeout=60)
    assert log.read_text().count("\n") == starts
    if starts > failures:
        assert (process.returncode, process.stdout) == (0, "ranks\n")
    else:
        assert (process.returncode, process.stdout) == (213, "")


WAITING = """
import os, time
from cupybn.communicators.watchdog import Watch, watchdog
watch = Watch("rank 0 of 2", {timeout}, lambda code: {abort})
watchdog.add(watch)
watch.sequence, watch.label = 1, "a message"
print("waiting", flush=True)
time.sleep({waits})
watch.label = None
"""


def waiting(timeout, waits, abort):
    """A process under the watchdog that waits."""
    program = WAITING.format(timeout=timeout, waits=waits, abort=abort)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=rank_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    return process


def test_a_process_whose_abort_hangs_ends_itself():
    with waiting(timeout=0.5, waits=200, abort="time.sleep(200)") as process:
        assert process.wait(100) == EXIT_CODE


def test_a_process_that_goes_while_it_is_looked_at_is_gone(monkeypatch):
    def gone(path):
        raise ProcessLookupError(3, "No such process")

    assert alive(os.getpid())
    monkeypatch.setattr(Path, "read_text", gone)
    assert not alive(os.getpid())
    assert left_over([{"rank": 0, "pid": os.getpid()}]) == []


def test_messages_in_quick_succession_are_not_one_wait():
    """Whenever the watchdog looks, a message is on its way: each time another one."""
    watch = Watch("rank 0 of 2", 3, print)
    for second in range(10):
        watch.sequence, watch.label = second + 1, "a message"
        assert watch.waited(float(second)) == 0
    assert watch.waited(11.5) == 2.5
    watch.label = None
    assert watch.waited(12.0) == 0


def test_time_for_which_the_whole_job_is_suspended_does_not_count():
    """Some schedulers stop all ranks, and go on with them much later."""
    # It counts 1.3 s of waiting, and 1 s for the 4.2 in between. A busy machine adds to both.
    with waiting(timeout=4, waits=5.5, abort="os._exit(code)") as process:
        time.sleep(0.6)  # it has been seen waiting
        process.send_signal(signal.SIGSTOP)
        time.sleep(4.2)
        process.send_signal(signal.SIGCONT)
        assert process.wait(100) == 0


def test_the_job_is_aborted_even_if_no_thread_can_be_started(monkeypatch):
    def refused(timer):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", refused)
    monkeypatch.setattr("cupybn.communicators.watchdog._tell", lambda *args: None)
    codes = []
    _give_up(Watch("rank 0 of 2", 1, codes.append), 1.5)
    assert codes == [EXIT_CODE]


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize(
    "case, text",
    [
        ("raises, under mpi4py", "a bug in the user's own code"),
        ("misspells an argument, under mpi4py", "'residaul'"),
    ],
)
def test_under_mpi4py_an_exception_ends_the_job_at_once(endings, n, case, text):
    job = endings(n, case)
    assert job.code != 0
    assert job.seconds < TIMEOUT + SLACK
    assert text in job.stderr
    assert "cupybn: " not in job.stderr


@pytest.mark.parametrize("n", RANKS)
@pytest.mark.parametrize("aborting", [False, True])
def test_ctrl_c_ends_the_job(mpirun, n, aborting):
    """MPICH's launcher passes Ctrl-C to the ranks; only a rank that computes notices it."""
    job = ending(mpirun, n, "sleeps", aborting=aborting, interrupted=True)
    assert job.code != 0
    assert left_over(job.ranks) == []
    if job.library == "MPICH" and not aborting:
        check_spoken(job, n, FIRST)
    else:
        assert "cupybn: " not in job.stderr
        assert job.seconds < TIMEOUT + 5
