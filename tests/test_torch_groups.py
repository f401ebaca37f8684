"""Process groups of torch.distributed as communicators: gloo. NCCL needs GPUs and is not run."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from conftest import NUMBA  # noqa: E402
from torch import distributed  # noqa: E402

import cupybn  # noqa: E402
from cupybn.communicators import MpiCommunicator, SelfCommunicator  # noqa: E402
from cupybn.interop import torch as interop  # noqa: E402
from cupybn.interop.torch.groups import resolve  # noqa: E402
from cupybn.launcher import STARTED_VARIABLES  # noqa: E402

MPI = Path(__file__).parent / "mpi"
torch.set_num_threads(1)


def begin():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*STARTED_VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def group(no_launcher):
    """The default group, of this process alone."""
    begin()
    yield distributed.group.WORLD
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_over_gloo_under_torchrun_without_mpi(torchrun):
    from torch_checks import CHECKS

    assert torchrun(4, MPI / "run_torch_checks.py", timeout=110).stdout.split() == list(CHECKS)


@pytest.mark.mpi
def test_every_fault_is_told_over_a_process_group_as_over_mpi(mpirun, tmp_path):
    """Headers, failures and mismatches: the same texts, and nothing changed."""
    lines = []
    for args in ([], [tmp_path / "store"]):
        output = mpirun(2, MPI / "failures.py", *args, timeout=110).stdout
        lines.append(sorted(output.splitlines()))
    assert len(lines[0]) > 100
    errors = {json.loads(line).get("error") for line in lines[0]}
    assert errors > {"PeerError", "ShapeError", "CollectiveMismatchError"}
    assert lines[0] == lines[1]


def told(mpirun, tmp_path, case, n=2):
    output = mpirun(n, MPI / "process_groups.py", case, tmp_path / "store", aborting=False).stdout
    return sorted(line for line in output.splitlines() if line)


@pytest.mark.mpi
def test_a_rank_that_is_gone_is_told_with_the_layer(mpirun, tmp_path):
    lines = told(mpirun, tmp_path, "gone")
    assert len(lines) == 1
    assert lines[0].startswith("rank 0: PeerError: forward of 'features.bn', rank 0 of 2: ")


@pytest.mark.mpi
def test_the_groups_timeout_is_told_with_the_layer(mpirun, tmp_path):
    first, second = told(mpirun, tmp_path, "late")
    assert first.startswith("rank 0: CollectiveTimeoutError: forward of 'features.bn', rank 0 of 2")
    assert second.startswith("rank 1: PeerError: forward of 'features.bn', rank 1 of 2")


@pytest.mark.mpi
def test_another_version_is_an_error_on_every_rank(mpirun, tmp_path):
    lines = told(mpirun, tmp_path, "version", 3)
    assert len(lines) == 3
    assert len({line.partition(": ")[2] for line in lines}) == 1
    assert "CollectiveMismatchError: features.bn: the ranks run versions of cupybn that" in lines[0]
    assert "ranks 0, 1: cupybn" in lines[0]
    assert "rank 2: cupybn" in lines[0]


@pytest.mark.mpi
@pytest.mark.skipif(not NUMBA, reason="Numba is not installed")
@pytest.mark.parametrize(("ranks", "kind"), [(2, "layer"), (3, "module")])
def test_where_one_rank_cannot_use_numba_all_compute_with_numpy(mpirun, tmp_path, ranks, kind):
    """From the first forward on, for they agree before anything is computed."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "numba.py").write_text("raise SystemError('bad code object')\n")
    said = {}
    for backend in ("auto", "numpy"):
        command = MPI / "broken_numba.py", tmp_path / backend, kind
        env = {"CUPYBN_CPU_BACKEND": backend}
        output = mpirun(ranks, *command, env=env, aborting=False).stdout
        said[backend] = [line.split(" | ") for line in sorted(output.splitlines()) if line]
    assert [line[:3] for line in said["auto"]] == [line[:3] for line in said["numpy"]]
    assert [line[1] for line in said["auto"]] == [""] * ranks  # nothing came from Numba
    warned = [line[3:] for line in said["auto"]]
    assert warned[1:] == [[]] * (ranks - 1)
    (text,) = warned[0]
    assert text.startswith("Numba is installed, but not all ranks can use it, so NumPy computes on")
    assert "no problem" in text
    assert f"rank {ranks - 1}: " in text
    assert text.endswith("SystemError: bad code object")


@pytest.mark.mpi
def test_messages_of_different_length_end_the_job(mpirun, tmp_path):
    """As with MPI, though not by this library: gloo ends the process that notices."""
    command = MPI / "process_groups.py", "length", tmp_path / "store"
    assert mpirun(2, *command, aborting=False, check=False).returncode != 0


@pytest.mark.parametrize(
    ("variables", "takes_group"),
    [
        ({}, True),
        ({"PMI_RANK": "0"}, False),  # mpiexec of MPICH
        ({"OMPI_COMM_WORLD_SIZE": "4"}, False),
        ({"PMI_RANK": "0", "TORCHELASTIC_RUN_ID": "1"}, True),  # torchrun, started by mpiexec
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, True),  # srun without PMI
    ],
    ids=str,
)
def test_what_no_comm_stands_for(group, monkeypatch, variables, takes_group):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    module = interop.SyncBatchNorm(3)
    expected = "default process group (cpu:gloo,cuda:gloo)" if takes_group else "MPI.COMM_WORLD"
    assert repr(module).endswith(f", comm={expected})")
    if takes_group:
        assert resolve(None) is resolve(group)
        module(torch.randn(4, 3))
        assert module.communicator() is resolve(group)
        text = "ProcessGroupCommunicator(rank 0 of 1, cpu:gloo,cuda:gloo)"
        assert repr(module).endswith(f", comm={text})")
        distributed.destroy_process_group()
    assert repr(interop.SyncBatchNorm(3)).endswith(", comm=MPI.COMM_WORLD)")


def test_what_text_says_of_other_communicators():
    module = interop.SyncBatchNorm(3, comm=SelfCommunicator())
    assert repr(module).endswith(", comm=SelfCommunicator())")
    twin = torch.nn.Module.__new__(interop.SyncBatchNorm)
    twin.__setstate__(module.__getstate__() | {"_comm": module._comm.__class__(None, True)})
    assert repr(twin).endswith(", comm=left behind by pickling)")


def test_a_group_is_taken_wherever_a_communicator_is(group):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    net = interop.convert_sync_batchnorm(net, group)
    assert isinstance(net[1].comm, interop.ProcessGroupCommunicator)
    net(torch.randn(4, 3)).sum().backward()
    gradient = net[0].weight.grad.clone()
    interop.allreduce_gradients(net, group)
    assert torch.equal(net[0].weight.grad, gradient)
    interop.broadcast_parameters(net, group)
    interop.verify_sync(net, group)
    module = interop.SyncBatchNorm(3)
    module.comm = group
    assert module.comm is net[1].comm


def test_layers_take_the_communicator_and_say_so(group):
    layer = cupybn.SyncBatchNorm(3, comm=interop.ProcessGroupCommunicator(group))
    layer.forward(np.ones((4, 3), np.float32))
    with pytest.raises(TypeError, match=r"got ProcessGroup\. For a process group .*Communicator"):
        cupybn.SyncBatchNorm(3, comm=group)


def test_a_group_that_this_process_is_not_in():
    for comm in (distributed.GroupMember.NON_GROUP_MEMBER,):
        with pytest.raises(ValueError, match="a process group that this process is not in"):
            interop.SyncBatchNorm(3, comm=comm)
    with pytest.raises(ValueError, match=r"no default process group: call torch\.distributed\.in"):
        interop.ProcessGroupCommunicator()


def test_a_group_that_is_destroyed_is_let_go_and_told(no_launcher):
    begin()
    module = interop.SyncBatchNorm(3, comm=distributed.group.WORLD, name="bn")
    comm, alive = module.comm, weakref.ref(distributed.group.WORLD)
    comm.allreduce(np.ones(3))
    distributed.destroy_process_group()
    gc.collect()
    with pytest.raises(RuntimeError, match=r"^sum: the process group was destroyed.*module\.comm"):
        comm.allreduce(np.ones(3), "sum")
    assert alive() is None
    begin()  # and the advice works
    for new in (distributed.group.WORLD, None):
        module.comm = new
        module(torch.randn(4, 3))
        assert module.communicator() is resolve(distributed.group.WORLD) is not comm
    distributed.destroy_process_group()


def test_the_communicator_belongs_to_its_process(group):
    import copy
    import pickle

    module = interop.SyncBatchNorm(3, comm=group)
    assert copy.deepcopy(module).comm is module.comm
    assert pickle.loads(pickle.dumps(module)).comm is None
    with pytest.raises(TypeError, match="a ProcessGroupCommunicator belongs to its process"):
        pickle.dumps(module.comm)


@pytest.mark.mpi
def test_mpi_is_as_it_was(group, monkeypatch):
    from mpi4py import MPI

    monkeypatch.setenv("PMI_RANK", "0")
    assert isinstance(resolve(None), MpiCommunicator)
    assert resolve(MPI.COMM_SELF).mpi_comm is MPI.COMM_SELF


class OnDevice:
    """A message of CuPy's, as far as a communicator looks at it, in host memory."""

    def __init__(self, values):
        self.values = np.array(values)
        self.device = contextlib.nullcontext()
        self.device.id = 3

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


@pytest.mark.parametrize("backend", ["cuda:nccl", "cpu:gloo,cuda:nccl"])
def test_nccl_sums_on_the_stream_and_device_of_the_message(group, monkeypatch, backend):
    """A stand-in for NCCL, which needs GPUs: what it is given, where, and on which stream."""
    cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=77))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=OnDevice, cuda=cuda))
    streams, summed = [], []

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    def all_reduce(tensor, op=distributed.ReduceOp.SUM, group=None):
        summed.append((getattr(tensor, "copied", False), op, [*streams]))
        if op == distributed.ReduceOp.SUM:
            tensor *= 2

    def copied(tensor):
        tensor = tensor.clone()
        tensor.copied = True
        return tensor

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr, device: (ptr, str(device)))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "cuda", copied)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    comm = interop.ProcessGroupCommunicator(group)
    comm.backend = backend
    message, host = OnDevice([1.0, 2.5]), np.array([3, 4])
    assert comm.allreduce(message) is message
    assert message.values.tolist() == [2.0, 5.0]  # in place, in the memory of the message
    assert comm.allreduce(host) is host
    assert host.tolist() == [6, 8]
    through_device = "cpu:" not in backend  # a group of NCCL alone has nothing for host memory
    total, least = distributed.ReduceOp.SUM, distributed.ReduceOp.MIN
    expected = [(through_device, least, []), (False, total, [(77, "cuda:3")])]
    assert summed == [*expected, (through_device, total, [])]
