"""``info`` and ``selftest`` for every rank: a line a host, differences marked, warnings."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import rank_environment, run_job

import cupybn
from cupybn.cli.hosts import table

PROGRAM = Path(__file__).parent / "mpi" / "hosts.py"


def cells(stdout):
    """The table of hosts, a dict for each line."""
    lines = stdout.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("host  "))
    end = lines.index("", begin) if "" in lines[begin:] else len(lines)
    rows = [re.split("  +", line.strip()) for line in lines[begin:end]]
    return [dict(zip(rows[0], row, strict=False)) for row in rows[1:] if len(row) > 2]


def test_a_line_for_each_host_and_differences_marked():
    ranks = [
        {"host": f"n{i // 2}", "cores": [2 * i, 2 * i + 1], "python": "3.11"} for i in range(6)
    ]
    ranks[4]["python"] = "3.12"
    assert table(ranks) == [
        "host  ranks       cores  python",
        "n0    ranks 0, 1  4      3.11",
        "n1    ranks 2, 3  4      3.11",
        "n2    rank 4      4      3.12 *",
        "n2    rank 5      4      3.11",
        "* differs from other ranks",
    ]
    # A version that knows of more than the others do.
    assert table([{"host": "n0", "cores": [0], "news": "1"}, {"host": "n1", "cores": [0]}]) == [
        "host  ranks   cores  news",
        "n0    rank 0  1      1",
        "n1    rank 1  1      ? *",
        "* differs from other ranks",
    ]


@pytest.mark.mpi
def test_ranks_that_are_alike(mpirun):
    process = mpirun(4, PROGRAM, "nothing", "info", aborting=False)
    first, second = cells(process.stdout)
    assert (first["host"], first["ranks"]) == ("host0", "ranks 0, 1")
    assert (second["host"], second["ranks"]) == ("host1", "ranks 2, 3")
    for row in (first, second):
        assert row["cores"] == "8"
        assert row["cupybn"] == cupybn.__version__
        assert row["CuPy by"] == "pinned"
        assert row["timeout"] == "600 s"
        assert {"Python", "NumPy", "MPI", "backend", "threads"} <= row.keys()
    assert "*" not in process.stdout
    assert "WARNING" not in process.stdout


@pytest.mark.mpi
@pytest.mark.parametrize("command", ["info", "selftest --repeat 3"])
def test_differences_are_marked(mpirun, command):
    process = mpirun(4, PROGRAM, "different", *command.split(), aborting=False)
    first, second, third = cells(process.stdout)
    assert [row["ranks"] for row in (first, second, third)] == ["ranks 0, 1", "rank 2", "rank 3"]
    assert "*" not in "".join(first.values())
    assert third["Python"] == "3.99 *"
    assert third["cupybn"] == cupybn.__version__ + ".other *"
    for row in (second, third):
        assert row["host"] == "host1"
        assert row["CuPy by"] == "device *"
        assert row["timeout"] == "77 s *"
    assert "* differs from other ranks" in process.stdout
    assert (
        "WARNING: the timeouts differ: 600 s on host0, 77 s on host1; all ranks take the longest. "
        "CUPYBN_TIMEOUT has to reach every host" in process.stdout
    )
    assert command == "info" or "all is well" in process.stdout


@pytest.mark.mpi
def test_more_ranks_than_cores_and_messages_that_take_long(mpirun):
    process = mpirun(4, PROGRAM, "crowded", "selftest", "--repeat", "3", aborting=False)
    assert "WARNING: 2 ranks on 1 core of host0: " in process.stdout
    assert "of host1" not in process.stdout
    assert [row["cores"] for row in cells(process.stdout)] == ["1", "2 *"]
    assert "WARNING: cpu, host: a message of C = 64 takes 7300 us" in process.stdout
    assert "all is well" in process.stdout  # slow, and right
    process = mpirun(4, PROGRAM, "crowded", "info", "--json", aborting=False)
    found = json.loads(process.stdout)
    assert [rank["host"] for rank in found["hosts"]] == ["host0", "host0", "host1", "host1"]
    assert [rank["cores"] for rank in found["hosts"]] == [[0], [0], [5], [6]]
    (warning,) = found["warnings"]
    assert warning.startswith("2 ranks on 1 core of host0")


@pytest.mark.mpi
def test_versions_that_do_not_understand_each_other(mpirun):
    """The table is there all the same, and the codes are right."""
    process = mpirun(4, PROGRAM, "protocols", "info", aborting=False)
    assert cells(process.stdout)[-1]["timeout"] == "ValueError *"
    assert "transport       CollectiveMismatchError: the ranks run versions" in process.stdout
    arguments = ("protocols", "selftest", "--repeat", "3")
    process = mpirun(4, PROGRAM, *arguments, aborting=False, check=False)
    assert process.returncode != 0
    assert len(cells(process.stdout)) == 3
    assert "protocol 9, host1" in process.stdout + process.stderr


@pytest.mark.mpi
def test_processes_that_do_not_find_each_other(mpirun):
    """Started by srun without a PMI: each of them is alone, and says so."""
    env = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        assert name not in rank_environment()
    command = [sys.executable, "-m", "cupybn"]
    process = run_job([*command, "selftest"], rank_environment(**env), 60)
    assert process.returncode == 1
    assert "FAILED: the launcher started 4 processes (SLURM_STEP_NUM_TASKS)" in process.stdout
    assert "all is well" not in process.stdout
    process = run_job([*command, "info", "--json"], rank_environment(**env), 60)
    assert "the launcher started 4 processes" in json.loads(process.stdout)["ranks"]
    process = run_job(
        [*command, "selftest", "--repeat", "3"],
        rank_environment(**env, CUPYBN_ALLOW_SINGLETON="1"),
        60,
    )
    assert process.returncode == 0
    assert "all is well" in process.stdout
