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
    "autocast of bottlenecks": (4, "bottleneck", ["autocast"]),
}
pytestmark = [pytest.mark.mpi, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(mpirun, tmp_path_factory):
    """What came of a way of a job, each job run when it is asked for first."""
    found = {}

    def result(job, way):
        if job not in found:
            n, kind, ways = JOBS[job]
            folder = tmp_path_factory.mktemp(job.replace("-", "").replace(" ", "_"))
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


@pytest.mark.parametrize("steps", ["2", "20"])
@pytest.mark.parametrize("job", ["autocast", "autocast of bottlenecks"])
def test_in_bf16_no_further_from_pytorch_than_pytorch_from_itself(results, job, steps):
    """Distances of the states from plain PyTorch's, where its batches are permuted, and of ours.

    Ranks round the gradient of a convolution's weight to bf16 before they add up theirs, as does
    plain PyTorch with a backward for each part of the batch, and not with one for all of it.
    """
    found = results(job, "autocast")[steps]
    assert found["plain"] == [0]
    assert len(found["permuted"]) == len(found["in parts"]) == 8
    assert 0 < found["ranks"][0] <= max(found["in parts"])
    assert 0 < found["one process"][0] <= max(found["permuted"])
