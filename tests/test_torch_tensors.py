"""The tensors that PyTorch modules work on stay the user's: storages, versions, all or nothing."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from conftest import rank_environment  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import cupybn  # noqa: E402
from cupybn import DeviceError, DTypeError, PeerError, SelfCommunicator, arrays  # noqa: E402
from cupybn import functional as F  # noqa: E402
from cupybn.interop import torch as interop  # noqa: E402
from cupybn.interop.names import convert_state_dict  # noqa: E402
from cupybn.testing import run_ranks  # noqa: E402

torch.set_num_threads(1)
ALONE = SelfCommunicator()
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def resizable(*tensors):
    return [tensor.untyped_storage().resizable() for tensor in tensors]


# ---- storages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
def test_modules_leave_every_storage_resizable(dtype, layout):
    """FSDP frees parameters by resizing their storages to nothing."""
    module = interop.SyncBatchNorm(
        3, comm=ALONE, dtype=torch.float64 if dtype.itemsize > 4 else None
    )
    x = torch.randn(4, 3, 5, 5).to(dtype)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x[:, :, ::2]
    x.requires_grad_()
    dy = torch.randn(x.shape).to(dtype)
    for _ in range(3):  # unbound and bound
        y = module(x)
        dx, *gradients = torch.autograd.grad(y, [x, *module.parameters()], dy, create_graph=True)
        second = torch.autograd.grad(dx.sin().sum(), x)
        tensors = [x, dy, y, dx, *gradients, *second, *module.state_dict(keep_vars=True).values()]
        assert all(resizable(*tensors))
    (module(x) ** 2).sum().backward()
    interop.allreduce_gradients(module, ALONE)
    interop.broadcast_parameters(module, ALONE)
    interop.verify_sync(module, ALONE)
    assert all(resizable(*[p.grad for p in module.parameters()], *module.parameters()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_and_functions_leave_every_storage_resizable(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = (torch.randn(4, 3, 5, 5).to(dtype) for _ in "ab")
    weight, bias, mean, var = (torch.rand(3, dtype=wide) for _ in range(4))
    layer = cupybn.BatchNorm2d(3, dtype=str(wide).removeprefix("torch."))
    for _ in range(3):
        layer.forward(x, dy)
        layer.backward(dy)
    layer.load_state_dict({"weight": weight, "bias": bias, "running_mean": mean,
                           "running_var": var, "num_batches_tracked": torch.tensor(7)})  # fmt: skip
    _, saved = F.batch_norm_forward(x, weight, bias, residual=dy)
    F.batch_norm_backward(dy, saved)
    F.batch_norm_double_backward(x, None, None, saved, dy)
    F.update_running(mean, var, saved, 0.1)
    F.batch_norm_inference(x, mean, var, weight, bias)
    F.batch_moments(x.reshape(4, 3, 25))
    assert all(resizable(x, dy, weight, bias, mean, var))


def test_one_buffer_takes_batches_of_any_size():
    module, buffer = interop.BatchNorm1d(3), torch.empty(0)
    for n in (4, 6, 2):
        torch.randn(n, 3, out=buffer.resize_(0))
        with torch.no_grad():
            assert module(buffer).shape == (n, 3)


def test_an_array_keeps_its_tensor_alive_and_a_freed_one_is_refused():
    tensor = torch.arange(4.0)
    array = cupybn.arrays.as_array(tensor)
    address = tensor.data_ptr()
    del tensor
    others = [torch.zeros(4) for _ in range(50)]
    assert array.tolist() == [0, 1, 2, 3]
    assert array.ctypes.data == address
    assert all(other.data_ptr() != address for other in others)
    freed = torch.zeros(4, 3)
    freed.untyped_storage().resize_(0)
    for call in (cupybn.BatchNorm1d(3), interop.BatchNorm1d(3)):
        with pytest.raises(DTypeError, match="memory was freed"):
            call(freed)
    module = interop.BatchNorm1d(3)
    module.weight.untyped_storage().resize_(0)
    with pytest.raises(DTypeError, match="memory was freed"):
        module(torch.randn(4, 3))
    assert module.num_batches_tracked == 0


def test_tensors_that_stand_for_others_are_refused_by_name():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(4, 3)
    for tensor, text in (
        (fake, "FakeTensor on cpu"),
        (torch.zeros(4, 3, device="meta"), "on meta"),
    ):
        with pytest.raises(DeviceError, match=text):
            cupybn.BatchNorm1d(3)(tensor)


FSDP = """
import os, sys, warnings
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from cupybn.interop import torch as interop

warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
results = []
for kind in (torch.nn.BatchNorm1d, interop.BatchNorm1d):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), kind(4))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(5, 3)) ** 3).sum().backward()
        optimizer.step()
    results.append(torch.cat([p.detach().to_local().reshape(-1) for p in model.parameters()]))
torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
print("the same", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.timeout(320)
def test_fully_shard_frees_and_restores_the_parameters(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", FSDP, str(tmp_path / "store")],
        env=rank_environment() | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        timeout=300,
    )
    assert process.stdout == "the same\n", process.stderr


# ---- all or nothing ------------------------------------------------------------------------------


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def in_inference_mode(module):
    with torch.inference_mode():
        made = type(module)(3, comm=module.comm)
    module._buffers = made._buffers


def without(*names):
    def change(module):
        for name in names:
            setattr(module, name, None)

    return change


def counter(tensor):
    return lambda module: setattr(module, "num_batches_tracked", tensor)


BROKEN = {
    "made in inference mode": (in_inference_mode, RuntimeError, "inference_mode"),
    "no running mean": (without("running_mean"), ValueError, "must either both be None"),
    "no running variance": (without("running_var"), ValueError, "must either both be None"),
    "two counters": (counter(torch.zeros(2, dtype=torch.int64)), ValueError, "one integer"),
    "a counter of booleans": (counter(torch.tensor(False)), ValueError, "one integer"),
    "momentum of another shape": (
        lambda module: setattr(module, "momentum", torch.tensor([0.1])), TypeError, "momentum must",
    ),
    "momentum that requires grad": (
        lambda module: setattr(module, "momentum", torch.tensor(0.1, requires_grad=True)),
        TypeError,
        "momentum must",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("what", list(BROKEN))
def test_what_cannot_be_updated_is_told_before_anything_moves(what, bound):
    """To the other ranks too, whose statistics stay where they were, and the next call works."""
    change, kind, text = BROKEN[what]
    expected = [(PeerError, "rank 1 failed"), (kind, text)]

    def rank(comm):
        module = interop.SyncBatchNorm(3, comm=comm, name="bn")
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(comm.rank)) + 5
        for _ in range(3 if bound else 0):
            module(x)
        momentum, buffers = module.momentum, dict(module._buffers)
        if comm.rank == 1:
            change(module)
        before = state(module)
        with pytest.raises(expected[comm.rank][0], match=expected[comm.rank][1]):
            module(x)
        for key, value in state(module).items():
            assert torch.equal(value, before[key]), key
        module.momentum, module._buffers = momentum, buffers
        module(x)
        return state(module)["running_mean"].tolist()

    first, second = run_ranks(2, rank, timeout=30)
    assert first == second


def test_statistics_of_inference_mode_are_updated_within_it():
    ours, theirs = interop.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    with torch.inference_mode():
        modules = [type(module)(3) for module in (ours, theirs)]
        x = torch.randn(4, 3)
        for module in modules:
            for _ in range(3):
                module(x)
        assert modules[0].num_batches_tracked == 3
        torch.testing.assert_close(modules[0].running_var, modules[1].running_var)
    before = modules[0].running_var.clone()
    with pytest.raises(RuntimeError, match=r"running_mean was made in torch\.inference_mode"):
        modules[0](x.clone())
    assert torch.equal(modules[0].running_var, before)
    for name, buffer in list(modules[0].named_buffers()):  # the advice
        setattr(modules[0], name, buffer.clone())
    with torch.no_grad():
        modules[0](torch.randn(4, 3))
    assert modules[0].num_batches_tracked == 4


@pytest.mark.parametrize(
    "momentum",
    [torch.tensor(0.3), torch.tensor(1), torch.tensor(0.3, dtype=torch.float64)],
    ids=str,
)
def test_momentum_may_be_a_tensor_and_may_change_in_place(momentum):
    modules = interop.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    for module in modules:
        module.momentum = momentum.clone()
    for factor in (1, 1, 1, 0.5):
        x = torch.randn(8, 3)
        for module in modules:
            module.momentum *= factor if module.momentum.is_floating_point() else 1
            module(x)
        torch.testing.assert_close(modules[0].running_mean, modules[1].running_mean)
        torch.testing.assert_close(modules[0].running_var, modules[1].running_var)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_a_counter_as_pytorch(momentum):
    modules = interop.BatchNorm1d(3, momentum=momentum), torch.nn.BatchNorm1d(3, momentum=momentum)
    for module in modules:
        module.num_batches_tracked = None
    for _ in range(3):
        x = torch.randn(8, 3)
        for module in modules:
            module(x)
        torch.testing.assert_close(modules[0].running_mean, modules[1].running_mean)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_of_one_element_counts(momentum):
    module, other = (interop.BatchNorm1d(3, momentum=momentum) for _ in "ab")
    module.num_batches_tracked = torch.tensor([5])
    other.num_batches_tracked += 5
    for n in range(1, 4):
        x = torch.randn(8, 3)
        module(x)
        other(x)
        assert module.num_batches_tracked.tolist() == [5 + n]
        assert torch.equal(module.running_mean, other.running_mean)


def test_old_checkpoints_have_a_counter_of_one_element():
    """Of PyTorch 0.3: torch.nn, the modules here and the layers load it."""
    old = torch.nn.BatchNorm2d(3).state_dict()
    old["num_batches_tracked"] = torch.tensor([7])
    arrays = {key: value.numpy() for key, value in old.items()}
    renamed = convert_state_dict(arrays, "pytorch", "cupybn")
    cases = [(torch.nn.BatchNorm2d, old), (interop.BatchNorm2d, old)]
    cases += [(cupybn.BatchNorm2d, state) for state in (old, arrays, renamed)]
    for kind, given in cases:
        module = kind(3)
        module.load_state_dict(given)
        assert int(module.num_batches_tracked) == 7
        assert module.num_batches_tracked.shape == ()
    with pytest.raises(cupybn.StateDictError, match="size mismatch for num_batches_tracked"):
        cupybn.BatchNorm2d(3).load_state_dict(arrays | {"num_batches_tracked": np.zeros(2, int)})
    with pytest.raises(cupybn.StateDictError, match="size mismatch for weight"):
        cupybn.BatchNorm2d(1).load_state_dict(arrays | {"weight": np.zeros(())}, strict=False)


def test_a_gradient_of_evaluation_that_the_statistics_have_left_is_refused():
    """Eval keeps the running statistics for its backward, and training moves them: with PyTorch's
    own module the gradient is silently that of the new ones."""
    module, x = interop.BatchNorm1d(3), torch.randn(8, 3, requires_grad=True)
    for _ in range(3):
        y = module.eval()(x)
        module.train()(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# ---- recomputation -------------------------------------------------------------------------------

SHAPES = [(64, 5), (4, 3, 7, 5), (2, 8, 33, 31), (3, 2, 3, 4, 5), (1, 16, 300), (0, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0, 1e3])
def test_a_recomputed_y_keeps_its_bits(shape, dtype, mean):
    def rank(comm):
        found = []
        generator = torch.Generator().manual_seed(comm.rank)
        for last in (False, True):
            for affine in (True, False):
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                module = interop.SyncBatchNorm(shape[1], comm=comm, affine=affine, dtype=wide)
                if affine:
                    with torch.no_grad():
                        module.weight.uniform_(-2, 2, generator=generator)
                        module.bias.uniform_(-2, 2, generator=generator)
                x = (torch.randn(shape, generator=generator) * 3 + mean).to(dtype)
                if last:
                    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
                ys = []

                def run(x, module=module, ys=ys):
                    ys.append(module(x))
                    return ys[-1].sin()

                out = checkpoint(
                    run,
                    x.requires_grad_(),
                    use_reentrant=False,
                    context_fn=interop.recompute_contexts,
                )
                out.sum().backward()
                found.append(torch.equal(*ys))
        return all(found), len(ys)

    for n in (1, 2):
        assert run_ranks(n, rank, timeout=30) == [(True, 2)] * n


@pytest.mark.parametrize(("shape", "asked"), [((16, 256, 32, 32), 2), ((16, 256, 8, 8), 0)])
def test_large_outputs_ask_for_huge_pages(shape, asked, monkeypatch):
    """For whole pages of their own memory alone: y in forward, dx in backward."""
    calls = []
    monkeypatch.setattr(arrays, "_madvise", lambda *given: calls.append(given))
    x = torch.randn(shape, requires_grad=True)
    y = interop.BatchNorm2d(shape[1])(x)
    y.sum().backward()
    assert len(calls) == asked
    for (begin, size, advice), tensor in zip(calls, (y, x.grad), strict=False):
        assert (begin % mmap.PAGESIZE, advice) == (0, 14)
        assert 0 <= begin - tensor.data_ptr() < mmap.PAGESIZE
        assert begin + size == tensor.data_ptr() + tensor.nbytes
