"""The PyTorch modules over ranks: the checks of torch_checks.py, over threads and real MPI."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch_checks import CHECKS, outcome, synchronised, tensor  # noqa: E402

from cupybn import CollectiveMismatchError, PeerError, ShapeError  # noqa: E402
from cupybn.interop import torch as interop  # noqa: E402
from cupybn.testing import run_ranks  # noqa: E402

MPI = Path(__file__).parent / "mpi"
torch.set_num_threads(1)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(CHECKS))
def test_over_threads(name, n):
    results = run_ranks(n, CHECKS[name], timeout=60)
    assert all(result == results[0] for result in results)


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 4])
def test_over_mpi(mpirun, n):
    printed = mpirun(n, MPI / "run_torch_checks.py", timeout=240).stdout
    assert printed.split() == list(CHECKS)


@pytest.mark.mpi
@pytest.mark.timeout(420)
@pytest.mark.parametrize(("n", "backends"), [(2, ["eager", "inductor"]), (4, ["inductor"])])
def test_compiled_layers_send_in_one_order_and_train_as_one_process(mpirun, n, backends, tmp_path):
    """Branches side by side, batches of very different sizes, and a rank without samples."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    process = mpirun(n, MPI / "torch_compiled.py", *backends, timeout=400, env=environment)
    messages = 3 * (5 * 2 + 5)
    assert process.stdout.split() == [word for name in backends for word in (name, str(messages))]


@pytest.mark.mpi
def test_a_rank_whose_loss_does_not_depend_on_a_layer_ends_the_job(mpirun):
    process = mpirun(
        2, MPI / "torch_failures.py", "constant", check=False, env={"CUPYBN_TIMEOUT": "2"}
    )
    assert process.returncode != 0
    assert "backward of 'features.bn'" in process.stderr
    process = mpirun(2, MPI / "torch_failures.py", "sum")
    assert process.stdout.count("went on") == 2  # the ranks' lines may be woven


def test_ranks_must_agree_on_whether_a_backward_can_follow():
    def forward(comm):
        module = interop.SyncBatchNorm(2, comm=comm)
        module.requires_grad_(comm.rank == 0)
        return outcome(lambda: module(torch.randn(4, 2)))

    results = run_ranks(2, forward, timeout=20)
    assert {kind for kind, _ in results} == {CollectiveMismatchError}
    assert "backward=True" in results[0][1]
    assert "backward=False" in results[0][1]


def test_ranks_must_agree_on_which_batch_it_is():
    def forward(comm):
        module = interop.SyncBatchNorm(2, comm=comm, momentum=None)
        module.num_batches_tracked += comm.rank
        return outcome(lambda: module(torch.randn(4, 2)))

    results = run_ranks(2, forward, timeout=20)
    assert {kind for kind, _ in results} == {CollectiveMismatchError}
    assert "batch 1" in results[0][1]
    assert "batch 2" in results[0][1]


@pytest.mark.parametrize("bad", ["channels", "dtype", "no tensor", "complex"])
def test_a_bad_input_on_one_rank_is_told_to_all_and_changes_nothing(bad):
    inputs = {
        "channels": torch.zeros(2, 3, 4, 4, dtype=torch.float64),
        "dtype": torch.zeros(2, 2, 4, 4),
        "no tensor": [[1.0]],
        "complex": torch.zeros(2, 2, 4, 4, dtype=torch.complex128),
    }

    def forward(comm):
        net = synchronised(comm)
        net.first = net.second = torch.nn.Identity()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        x = tensor((2, 4, 4, 4), comm.rank)
        result = outcome(lambda: net(x if comm.rank else inputs[bad]))
        assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
        net(x)  # the communicator is as good as before
        return result

    (own, message), (peers, told) = run_ranks(2, forward, timeout=20)
    assert own in (ShapeError, TypeError) or issubclass(own, TypeError | ValueError), message
    assert peers is PeerError
    assert "forward of 'left': rank 0 failed" in told


def test_what_fails_before_the_backward_is_told_to_all():
    def backward(comm):
        module = interop.SyncBatchNorm(2, comm=comm, name="bn")
        x = torch.randn(4, 2, requires_grad=True)
        z = x * 2
        y = module(z)
        if comm.rank == 0:
            z.add_(1)
        return outcome(lambda: y.sum().backward())

    (own, message), (peers, told) = run_ranks(2, backward, timeout=20)
    assert own is RuntimeError
    assert "modified by an inplace operation" in message
    assert peers is PeerError
    assert "backward of 'bn': rank 0 failed" in told


def test_what_fails_before_the_second_backward_is_told_to_all():
    def backward(comm):
        module = interop.SyncBatchNorm(2, comm=comm, name="bn")
        x = torch.randn(4, 2, requires_grad=True)
        z = x * 2
        (dx,) = torch.autograd.grad(module(z).sin().sum(), x, create_graph=True)
        if comm.rank == 0:
            z.add_(1)
        return outcome(lambda: dx.sin().sum().backward())

    (own, message), (peers, told) = run_ranks(2, backward, timeout=20)
    assert own is RuntimeError
    assert "modified by an inplace operation" in message
    assert peers is PeerError
    assert "double backward of 'bn': rank 0 failed" in told


@pytest.mark.mpi
@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_example_is_the_computation_of_one_process(request, launcher):
    for package in ("sklearn", "tqdm"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    example = Path(__file__).resolve().parent.parent / "examples" / "torch_sync_mpi.py"
    launch = request.getfixturevalue(launcher)
    output = launch(4, example, "--images", 99, "--epochs", 2, timeout=110).stdout
    rows = re.findall(r"^ *\(([abc])\) .*?(\d+\.\d{4}) +(\d+\.\d)%", output, re.MULTILINE)
    (_, loss_a, share_a), (_, loss_b, share_b), (_, loss_c, _) = rows
    assert (loss_b, share_b) == (loss_a, share_a)
    assert loss_c != loss_a
    b, c = map(float, re.findall(r"synchronised: (\d\.\de[+-]\d+)$", output, re.MULTILINE))
    assert b < 1e-9
    assert c > 1e-3
