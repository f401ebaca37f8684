"""Real models: a ResNet trained over ranks is the computation of one process of plain PyTorch.

``mpi/run_torch_models.py`` trains for 20 steps, channels-last, with uneven batches, one of them
empty except under inductor; ``torch_models.py`` has the model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

PROGRAM = Path(__file__).parent / "mpi" / "run_torch_models.py"
JOBS = {  # ranks, blocks, ways
    "ResNet-18": (4, "basic", ["mpi", "gloo", "unsynchronised", "ddp"]),
    "bottlenecks": (4, "bottleneck", ["mpi", "gloo", "unsynchronised", "ddp"]),
    "sharded": (2, "basic", ["sharded"]),
    "inductor": (4, "basic", ["inductor"]),
    "autocast": (4, "basic", ["autocast"]),
}
pytestmark = [pytest.mark.mpi, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(mpirun, tmp_path_factory):
    """What came of a way of a job, each job run when it is asked for first."""
    found = {}

    def result(job, way):
        if job not in found:
            n, kind, ways = JOBS[job]
            folder = tmp_path_factory.mktemp(job.replace("-", ""))
            env = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "GLOO_SOCKET_IFNAME": "lo"}
            command = [PROGRAM, kind, folder / "store", *ways]
            output = mpirun(n, *command, timeout=500, env=env).stdout
            lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            found[job] = {line["way"]: line["result"] for line in lines}
        return found[job][way]

    return result


@pytest.mark.parametrize("way", ["mpi", "gloo", "ddp"])
@pytest.mark.parametrize("model", ["ResNet-18", "bottlenecks"])
def test_a_resnet_over_ranks_is_that_of_one_process(results, model, way):
    """In float64, all parameters and statistics; over MPI, over gloo, and with DDP over gloo."""
    assert results(model, way) < 1e-10
    assert results(model, "unsynchronised") > 1e-3


def test_a_resnet_compiled_by_inductor_is_that_of_one_process(results):
    assert results("inductor", "inductor") < 1e-10


def test_a_resnet_in_fully_sharded_ranks_is_that_of_one_process(results):
    assert results("sharded", "sharded") < 1e-10


def test_a_resnet_in_bf16_is_as_near_as_pytorch_is_to_itself(results):
    """Distances after 20 steps, to which rounding has grown: from PyTorch, and from float64.

    PyTorch's from itself are those of eight permutations of its batch. The quarter is for other
    processors: the ranks' distance is one draw, theirs the largest of eight.
    """
    found = results("autocast", "autocast")
    assert found["ranks"] <= 1.25 * max(found["permuted"])
    assert found["ranks from float64"] <= 1.25 * max(found["permuted from float64"])
