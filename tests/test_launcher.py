"""The launcher's environment variables of a process."""

from __future__ import annotations

import os

import pytest

from cupybn import launcher

VARIABLES = [
    *launcher.LOCAL_SIZE_VARIABLES, *launcher.SIZE_VARIABLES, *launcher.SIZE_VARIABLES.values(),
    launcher.ALLOW_SINGLETON, "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_CPUS_ON_NODE",
    "SLURM_TASKS_PER_NODE", "SLURM_NTASKS",
]  # fmt: skip


@pytest.fixture
def variables(monkeypatch):
    """``variables(**those_that_are_set)``."""

    def put(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    "env, named",
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, "OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE"),
        ({"PMI_SIZE": "1"}, None),
        ({"PMI_SIZE": "?"}, None),
        ({"MV2_COMM_WORLD_SIZE": "4"}, "MV2_COMM_WORLD_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS"),
        ({"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "0"}, "FLUX_JOB_SIZE"),
        # An allocation is no launch: a shell of `salloc`, the script of `sbatch`.
        ({"SLURM_NTASKS": "4"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, None),
        ({"FLUX_JOB_SIZE": "4"}, None),
        # A job of one rank, whose mpiexec came by way of a step of the batch system.
        ({"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, None),
        ({"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "PMI_SIZE"),
    ],
)  # fmt: skip
def test_a_process_alone_under_a_launcher_of_several(variables, env, named):
    variables(**env)
    assert launcher.singleton(4) is None
    problem = launcher.singleton(1)
    if named is None:
        assert problem is None
        return
    assert f"the launcher started 4 processes ({named})" in problem
    for advice in ("srun --mpi=pmi2", "srun --mpi=pmix", "own mpiexec", "CUPYBN_ALLOW_SINGLETON=1"):
        assert advice in problem
    for value, allowed in {"1": True, "0": False, "": False}.items():
        variables(**env, CUPYBN_ALLOW_SINGLETON=value)
        assert (launcher.singleton(1) is None) == allowed


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"MPI_LOCALNRANKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "5"}, 5),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_NODEID": "0"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_NODEID": "1"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3(x10),1", "SLURM_NODEID": "11"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3(x10),1", "SLURM_NODEID": "12"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "?", "SLURM_NODEID": "?"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_NODEID": "7"}, 1),
        ({"SLURM_TASKS_PER_NODE": "4", "SLURM_NTASKS": "4"}, 1),  # of an allocation
    ],
)
def test_ranks_on_this_machine(variables, env, expected):
    variables(**env)
    assert launcher.local_size() == expected


def of(*numbers):
    return set(range(*numbers))


FOUR = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
STEP = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    "env, own, launchers, expected",
    [
        ({}, of(8), of(8), 8),
        (FOUR, of(8), of(8), 2),  # nobody binds: a share
        (FOUR, of(2), of(8), 2),  # bound to its share
        (FOUR, of(1), of(8), 1),
        (FOUR, of(4, 8), of(8), 2),  # bound, two ranks to the same half of the machine
        ({}, of(2), of(8), 2),
        (FOUR, of(3), of(3), 1),  # more ranks than cores
        (FOUR, of(8), of(2), 2),  # the launcher is bound, its ranks are not
        # Slurm confines a step to 8 cores and binds no task; its daemon is not confined.
        (STEP | {"SLURM_CPUS_ON_NODE": "8"}, of(8), of(64), 2),
        (STEP | {"SLURM_CPUS_ON_NODE": "8"}, of(2), of(64), 2),
        (STEP | {"SLURM_CPUS_ON_NODE": "64"}, of(8), of(64), 8),
    ],
)
def test_the_cores_of_a_rank(variables, monkeypatch, env, own, launchers, expected):
    masks = {0: own, os.getppid(): launchers}
    monkeypatch.setattr(os, "sched_getaffinity", masks.__getitem__, raising=False)
    variables(**env)
    assert launcher.share_of_cores() == expected


def test_the_cores_of_a_rank_where_nobody_may_ask(variables, monkeypatch):
    def refused(pid):
        if pid:
            raise PermissionError
        return of(8)

    variables(**FOUR)
    monkeypatch.setattr(os, "sched_getaffinity", refused, raising=False)
    assert launcher.share_of_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert launcher.share_of_cores() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert launcher.share_of_cores() == 1
