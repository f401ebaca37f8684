"""Every block of docs/clusters.md, on the hosts that ``cluster`` makes."""

from __future__ import annotations

from pathlib import Path

import jobs
import pytest

import cupybn

EPOCHS = 1
ROW = "(b) 2 ranks, synchronised"

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(params=list(jobs.VENVS))
def mpi(request):
    yield request.param
    jobs.clean_up()


@pytest.fixture
def where(mpi):
    return jobs.folder(mpi)


@pytest.fixture(scope="module")
def one_process():
    """The last state of one process that has the batches of both ranks."""
    where = jobs.folder(next(iter(jobs.VENVS)))
    process = jobs.shell(
        f"venv/bin/python {jobs.SCRIPT} --batch 4 --epochs {EPOCHS} --save state.npz", where
    )
    assert process.returncode == 0, process.stdout
    return cupybn.load(where / "state.npz")


@pytest.fixture(scope="module")
def uninterrupted():
    """By MPI the bytes of all arrays after a job that nothing happened to."""
    return {}


def content(path):
    return {name: array.tobytes() for name, array in cupybn.load(path).items()}


def steps_in(path):
    progress = cupybn.load(path).metadata["training"]
    return progress["epoch"] * 225 + progress["used"] // 4


def assert_close(path, expected):
    state = cupybn.load(path)
    assert list(state) == list(expected)
    for name, array in expected.items():
        assert abs(state[name] - array).max() < 1e-9, name


def test_every_block_of_the_document_is_run():
    run = Path(__file__).read_text()
    known = {"hosts-openmpi", "job.sh", "submit"}  # in jobs.py
    for name in jobs.BLOCKS:
        assert name in known or f'"{name}"' in run or name.startswith("ssh-"), name


def test_selftest_under_slurm(mpi, where):
    process = jobs.shell(jobs.block("selftest", mpi), where)
    assert process.returncode == 0, process.stdout
    assert "2 ranks on 2 machines" in process.stdout
    assert process.stdout.count("all is well") == 1


def test_processes_alone_are_an_error(mpi, where):
    command = jobs.block("selftest", mpi)
    for pmi in ("pmi2", "pmix"):
        command = command.replace(f"--mpi={pmi}", "--mpi=none")
    process = jobs.shell(command, where)
    assert process.returncode != 0
    assert "alone" in process.stdout
    assert "all is well" not in process.stdout


def test_a_job_trains_like_one_process(mpi, where, one_process, uninterrupted):
    job = jobs.submit(where, "--epochs", EPOCHS)
    assert jobs.ended(job, jobs.WHOLE) == "COMPLETED"
    assert ROW in (where / "job.out").read_text()
    assert_close(where / "state.npz", one_process)
    uninterrupted[mpi] = content(where / "state.npz")


def interrupted(where, how):
    """Submits, and does something to the job when it has saved once."""
    job = jobs.submit(where, "--epochs", EPOCHS)
    jobs.wait_for((where / "state.npz").exists, jobs.START)
    process = jobs.shell(how.format(job), where)
    assert process.returncode == 0, process.stdout
    return job


def test_a_job_near_its_end_saves_and_is_queued_again(mpi, where, uninterrupted):
    job = interrupted(where, "scancel --batch --signal=USR1 {}")  # what --signal=B:USR1@120 does
    jobs.wait_for(lambda: not jobs.ranks(), 30)
    output = (where / "job.out").read_text()
    assert "--resume state.npz goes on from there" in output
    assert ROW not in output
    assert steps_in(where / "state.npz") < 225
    assert jobs.ended(job, jobs.WHOLE) == "COMPLETED"
    assert ROW in (where / "job.out").read_text()
    assert content(where / "state.npz") == uninterrupted[mpi]


def test_a_cancelled_job_saves_and_goes_on_when_sent_again(mpi, where, uninterrupted):
    job = interrupted(where, "scancel {}")
    jobs.wait_for(lambda: not jobs.ranks(), 30)
    assert jobs.ended(job, 30) == "CANCELLED"
    assert "--resume state.npz goes on from there" in (where / "job.out").read_text()
    assert steps_in(where / "state.npz") < 225
    assert jobs.ended(jobs.submit(where, "--epochs", EPOCHS), jobs.WHOLE) == "COMPLETED"
    assert content(where / "state.npz") == uninterrupted[mpi]


def test_ssh(mpi, where, one_process):
    command = jobs.block(f"ssh-{mpi}", mpi).strip() + f" --epochs {EPOCHS}"
    with jobs.launched(command, where) as launcher:
        jobs.wait_for((where / "state.npz").exists, jobs.START)
        for host in ("n1", "n2"):
            (rank,) = jobs.ranks(host)
            variables = Path(f"/proc/{rank}/environ").read_text().split("\0")
            assert "CUPYBN_TIMEOUT=300" in variables
            assert "OMP_NUM_THREADS=1" in variables
        assert launcher.wait(jobs.WHOLE) == 0, (where / "out").read_text()
    assert ROW in (where / "out").read_text()
    assert_close(where / "state.npz", one_process)


@pytest.mark.slow
def test_compile_before_the_job(mpi, where):
    if mpi != "mpich":  # the one environment with Numba
        return
    kept = where / "kept"
    numba = f"export NUMBA_CACHE_DIR={kept} CUPYBN_CPU_BACKEND=numba\n"
    process = jobs.shell(numba + jobs.BLOCKS["compile"], where)
    assert process.returncode == 0, process.stdout
    compiled = set(kept.rglob("*.nbc"))
    assert compiled
    process = jobs.shell(numba + f"sbatch --wait job.sh --epochs {EPOCHS}", where)
    assert process.returncode == 0, (where / "job.out").read_text()
    assert set(kept.rglob("*.nbc")) == compiled
