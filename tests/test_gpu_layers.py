"""Layers, functional and ranks on CuPy arrays: against the NumPy backend, and as guests of a GPU.

What is asked of a guest: the caller's device, stream and allocator, no waiting, no allocations but
results, other libraries' tensors without a copy, and work that a CUDA graph can capture.
"""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import reference
from conftest import TOLERANCE
from rank_checks import Spy, shard
from test_gpu import DTYPES, ON_GPU, allocating_with, cp
from test_layers import layer_for, normal

import cupybn
from cupybn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    DeviceError,
    Sequential,
    SyncBatchNorm,
    distributed,
)
from cupybn import functional as F
from cupybn.arrays import copy_to_host
from cupybn.backends.cuda import launch
from cupybn.testing import run_ranks

pytestmark = ON_GPU

ALONE = cupybn.SelfCommunicator()
FLOAT32 = np.dtype(np.float32)
SPLIT = (64, 8, 28, 28)  # several blocks a channel: needs scratch
SPIN = """
extern "C" __global__ void spin(long long cycles) {
  long long begin = clock64();
  while (clock64() - begin < cycles) {}
}
"""


def pair(dtype, cls=BatchNorm2d, c=5, **options):
    """The same layer on the CPU and on the GPU."""
    layer = layer_for(dtype, cls, c, **options)
    return layer, copy.deepcopy(layer).to("cuda")


def state(layer):
    """Everything a layer keeps, on the host."""
    arrays = [*layer.named_parameters(), *layer.named_gradients(), *layer.named_buffers()]
    return [(name, copy_to_host(array)) for name, array in arrays]


def bits(layer):
    return [(name, array.tobytes()) for name, array in state(layer)]


def difference(got, expected):
    return reference.error(copy_to_host(got), expected)


def same_state(layer, other, tolerance=1e-5):
    for (name, a), (_, b) in zip(state(layer), state(other), strict=True):
        assert difference(a, b.astype(np.float64)) <= tolerance, name


def away_from_the_kink(dy, y):
    """dy without the values whose ReLU rounding decides."""
    return np.where(np.abs(y) < 1e-3, 0, dy.astype(np.float32)).astype(dy.dtype)


def layouts(values):
    """The same (N, C, H, W) values in every memory layout a caller may come with."""

    def permuted(*axes):
        return cp.asarray(values.transpose(axes).copy()).transpose(*np.argsort(axes).tolist())

    wide = np.zeros(tuple(2 * n for n in values.shape), values.dtype)
    every_second = tuple(slice(0, 2 * n, 2) for n in values.shape)
    wide[every_second] = values
    return {
        "contiguous": cp.asarray(values),
        "channels-last": permuted(0, 2, 3, 1),
        "fortran": permuted(3, 2, 1, 0),
        "transposed": permuted(2, 0, 3, 1),
        "negative strides": cp.asarray(values[::-1, :, ::-1].copy())[::-1, :, ::-1],
        "strided slice": cp.asarray(wide)[every_second],
    }


KINDS = [
    "contiguous", "channels-last", "fortran", "transposed", "negative strides", "strided slice",
]  # fmt: skip


# ---- against the CPU -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_training_and_evaluation(dtype, kind, residual, relu):
    cpu, gpu = pair(dtype, activation="relu" if relu else None)
    x, r, dy = (normal((6, 5, 7, 9), dtype, seed) for seed in range(3))
    r = r if residual else None
    tolerance = TOLERANCE[dtype.name]
    for mode in (True, False):
        cpu.train(mode), gpu.train(mode)
        fixed = cpu.running_mean, cpu.running_var
        if mode:
            before = reference.forward(x, cpu.weight, cpu.bias, residual=r).y
        else:
            before = reference.normalized(x, *fixed, cpu.weight, cpu.bias, residual=r)
        dy = away_from_the_kink(dy, before) if relu else dy
        exact = np.maximum(before, 0) if relu else before
        kept = before > 0 if relu else None
        gradient = reference.backward(
            dy, x, cpu.weight, cpu.bias, kept=kept, fixed=None if mode else fixed
        )
        given = layouts(x)[kind]
        y = gpu.forward(given, None if r is None else cp.asarray(r), save_for_backward=True)
        expected = cpu.forward(x, r, save_for_backward=True)
        results = gpu.backward(layouts(dy)[kind]), cpu.backward(dy)
        dx, expected_dx = (result[0] if residual else result for result in results)
        for array in (y, dx):
            assert isinstance(array, cp.ndarray)
            assert (array.dtype, array.shape, array.device) == (dtype, x.shape, given.device)
            if kind == "channels-last":
                assert array.transpose(0, 2, 3, 1).flags.c_contiguous
            elif kind == "contiguous":
                assert array.flags.c_contiguous
        assert difference(y, exact) < tolerance
        assert difference(dx, gradient.dx) < tolerance
        assert difference(y, expected.astype(np.float64)) < tolerance
        assert difference(dx, expected_dx.astype(np.float64)) < tolerance
        if residual:
            assert difference(results[0][1], gradient.dz if relu else dy.astype("d")) < 1e-12
        same_state(gpu, cpu)


OPTIONS = [
    {}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None},
    {"momentum": 0.0}, {"momentum": 1.0}, {"eps": 0.1}, {"check_finite": True},
    {"activation": "relu", "momentum": 0.3, "bias": False},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, np.dtype(np.float64)], ids=str)
def test_every_option(options, dtype):
    cpu, gpu = pair(dtype, **options)
    tolerance = TOLERANCE[dtype.name]
    for seed, mode in enumerate((True, True, False, True)):
        cpu.train(mode), gpu.train(mode)
        x, dy = (normal((4, 5, 6, 7), dtype, 10 * seed + i) for i in range(2))
        y, expected = (
            layer.forward(array, save_for_backward=True)
            for layer, array in ((gpu, cp.asarray(x)), (cpu, x))
        )
        if "activation" in options:  # y is 0 at and below the kink
            dy = np.where(expected > 1e-3, dy, 0).astype(dtype)
        dx, expected_dx = gpu.backward(cp.asarray(dy)), cpu.backward(dy)
        assert difference(y, expected) < tolerance
        assert difference(dx, expected_dx) < tolerance
        same_state(gpu, cpu, tolerance)
    if "num_batches_tracked" in gpu.buffers:
        assert isinstance(gpu.num_batches_tracked, np.ndarray)
        assert gpu.num_batches_tracked == 3


@pytest.mark.parametrize(
    "cls, shape, options",
    [
        (BatchNorm1d, (16, 5), {}), (BatchNorm1d, (16, 5, 9), {}),
        (BatchNorm3d, (2, 5, 3, 4, 5), {}), (SyncBatchNorm, (16, 5), {"comm": ALONE}),
        (SyncBatchNorm, (2, 5, 2, 2, 2, 2), {"comm": ALONE}),
        (BatchNorm2d, (4, 6, 7, 5), {"channel_axis": -1}),
        (BatchNorm1d, (4, 7, 5), {"channel_axis": -1}),
        (SyncBatchNorm, (16, 5), {"comm": ALONE, "channel_axis": -1}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_class_and_axis(cls, shape, options, dtype):
    cpu, gpu = pair(dtype, cls, **options)
    x, dy = normal(shape, dtype, 1), normal(shape, dtype, 2)
    memories = [cp.asarray(x)]
    if len(shape) > 2 and options.get("channel_axis") == -1:
        memories.append(cp.moveaxis(cp.asarray(np.moveaxis(x, -1, 1).copy()), 1, -1))
    expected, expected_dx = cpu.forward(x), cpu.backward(dy)
    for memory in memories:
        gpu.zero_grad()
        gpu.reset_running_stats()
        y, dx = gpu.forward(memory), gpu.backward(cp.asarray(dy))
        assert y.strides == memory.strides
        assert difference(y, expected.astype(np.float64)) < TOLERANCE[dtype.name]
        assert difference(dx, expected_dx.astype(np.float64)) < TOLERANCE[dtype.name]
        same_state(gpu, cpu)


def test_out():
    cpu, gpu = pair(FLOAT32)
    x, dy, r = (normal((4, 5, 6, 7), seed=seed) for seed in range(3))
    gx, gdy, gr = map(cp.asarray, (x, dy, r))
    expected, expected_dx = cpu.forward(x), cpu.backward(dy)
    for kind in ("contiguous", "fortran", "channels-last", "strided slice"):
        out = layouts(np.zeros_like(x))[kind]
        assert gpu.forward(gx, out=out) is out
        assert difference(out, expected) < 1e-5
        mine = gdy.copy()
        assert gpu.backward(mine, out=mine) is mine
        assert difference(mine, expected_dx) < 1e-5
    with pytest.raises(ValueError, match="out overlaps x, which backward needs"):
        gpu.forward(gx, out=gx)
    gpu.forward(gx, gr)
    with pytest.raises(ValueError, match="returned as dresidual"):
        gpu.backward(gdy, out=gdy)
    assert gpu.backward(gdy)[1] is gdy
    gpu.eval()
    expected = reference.normalized(x, *map(copy_to_host, (gpu.running_mean, gpu.running_var)),
                                    cpu.weight, cpu.bias)  # fmt: skip
    assert gpu.forward(gx, out=gx) is gx
    assert difference(gx, expected) < 1e-5


def test_functional():
    x, dy, r = (normal((4, 5, 6, 7), seed=seed) for seed in range(3))
    weight, bias = np.linspace(0.5, 1.5, 5, dtype="f"), np.linspace(-1, 1, 5, dtype="f")
    before = reference.forward(x, weight, bias, residual=r).y
    dy = away_from_the_kink(dy, before)
    results, running = [], []
    for put in (cp.asarray, np.asarray):
        arrays = [put(a) for a in (x, weight, bias)]
        y, saved = F.batch_norm_forward(*arrays, activation="relu", residual=put(r))
        grads = F.batch_norm_backward(put(dy), saved)
        states = put(np.zeros(5, "f")), put(np.ones(5, "f"))
        F.update_running(*states, saved, 0.3)
        again = F.batch_norm_inference(arrays[0], *states, *arrays[1:])
        results.append([y, *grads, again, saved.mean, saved.var, saved.invstd])
        running.append(states)
    for got, expected in zip(results[0] + [*running[0]], results[1] + [*running[1]], strict=True):
        assert isinstance(got, cp.ndarray)
        assert difference(got, expected) < 1e-5
    assert difference(results[0][0], np.maximum(before, 0)) < 1e-5


def test_gradients_accumulate_and_contexts_are_reentrant():
    cpu, gpu = pair(np.dtype(np.float64))
    xs, contexts = [normal((4, 5, 3, 3), np.float64, seed) for seed in range(3)], []
    for x in xs:
        gpu.forward(cp.asarray(x))
        contexts.append(gpu.saved)
    for x, context in zip(reversed(xs), reversed(contexts), strict=True):
        dx = gpu.backward(cp.asarray(x**2), context)
        assert difference(dx, reference.backward(x**2, x, cpu.weight).dx) < 1e-10
    total = sum(reference.backward(x**2, x).dweight for x in xs)
    assert difference(gpu.grads["weight"], total) < 1e-10


def test_empty_batches_and_single_values():
    for dtype in DTYPES:
        _, gpu = pair(dtype, activation="relu")
        before = bits(gpu)
        empty = cp.empty((0, 5, 3, 3), dtype)
        y = gpu.forward(empty, empty)
        dx, dresidual = gpu.backward(empty)
        assert y.shape == dx.shape == dresidual.shape == empty.shape
        assert bits(gpu) == before
        with pytest.raises(cupybn.ShapeError, match="Expected more than 1 value per channel"):
            gpu.forward(cp.ones((1, 5, 1, 1), dtype))
        assert bits(gpu) == before


def test_check_finite_finds_the_channel():
    _, gpu = pair(FLOAT32, check_finite=True)
    x = normal((4, 5, 3, 3))
    x[1, 3, 0, 0] = np.nan
    before = bits(gpu)
    with pytest.raises(FloatingPointError, match="in channel 3"):
        gpu.forward(cp.asarray(x))
    assert bits(gpu) == before


# ---- devices and state ---------------------------------------------------------------------------


def test_mixed_devices_raise_and_name_both():
    cpu, gpu = pair(FLOAT32)
    x = normal((4, 5, 3, 3))
    gx = cp.asarray(x)
    here = f"cuda:{gx.device.id}"
    before = bits(cpu), bits(gpu)
    with pytest.raises(DeviceError, match=f"input is on {here}, but the layer is on cpu"):
        cpu.forward(gx)
    with pytest.raises(DeviceError, match=f"input is on cpu, but the layer is on {here}"):
        gpu.forward(x)
    with pytest.raises(DeviceError, match=f"residual is on cpu, but the input is on {here}"):
        gpu.forward(gx, x)
    with pytest.raises(DeviceError, match=f"residual is on {here}, but the input is on cpu"):
        cpu.forward(x, gx)
    with pytest.raises(DeviceError, match=f"out is on cpu, but the input is on {here}"):
        gpu.forward(gx, out=x.copy())
    with pytest.raises(DeviceError, match=f"weight is on cpu, but the input is on {here}"):
        F.batch_norm_forward(gx, np.ones(5, np.float32))
    assert (bits(cpu), bits(gpu)) == before
    gpu.forward(gx)
    with pytest.raises(DeviceError, match=f"dy is on cpu, but the input is on {here}"):
        gpu.backward(x)
    gpu.backward(gx)


def test_moving_a_tree_there_and_back():
    cpu = Sequential(layer_for(np.float32), BatchNorm2d(3, affine=False))
    x = normal((4, 3, 5, 5))
    cpu.backward(cpu(x))
    before = bits(cpu)
    gpu = copy.deepcopy(cpu).to("cuda")
    here = f"cuda:{cp.cuda.Device().id}"
    assert all(layer.device == here for _, layer in gpu.named_layers())
    arrays = [*gpu.named_parameters(), *gpu.named_gradients(), *gpu.named_buffers()]
    for name, array in arrays:
        assert isinstance(array, np.ndarray if "tracked" in name else cp.ndarray), name
    pointers = [array.data.ptr for name, array in arrays if "tracked" not in name]
    gpu.to("cuda").to(here)
    arrays = [*gpu.named_parameters(), *gpu.named_gradients(), *gpu.named_buffers()]
    assert [a.data.ptr for name, a in arrays if "tracked" not in name] == pointers
    assert bits(gpu) == before
    assert bits(gpu.to("cpu")) == before
    assert isinstance(gpu[0].weight, np.ndarray)
    assert gpu(x).tobytes() == cpu(x).tobytes()
    with pytest.raises(DeviceError, match="CuPy sees"):
        cpu.to("cuda:99")
    made = BatchNorm2d(3, device="cuda")
    assert made.device == here
    assert isinstance(made.grads["bias"], cp.ndarray)


def test_state_dicts_cross_devices():
    cpu, gpu = pair(FLOAT32)
    gpu.backward(gpu(cp.asarray(normal((4, 5, 3, 3)))))
    saved = gpu.state_dict()
    assert isinstance(saved["weight"], cp.ndarray)
    assert saved["weight"].data.ptr != gpu.weight.data.ptr
    weight = cpu.weight
    cpu.load_state_dict(saved)
    assert cpu.weight is weight
    other = BatchNorm2d(5, device="cuda")
    pointer = other.running_var.data.ptr
    other.load_state_dict(cpu.state_dict())
    third = BatchNorm2d(5, device="cuda")
    third.load_state_dict(gpu.state_dict())
    assert other.running_var.data.ptr == pointer
    for layer in (cpu, other, third):
        for name, value in layer.state_dict().items():
            assert copy_to_host(value).tobytes() == copy_to_host(saved[name]).tobytes(), name
    broken = dict(saved, running_mean=cp.ones(6, np.float32))
    before = bits(gpu)
    with pytest.raises(cupybn.StateDictError, match="size mismatch for running_mean"):
        gpu.load_state_dict(broken)
    assert bits(gpu) == before


def test_copies_and_pickles():
    _, gpu = pair(FLOAT32)
    x = cp.asarray(normal((4, 5, 3, 3)))
    gpu.backward(gpu(x))
    for twin in (copy.deepcopy(gpu), pickle.loads(pickle.dumps(gpu))):
        assert bits(twin) == bits(gpu)
        assert twin.device == gpu.device
        assert twin.weight.data.ptr != gpu.weight.data.ptr
        assert copy_to_host(twin(x)).tobytes() == copy_to_host(copy.deepcopy(gpu)(x)).tobytes()


def test_assignment_and_reset():
    _, gpu = pair(FLOAT32)
    weight = gpu.weight
    gpu.weight = np.arange(5, dtype=np.float32)
    gpu.bias = cp.arange(5, dtype=cp.float32)
    gpu.weight -= cp.ones(5, cp.float32)
    assert gpu.weight is weight
    assert (copy_to_host(gpu.weight) == np.arange(5) - 1).all()
    gpu(cp.asarray(normal((4, 5, 3, 3))))
    gpu.reset_parameters()
    gpu.reset_running_stats()
    fresh = BatchNorm2d(5)
    assert bits(gpu) == bits(fresh)


# ---- other libraries' tensors --------------------------------------------------------------------


class Interface:
    """An array with nothing but ``__cuda_array_interface__``."""

    def __init__(self, array):
        self.kept, self.__cuda_array_interface__ = array, array.__cuda_array_interface__


class Capsule:
    """An array with nothing but DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def check_guests(wrap, pointer_of, x, dy):
    """Forward and backward on wrapped arrays: nothing is copied, the results are right."""
    cpu, gpu = pair(x.dtype, c=x.shape[1])
    theirs, their_dy = wrap(x), wrap(dy)
    y = gpu.forward(theirs)
    assert isinstance(y, cp.ndarray)
    assert gpu.saved.x3.data.ptr == pointer_of(theirs)
    dx = gpu.backward(their_dy)
    tolerance = TOLERANCE[x.dtype.name]
    assert difference(y, cpu.forward(x).astype(np.float64)) < tolerance
    assert difference(dx, cpu.backward(dy).astype(np.float64)) < tolerance
    return gpu


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.name != "bfloat16"], ids=str)
@pytest.mark.parametrize("wrapper", [Interface, Capsule])
def test_bare_protocols(wrapper, dtype):
    kept = {}

    def wrap(values):
        array = cp.asarray(values)
        guest = wrapper(array)
        kept[id(guest)] = array
        return guest

    x, dy = normal((4, 5, 6, 7), dtype, 1), normal((4, 5, 6, 7), dtype, 2)
    check_guests(wrap, lambda guest: kept[id(guest)].data.ptr, x, dy)


def torch_with_cuda():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no CUDA device")
    return torch


def to_torch(torch, values):
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16).view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(values).cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_tensors(dtype):
    torch = torch_with_cuda()
    x, dy = normal((4, 5, 6, 7), dtype, 1), normal((4, 5, 6, 7), dtype, 2)
    gpu = check_guests(lambda v: to_torch(torch, v), lambda t: t.data_ptr(), x, dy)
    last = to_torch(torch, x).contiguous(memory_format=torch.channels_last)
    y = gpu.forward(last)
    assert gpu.saved.layout.columns
    assert gpu.saved.x3.data.ptr == last.data_ptr()
    if dtype.name != "bfloat16":  # CuPy may not export it
        back = torch.from_dlpack(y)
        assert back.data_ptr() == y.data.ptr
        assert back.is_contiguous(memory_format=torch.channels_last)
    weight, bias = (to_torch(torch, np.ones(5, gpu.dtype)) for _ in range(2))
    _, saved = F.batch_norm_forward(last, weight, bias, residual=last)
    assert saved.weight.data.ptr == weight.data_ptr()
    assert F.batch_norm_backward(last, saved).dweight.shape == (5,)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_beside_torch(columns, relu):
    torch = torch_with_cuda()
    x, dy = normal((16, 5, 14, 14), seed=1), normal((16, 5, 14, 14), seed=2)
    module = torch.nn.BatchNorm2d(5).cuda()
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 1.5, 5))
        module.bias.copy_(torch.linspace(-1, 1, 5))
    layer = BatchNorm2d(5, device="cuda", activation="relu" if relu else None)
    layer.load_state_dict(module.state_dict())
    cpu = copy.deepcopy(layer).to("cpu")
    if relu:
        dy = away_from_the_kink(dy, reference.forward(x, cpu.weight, cpu.bias).y)
    memory = torch.channels_last if columns else torch.contiguous_format
    tx, tdy = (to_torch(torch, a).contiguous(memory_format=memory) for a in (x, dy))
    tx.requires_grad_()
    y, mine = module(tx), layer.forward(tx.detach())
    y = torch.relu(y) if relu else y
    y.backward(tdy)
    dx = layer.backward(tdy)
    for got, theirs in (
        (mine, y), (dx, tx.grad), (layer.grads["weight"], module.weight.grad),
        (layer.grads["bias"], module.bias.grad), (layer.running_mean, module.running_mean),
        (layer.running_var, module.running_var),
    ):  # fmt: skip
        assert difference(got, theirs.detach().cpu().numpy().astype(np.float64)) < 1e-5


def test_numba_arrays():
    numba_cuda = pytest.importorskip("numba.cuda")
    if not numba_cuda.is_available():
        pytest.skip("this Numba sees no CUDA device")
    x, dy = normal((4, 5, 6, 7), seed=1), normal((4, 5, 6, 7), seed=2)

    def pointer(array):
        return array.__cuda_array_interface__["data"][0]

    check_guests(numba_cuda.to_device, pointer, x, dy)


def test_jax_arrays(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    try:
        gpus = jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"this JAX sees no CUDA device: {error}")
    x, dy = normal((4, 5, 6, 7), seed=1), normal((4, 5, 6, 7), seed=2)

    def put(values):
        return jax.device_put(values, gpus[0]).block_until_ready()

    check_guests(put, lambda array: array.unsafe_buffer_pointer(), x, dy)


# ---- streams, waiting, memory --------------------------------------------------------------------


def slow_down():
    """Keeps the current stream busy for some tenths of a second."""
    cp.RawKernel(SPIN, "spin")((1,), (1,), (np.int64(500_000_000),))


def train(layer, x, dy, residual=None):
    """(y, dx): one forward and backward."""
    y = layer.forward(x, residual)
    dx = layer.backward(dy)
    return y, dx[0] if residual is not None else dx


STEPS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "residual relu": {"activation": "relu", "residual": True},
}


@pytest.mark.parametrize("step", list(STEPS))
def test_work_queues_behind_the_callers_stream_and_nothing_waits(step):
    """Forward and backward return while a slow kernel before them runs, and see what follows it."""
    options = dict(STEPS[step])
    residual = options.pop("residual", False)
    _, gpu = pair(FLOAT32, c=8, **options)
    twin = copy.deepcopy(gpu)
    values, dy = (cp.asarray(normal(SPLIT, seed=seed)) for seed in range(2))
    r = dy if residual else None
    expected = [copy_to_host(a) for a in train(twin, values, dy, r)]
    slow_down()
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        x = cp.zeros_like(values)
        for _ in range(3):  # compiled, planned, memory in the pool
            train(copy.deepcopy(gpu), x, dy, r)
        layer = copy.deepcopy(gpu)
        stream.synchronize()
        slow_down()
        begun = stream.record()
        x[...] = values
        y, dx = train(layer, x, dy, r)
        waited = begun.done
        stream.synchronize()
        got = [copy_to_host(a) for a in (y, dx)]
    assert not waited, "forward or backward waited for the device"
    assert [a.tobytes() for a in got] == [a.tobytes() for a in expected]
    assert bits(layer) == bits(twin)


def test_evaluation_does_not_wait():
    _, gpu = pair(FLOAT32, c=8)
    x = cp.asarray(normal(SPLIT))
    gpu.eval()
    gpu(x)
    slow_down()
    begun = cp.cuda.get_current_stream().record()
    gpu(x)
    waited = begun.done
    cp.cuda.Device().synchronize()
    assert not waited


def test_two_streams_interleaved():
    data = [[cp.asarray(normal(SPLIT, seed=10 * i + j)) for j in range(2)] for i in range(2)]
    alone = [layer_for(np.float32, c=8, activation="relu").to("cuda") for _ in range(2)]
    mixed = [copy.deepcopy(layer) for layer in alone]
    expected = [[train(alone[i], *data[i]) for _ in range(10)] for i in range(2)]
    cp.cuda.Device().synchronize()
    streams, got = [cp.cuda.Stream(non_blocking=True) for _ in range(2)], [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with stream:
                got[i].append(train(mixed[i], *data[i]))
    cp.cuda.Device().synchronize()
    for i in range(2):
        for a, b in zip(got[i], expected[i], strict=True):
            assert [copy_to_host(v).tobytes() for v in a] == [copy_to_host(v).tobytes() for v in b]
        assert bits(mixed[i]) == bits(alone[i])
    keys = {key for key in launch._kept.scratch if key[1] in {s.ptr for s in streams}}
    assert len(keys) == 2, "the streams share scratch"


@pytest.mark.parametrize("name", ["none", "malloc_async", "MemoryAsyncPool", "own pool"])
def test_any_allocator(name):
    _, gpu = pair(FLOAT32, c=8, activation="relu")
    twin = copy.deepcopy(gpu)
    x, dy = (cp.asarray(normal(SPLIT, seed=seed)) for seed in range(2))
    expected = [copy_to_host(a).tobytes() for a in train(twin, x, dy, dy)]
    try:
        allocator = {
            "none": lambda: None,
            "malloc_async": lambda: cp.cuda.malloc_async,
            "MemoryAsyncPool": lambda: cp.cuda.MemoryAsyncPool().malloc,
            "own pool": lambda: cp.cuda.MemoryPool().malloc,
        }[name]()
        if "sync" in name:
            allocator(1)
    except RuntimeError as error:
        pytest.skip(f"not on this device: {error}")
    with allocating_with(allocator):
        for _ in range(3):
            layer = copy.deepcopy(gpu)
            got = [copy_to_host(a).tobytes() for a in train(layer, x, dy, dy)]
            assert got == expected
            assert bits(layer) == bits(twin)
            del layer


@pytest.mark.parametrize("step", list(STEPS))
def test_nothing_is_allocated_but_results(step):
    options = dict(STEPS[step])
    residual = options.pop("residual", False)
    c = SPLIT[1]
    _, gpu = pair(FLOAT32, c=c, **options)
    x, dy = (cp.asarray(normal(SPLIT, seed=seed)) for seed in range(2))
    r = dy if residual else None
    pool, sizes = cp.cuda.MemoryPool(), []

    def counted(size):
        sizes.append(size)
        return pool.malloc(size)

    with allocating_with(counted):
        for _ in range(3):
            train(gpu, x, dy, r)
        used, total = pool.used_bytes(), pool.total_bytes()
        for _ in range(3):
            del sizes[:]
            y = gpu.forward(x, r)
            forward = sorted(sizes)
            del sizes[:]
            result = gpu.backward(dy)
            backward = sorted(sizes)
            del y, result
            gpu.saved = None
            assert (pool.used_bytes(), pool.total_bytes()) == (used, total)
        vector = 8 * c
        mask = [-(-x.size // 8)] if residual else []
        assert forward == sorted([*[vector] * 2, *mask, x.nbytes])
        assert backward == sorted([2 * vector, x.nbytes, *([x.nbytes] if residual else [])])


def test_two_runs_give_the_same_bits():
    for dtype in DTYPES:
        _, gpu = pair(dtype, c=8, activation="relu")
        x, r, dy = (cp.asarray(normal(SPLIT, dtype, seed)) for seed in range(3))
        outcomes = []
        for _ in range(3):
            layer = copy.deepcopy(gpu)
            results = [copy_to_host(a).tobytes() for a in train(layer, x, dy, r)]
            outcomes.append((results, bits(layer)))
        assert outcomes[0] == outcomes[1] == outcomes[2]


# ---- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("dtype", [FLOAT32, np.dtype(np.float16)], ids=str)
def test_a_captured_step_replays_with_the_same_bits(step, dtype):
    options = dict(STEPS[step])
    residual = options.pop("residual", False)
    _, eager = pair(dtype, c=8, **options)
    captured = copy.deepcopy(eager)
    fresh = captured.state_dict()
    stream = cp.cuda.Stream(non_blocking=True)
    values = [[cp.asarray(normal(SPLIT, dtype, 10 * i + j)) for j in range(2)] for i in range(3)]
    cp.cuda.Device().synchronize()
    with stream:
        x, dy = (cp.zeros_like(v) for v in values[0])
        r = dy if residual else None
        for _ in range(2):
            train(captured, x, dy, r)
        stream.begin_capture()
        try:
            y = captured.forward(x, r)
            kept = captured.saved  # its arrays belong to the graph now
            result = captured.backward(dy)
        finally:
            graph = stream.end_capture()
        dx = result[0] if residual else result
        captured.load_state_dict(fresh)
        captured.zero_grad()
        batches = int(captured.num_batches_tracked)
        for new_x, new_dy in values:
            x[...] = new_x
            dy[...] = new_dy
            graph.launch()
            expected = train(eager, new_x, new_dy, new_dy if residual else None)
            stream.synchronize()
            for got, exact in zip((y, dx), expected, strict=True):
                assert copy_to_host(got).tobytes() == copy_to_host(exact).tobytes()
        assert int(captured.num_batches_tracked) == batches, "a replay does not count on the host"
        captured.num_batches_tracked = eager.num_batches_tracked
        assert bits(captured) == bits(eager)
    assert kept.count == x.size // 8


def test_graphs_of_one_stream_beside_each_other_and_beside_eager_work():
    """Each has scratch of its own: they run at the same time, on streams of their own."""
    values = [[cp.asarray(normal(SPLIT, seed=10 * i + j)) for j in range(2)] for i in range(3)]
    layers = [layer_for(np.float32, c=8, activation="relu").to("cuda") for _ in range(3)]
    expected = [train(layer, *data) for layer, data in zip(layers, values, strict=True)]
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    graphs, results = [], []
    with stream:
        for layer, data in zip(layers[:2], values, strict=False):
            train(layer, *data)
            stream.begin_capture()
            try:
                results.append((layer.forward(data[0]), layer.saved, layer.backward(data[1])))
            finally:
                graphs.append(stream.end_capture())
    others = [cp.cuda.Stream(non_blocking=True) for _ in graphs]
    stream.synchronize()
    for _ in range(20):
        for graph, other in zip(graphs, others, strict=True):
            graph.launch(other)
        with stream:
            eager = train(layers[2], *values[2])
    cp.cuda.Device().synchronize()
    got = [(y, dx) for y, _, dx in results] + [eager]
    for ours, exact in zip(got, expected, strict=True):
        for a, b in zip(ours, exact, strict=True):
            assert copy_to_host(a).tobytes() == copy_to_host(b).tobytes()


def test_a_cumulative_average_is_refused_under_capture():
    _, gpu = pair(FLOAT32, c=8, momentum=None)
    stream = cp.cuda.Stream(non_blocking=True)
    x = cp.asarray(normal(SPLIT))
    cp.cuda.Device().synchronize()
    with stream:
        gpu(x)
        before = bits(gpu)
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="capture"):
                gpu(x)
        finally:
            stream.end_capture()
        assert bits(gpu) == before
        gpu(x)
        stream.synchronize()
    assert gpu.num_batches_tracked == 2


def test_a_mask_is_refused_under_capture():
    """The host reads how many values are valid."""
    _, gpu = pair(FLOAT32, c=8)
    stream, x = cp.cuda.Stream(non_blocking=True), cp.asarray(normal(SPLIT))
    mask = cp.ones((SPLIT[0], *SPLIT[2:]), bool)
    cp.cuda.Device().synchronize()
    with stream:
        gpu(x, mask=mask)
        before = bits(gpu)
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="mask= cannot go into a CUDA graph"):
                gpu(x, mask=mask)
        finally:
            stream.end_capture()
        assert bits(gpu) == before
        gpu(x, mask=mask)
        stream.synchronize()


def test_masks_and_the_backward_of_the_backward():
    """Beside NumPy's; NaN where masked, and 0 in all that comes out."""
    shape = (4, 5, 6, 7)
    x, dy, ddx = (normal(shape, FLOAT32, seed) for seed in range(3))
    mask = np.random.default_rng(4).integers(0, 2, (4, 6, 7)).astype(bool)
    for array in (x, dy, ddx):
        np.moveaxis(array, 1, -1)[~mask] = np.nan
    layer, gpu = pair(FLOAT32, c=5, activation="relu")
    results = []
    for own, place in ((layer, np.asarray), (gpu, cp.asarray)):
        y, saved = F.batch_norm_forward(
            place(x), own.weight, own.bias, activation="relu", mask=place(mask)
        )
        double = F.batch_norm_double_backward(
            place(ddx), place(np.ones(5, np.float32)), None, saved, place(dy)
        )
        results.append([copy_to_host(a) for a in (y, double.ddy, double.dx, double.dweight)])
    for a, b in zip(*results, strict=True):
        assert difference(b, a.astype(np.float64)) < 1e-4
    assert not any(np.moveaxis(a, 1, -1)[~mask].any() for a in results[1][:3])


# ---- several ranks, several devices --------------------------------------------------------------


def rank_step(comm, x, dy, r, sizes, own_stream):
    """One synchronised step on this rank's part, on the host what came of it."""
    wide = "float64" if x.dtype == np.float64 else None
    spy = Spy(comm)
    with cp.cuda.Stream(non_blocking=True) if own_stream else nullcontext():
        layer = layer_for(x.dtype, SyncBatchNorm, x.shape[1], comm=spy, activation="relu")
        assert (layer.dtype == np.float64) == (wide is not None)
        layer.to("cuda")
        mine = [cp.asarray(shard(a, comm, sizes)) for a in (x, dy, r)]
        y = layer.forward(mine[0], mine[2])
        dx, dresidual = layer.backward(mine[1])
        results = [copy_to_host(a) for a in (y, dx, dresidual)]
        buffers = [copy_to_host(layer.running_mean), copy_to_host(layer.running_var)]
        distributed.allreduce_gradients(layer, comm, op="sum")
        distributed.verify_sync(layer, comm)
        gradients = [copy_to_host(layer.grads[name]) for name in ("weight", "bias")]
        if comm.rank == comm.size - 1:
            layer.weight = np.full(x.shape[1], 7, layer.dtype)
        distributed.broadcast_parameters(layer, comm, root=comm.size - 1)
        assert (copy_to_host(layer.weight) == 7).all()
    return results, buffers, gradients, [label for label, _ in spy.sent]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(4, 4), (1, 6, 0, 5), (0, 9, 0)], ids=str)
@pytest.mark.parametrize("own_stream", [False, True])
def test_synchronised_over_threads(dtype, sizes, own_stream):
    shape = (sum(sizes), 6, 9, 7)
    x, dy, r = (normal(shape, dtype, seed) for seed in range(3))
    x = (x.astype(np.float64) + np.arange(len(x)).reshape(-1, 1, 1, 1)).astype(dtype)
    layer = layer_for(dtype, c=6)
    before = reference.forward(x, layer.weight, layer.bias, residual=r)
    dy = away_from_the_kink(dy, before.y)
    gradient = reference.backward(dy, x, layer.weight, layer.bias, kept=before.y > 0)
    ranks = run_ranks(len(sizes), rank_step, x, dy, r, sizes, own_stream, timeout=60)
    tolerance = TOLERANCE[dtype.name]
    y, dx, dresidual = (np.concatenate([rank[0][i] for rank in ranks]) for i in range(3))
    assert difference(y, np.maximum(before.y, 0)) < tolerance
    assert difference(dx, gradient.dx) < tolerance
    assert difference(dresidual, gradient.dz) == 0
    messages = 2 if dtype == np.float64 else 1
    for _, buffers, gradients, labels in ranks:
        assert [b.tobytes() for b in buffers] == [b.tobytes() for b in ranks[0][1]]
        assert [g.tobytes() for g in gradients] == [g.tobytes() for g in ranks[0][2]]
        assert sum("forward" in label for label in labels) == messages
        assert sum("backward" in label for label in labels) == 1
    for got, exact in zip(
        (*ranks[0][1], *ranks[0][2]),
        (0.1 * before.mean, 0.9 + 0.1 * before.unbiased, gradient.dweight, gradient.dbias),
        strict=True,
    ):
        assert difference(got, exact) < 1e-5


def test_a_rank_on_the_wrong_device_fails_and_the_others_stay_as_they_were():
    x = normal((4, 5, 3, 3))

    def rank(comm):
        layer = SyncBatchNorm(5, comm=comm, device="cuda")
        before = bits(layer)
        with pytest.raises(DeviceError if comm.rank == 1 else cupybn.PeerError):
            layer.forward(x if comm.rank == 1 else cp.asarray(x))
        assert bits(layer) == before
        layer.backward(layer.forward(cp.asarray(x)))

    run_ranks(3, rank, timeout=60)


def test_converted_trees_keep_their_device():
    tree = Sequential(BatchNorm2d(5), BatchNorm2d(5)).to("cuda")
    weight = tree[0].weight
    converted = cupybn.convert_sync_batchnorm(tree, ALONE)
    assert converted[0].weight is weight
    assert converted[0].device == tree[0].device
    x = cp.asarray(normal((4, 5, 3, 3)))
    converted.backward(converted(x))
    cupybn.revert_sync_batchnorm(converted)(x)


def test_two_devices():
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    cpu, _ = pair(FLOAT32, c=8, activation="relu")
    x, dy = normal(SPLIT, seed=1), normal(SPLIT, seed=2)
    dy = away_from_the_kink(dy, reference.forward(x, cpu.weight, cpu.bias).y)
    layers = [copy.deepcopy(cpu).to(f"cuda:{i}") for i in range(2)]
    with cp.cuda.Device(1):
        there, there_dy = cp.asarray(x), cp.asarray(dy)
    expected = cpu.forward(x), cpu.backward(dy)
    with cp.cuda.Device(0):
        with pytest.raises(DeviceError, match="input is on cuda:1, but the layer is on cuda:0"):
            layers[0].forward(there)
        got = train(layers[1], there, there_dy)  # the current device stays 0
        assert cp.cuda.Device().id == 0
        y, saved = F.batch_norm_forward(there, eps=1e-5)
        grads = F.batch_norm_backward(there_dy, saved)
        moments = F.batch_moments(saved.x3)
        found = (*got, y, grads.dx, saved.mean, moments.mean, *layers[1].grads.values())
        assert all(array.device.id == 1 for array in found)
        for a, b in zip(got, expected, strict=True):
            assert difference(a, b) < 1e-5
        same_state(layers[1], cpu)
        assert bits(layers[1].to("cuda:0").to("cpu"))[0] == bits(cpu)[0]
