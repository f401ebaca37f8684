"""A training that was killed goes on from its checkpoint as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import NO_LISTENER, ROOT, STARTS, _mpiexec, rank_environment
from processes import family, shared_memory

import cupybn

SCRIPT = ROOT / "examples" / "train_digits.py"
WHOLE = 60  # images of a step: 15 steps an epoch
EPOCHS = 3

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(400)]


def options(ranks, path, *more):
    return ["--batch", WHOLE // ranks, "--epochs", EPOCHS, "--save", path, "--save-every", 2,
            "--plot", path.with_suffix(".png"), *more]  # fmt: skip


@pytest.fixture(scope="module")
def never_killed(mpirun, tmp_path_factory):
    """The file with the last state of 4 ranks that nothing happened to."""
    path = tmp_path_factory.mktemp("whole") / "state.npz"
    mpirun(4, SCRIPT, *options(4, path))
    return path


@contextmanager
def running(ranks, path, more, saves, delay):
    """A job, some time after it has saved so often; started as ``conftest.run_job`` starts one."""
    command = [_mpiexec(), "-n", ranks, sys.executable, "-m", "mpi4py", SCRIPT,
               *options(ranks, path, *more)]  # fmt: skip
    env = rank_environment(ranks, TMPDIR=str(path.parent))  # where Open MPI would leave files
    errors = path.with_suffix(".err")
    for _ in range(STARTS):
        with errors.open("w") as stderr, subprocess.Popen(
            [str(word) for word in command], env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=stderr, start_new_session=True, text=True,
        ) as job:  # fmt: skip
            if has_saved(job, path, saves):
                time.sleep(delay)
                yield job
                return
        assert NO_LISTENER in errors.read_text(), errors.read_text()
    pytest.fail(f"mpiexec has not started any rank, {STARTS} times\n{errors.read_text()}")


def has_saved(job, path, saves):
    """Waits until it has, so often; or says that it ended before."""
    last = path.stat().st_ino if path.exists() else None
    while saves > 0:
        if job.poll() is not None:
            return False
        now = path.stat().st_ino if path.exists() else None
        saves -= now != last
        last = now
        time.sleep(0.001)
    return True


def run_and_kill(ranks, path, more, saves, delay):
    """Ends all processes of a job by SIGKILL."""
    with running(ranks, path, more, saves, delay) as job:
        members = family(job.pid)
        assert len(members) > ranks
        orphans = shared_memory(members)
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped, no launcher ends the job itself
            for pid in members:
                with suppress(ProcessLookupError):  # one that was about to end
                    os.kill(pid, number)
        assert "test accuracy" not in job.stdout.read()
    assert job.returncode == -signal.SIGKILL
    for orphan in orphans:
        orphan.unlink(missing_ok=True)


def rank_processes(job):
    """The pids of a job's ranks."""
    python = [sys.executable, "-m", "mpi4py", str(SCRIPT)]
    ranks = []
    for pid in family(job.pid):
        with suppress(OSError):  # it has ended
            if Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:4] == python:
                ranks.append(pid)
    return ranks


def assert_equal(state, expected, tolerance):
    assert list(state) == list(expected)
    for name, array in expected.items():
        assert (state[name].dtype, state[name].shape) == (array.dtype, array.shape)
        if tolerance == 0:
            assert state[name].tobytes() == array.tobytes(), name
        else:
            scale = np.maximum(1, np.abs(array))
            assert (np.abs(state[name] - array) / scale).max() < tolerance, name
    assert state.metadata.keys() == expected.metadata.keys()
    ours, theirs = state.metadata["training"], expected.metadata["training"]
    assert {**ours, "loss": 0} == {**theirs, "loss": 0}
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
    course, other = state.metadata["course"], expected.metadata["course"]
    assert course["losses"] == pytest.approx(other["losses"], rel=1e-9)
    assert course["accuracies"] == other["accuracies"]


def steps_in(path):
    progress = cupybn.load(path).metadata["training"]
    return progress["epoch"] * 15 + progress["used"] // WHOLE


@pytest.mark.parametrize("says", [NO_LISTENER, "something else"])
def test_a_launcher_that_fails_before_any_rank_is_started_again(says, tmp_path, monkeypatch):
    log, launcher = tmp_path / "starts", tmp_path / "mpiexec"
    launcher.write_text(
        f'#!/bin/sh\necho >>{log}\n[ "$(wc -l <{log})" -le 1 ] || exec {_mpiexec()} "$@"\n'
        f'echo "{says}" >&2\nexit 213\n'
    )
    launcher.chmod(0o755)
    monkeypatch.setattr(sys.modules[__name__], "_mpiexec", lambda: launcher)
    if says == NO_LISTENER:
        run_and_kill(2, tmp_path / "state.npz", [], saves=1, delay=0)
        assert log.read_text() == "\n\n"
    else:
        with pytest.raises(AssertionError, match=says):
            run_and_kill(2, tmp_path / "state.npz", [], saves=1, delay=0)
        assert log.read_text() == "\n"


def test_killed_and_resumed_equals_never_killed(never_killed, mpirun, tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "state.npz"
    run_and_kill(4, path, [], saves=chance.randint(1, 5), delay=chance.uniform(0, 0.1))
    first = steps_in(path)
    assert 2 <= first < 30
    resume = ["--resume", path, "--seed", 9]  # whatever the seed: nothing is drawn anew
    run_and_kill(4, path, resume, saves=chance.randint(1, 5), delay=chance.uniform(0, 0.1))
    second = steps_in(path)
    assert first < second < 45
    other = tmp_path / "other.npz"
    mpirun(2, SCRIPT, *options(2, other, *resume))
    output = mpirun(4, SCRIPT, *options(4, path, *resume)).stdout
    assert "(b) 4 ranks, synchronised" in output
    assert_equal(cupybn.load(path), cupybn.load(never_killed), tolerance=0)
    assert_equal(cupybn.load(other), cupybn.load(never_killed), tolerance=1e-9)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_what_resumes_equals_never_stopped(
    number, never_killed, mpirun, tmp_path
):
    path = tmp_path / "state.npz"
    rarely = ["--save-every", 7]  # of the options' two, the last counts
    with running(4, path, rarely, saves=1, delay=random.uniform(0, 0.1)) as job:
        ranks = rank_processes(job)
        assert len(ranks) == 4
        os.kill(ranks[random.randrange(4)], number)
        output = job.stdout.read()
    assert job.returncode == 128 + signal.SIGTERM
    assert f"--resume {path} goes on from there" in output
    assert "test accuracy" not in output
    assert 7 <= steps_in(path) < 45
    mpirun(4, SCRIPT, *options(4, path, "--resume", path))
    assert_equal(cupybn.load(path), cupybn.load(never_killed), tolerance=0)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_state_does_not_depend_on_the_number_of_ranks(ranks, never_killed, mpirun, tmp_path):
    path = tmp_path / "state.npz"
    mpirun(ranks, SCRIPT, *options(ranks, path))
    assert_equal(cupybn.load(path), cupybn.load(never_killed), tolerance=1e-9)


def test_resuming_what_is_over_trains_no_further(never_killed, mpirun, tmp_path):
    path = tmp_path / "state.safetensors"
    output = mpirun(2, SCRIPT, *options(2, path, "--resume", never_killed)).stdout
    assert not path.exists()
    course = cupybn.load(never_killed).metadata["course"]
    assert f"{course['losses'][-1]:.4f} " in output
    assert f" {course['accuracies'][-1]:.1%}" in output


@pytest.mark.parametrize(
    "given, says",
    [
        (["--no-sync", "--save", "x.npz"], "every rank has statistics of its own"),
        (["--sync", "--save", "x.foo"], "--save: x.foo must end in .npz or .safetensors"),
    ],
)
def test_what_cannot_be_saved_is_said_before_training(given, says):
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *given],
        env=rank_environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 2
    assert says in process.stderr
