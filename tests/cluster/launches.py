"""How the library finds its place under Slurm: processes alone in their world, cores of a rank."""

from __future__ import annotations

import jobs
import pytest

pytestmark = pytest.mark.timeout(900)
ALONE = "the launcher started 2 processes (SLURM_STEP_NUM_TASKS), but each of them is alone"


@pytest.fixture(params=list(jobs.VENVS))
def where(request):
    yield jobs.folder(request.param)
    jobs.clean_up()


def test_without_its_pmi_no_rank_trains_by_itself(where):
    """Slurm's own default is --mpi=none."""
    srun = "srun --nodes=2 --ntasks=2 --time=2"
    process = jobs.shell(f"{srun} venv/bin/python -m cupybn selftest --repeat 3", where)
    assert process.returncode != 0
    assert process.stdout.count(ALONE) == 2, process.stdout
    assert "all is well" not in process.stdout
    train = f"venv/bin/python -m mpi4py {jobs.SCRIPT} --epochs 1 --save state.npz"
    process = jobs.shell(f"{srun} {train}", where)
    assert process.returncode != 0
    assert ALONE in process.stdout, process.stdout
    assert not (where / "state.npz").exists()
    # In a script or shell of an allocation a process alone is nothing unusual.
    command = "venv/bin/python -m cupybn selftest --repeat 3"
    process = jobs.shell(f"salloc --nodes=2 --ntasks=2 --time=2 {command}", where)
    assert process.returncode == 0, process.stdout
    assert "all is well" in process.stdout


def test_cores_of_a_rank(where):
    """Of nodes with 2 ranks and 1; bound to its cores, or not."""
    program = (
        "import os; from cupybn.launcher import local_size, share_of_cores\n"
        "print('found', os.environ['SLURM_NODEID'], local_size(), share_of_cores())"
    )
    (where / "cores.py").write_text(program)
    for options, expected in {
        "--nodes=2 --ntasks=3": ["0 2 1", "0 2 1", "1 1 1"],
        "--nodes=1 --ntasks=1 --cpus-per-task=2": ["0 1 2"],
        "--nodes=1 --ntasks=2 --cpu-bind=none": ["0 2 1", "0 2 1"],
        "--nodes=1 --ntasks=1 --cpus-per-task=2 --cpu-bind=none": ["0 1 2"],
    }.items():
        process = jobs.shell(f"srun --time=2 {options} venv/bin/python cores.py", where)
        lines = process.stdout.splitlines()
        found = sorted(line.removeprefix("found ") for line in lines if line.startswith("found "))
        assert found == expected, (options, process.stdout)
