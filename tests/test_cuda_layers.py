"""Layers, functional and ranks through the CUDA backend, its kernels run by the machine for PTX.

On the stand-in for CuPy, whose arrays are CuPy's to the library; ``test_gpu_layers.py``, which is
for a GPU, runs on it, too. The checks of ``rank_checks.py`` compute with NumPy arrays: for them
every function of the backend is wrapped.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading

import fake_cupy
import numpy as np
import pytest
import reference
from conftest import DTYPES, ROOT, TOLERANCE
from cuda_tools import need
from kernel_cases import host_kernels, numpy_through_cuda, placed, resident
from ptx.launch import compile_module, missing
from rank_checks import CHECKS, Spy
from test_binding import functions_entered
from test_layers import layer_for, layouts, normal

from cupybn import BatchNorm2d, PeerError, SyncBatchNorm, backends
from cupybn import functional as F
from cupybn.arrays import copy_to_host
from cupybn.backends import cuda
from cupybn.backends import numpy as numpy_backend
from cupybn.backends.cuda import primitives
from cupybn.testing import check_gradients, run_ranks

put = fake_cupy.asarray


@pytest.fixture(autouse=True)
def cupy():
    need(missing())
    with host_kernels() as module:
        yield module


@pytest.fixture
def numpy_arrays_there(monkeypatch):
    """NumPy arrays go through the CUDA backend, in place."""
    monkeypatch.setitem(backends.by_type, np.ndarray, numpy_through_cuda())


def state(layer):
    arrays = [*layer.named_parameters(), *layer.named_gradients(), *layer.named_buffers()]
    return [(name, copy_to_host(array)) for name, array in arrays]


def bits(layer):
    return [(name, array.tobytes()) for name, array in state(layer)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels-last", "negative strides"])
@pytest.mark.parametrize("relu", [False, True])
def test_training_and_evaluation(dtype, kind, relu):
    layer = layer_for(dtype, c=5, activation="relu" if relu else None)
    weight, bias = layer.weight.copy(), layer.bias.copy()
    layer.to("cuda")
    x, r, dy = (normal((3, 5, 7, 7), dtype, seed) for seed in range(3))
    tolerance = TOLERANCE[dtype.name]

    def step(**options):
        y = layer.forward(fake_cupy.over(layouts(x)[kind]), put(r), **options)
        dx, dresidual = layer.backward(put(dy))
        assert all(type(a) is fake_cupy.ndarray for a in (y, dx, dresidual))
        return y.get(), dx.get(), dresidual.get()

    y, dx, dresidual = step()
    expected = reference.forward(x, weight, bias, residual=r, relu=relu)
    kept = y > 0 if relu else None
    gradient = reference.backward(dy, x, weight, bias, kept=kept)
    assert reference.error(y, expected.y) < tolerance
    assert reference.error(dx, gradient.dx) < tolerance
    assert reference.error(dresidual, gradient.dz if relu else dy) < tolerance
    assert reference.error(layer.grads["weight"].get(), gradient.dweight) < 1e-5
    assert reference.error(layer.grads["bias"].get(), gradient.dbias) < 1e-5
    assert reference.error(layer.running_mean.get(), 0.1 * expected.mean) < 1e-6
    assert reference.error(layer.running_var.get(), 0.9 + 0.1 * expected.unbiased) < 1e-6
    layer.eval()
    fixed = layer.running_mean.get(), layer.running_var.get()
    exact = reference.normalized(x, *fixed, weight, bias, residual=r, relu=relu)
    y, dx, _ = step(save_for_backward=True)
    assert reference.error(y, exact) < tolerance
    kept = np.where(np.abs(exact) < 1e-5, y > 0, exact > 0) if relu else None
    gradient = reference.backward(dy, x, weight, bias, kept=kept, fixed=fixed)
    assert reference.error(dx, gradient.dx) < tolerance


@pytest.mark.parametrize("n", [1, 2])
def test_parameters_gradients_and_statistics_may_be_strided(n):
    x, dy = (normal((4, 5, 7, 7), np.float32, seed) for seed in range(2))

    def rank(comm, strided):
        layer = SyncBatchNorm(5, comm=comm, device="cuda")
        layer.weight, layer.bias = map(put, np.linspace(0, 2, 10, dtype=np.float32).reshape(2, 5))
        held = [(d, k) for d in (layer.params, layer.grads, layer.buffers) for k in d]
        for arrays, name in held if strided else ():
            if arrays[name].ndim:
                arrays[name] = put(np.repeat(arrays[name].get(), 2))[::2]
        results = []
        for _ in range(3):
            results += [layer(put(x[comm.rank :: n])), layer.backward(put(dy[comm.rank :: n]))]
        assert not strided or not layer.grads["weight"].flags.c_contiguous
        results += [arrays[name] for arrays, name in held]
        return [copy_to_host(array).tobytes() for array in results]

    assert run_ranks(n, rank, True) == run_ranks(n, rank, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_ranks_get_what_numpy_gives(dtype, relu, n):
    """Three steps of plain and synchronised layers on every backend, beside the NumPy backend."""
    x, r, dy = (normal((3, 6, 5, 3, 3), dtype, seed) for seed in range(3))

    def rank(comm, device):
        layer = layer_for(dtype, SyncBatchNorm, c=5, comm=comm, activation="relu" if relu else None)
        layer.to(device)
        place = put if device == "cuda" else np.asarray
        results = []
        for i in range(3):
            mine = [place(a[i, comm.rank :: n]) for a in (x, r, dy)]
            y = layer(mine[0], mine[1] if i else None)
            dx = layer.backward(mine[2])
            results += map(copy_to_host, (y, *dx) if i else (y, dx))
        return results, state(layer), layer.num_batches_tracked.item()

    backends.use_cpu_backend("numpy")
    theirs = run_ranks(n, rank, "cpu")
    for ours, exact in zip(run_ranks(n, rank, "cuda"), theirs, strict=True):
        for a, b in zip(ours[0], exact[0], strict=True):
            assert reference.error(a, b.astype(np.float64)) < TOLERANCE[dtype.name]
        for (name, a), (_, b) in zip(ours[1], exact[1], strict=True):
            assert reference.error(a, b.astype(np.float64)) < 1e-5, name
        assert ours[2] == exact[2] == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 3), (), (40, 20)], ids=["short rows", "columns", "rows"])
@pytest.mark.parametrize("n", [1, 3])
def test_masks_of_ranks_beside_the_numpy_backend(dtype, shape, n):
    """Of three, one has no mask, one nothing valid. Then all in evaluation; NaN where masked."""
    x, r, dy = (normal((12, 5, *shape), dtype, seed) for seed in range(3))
    mask = np.random.default_rng(3).integers(0, 2, (12, *shape)).astype(bool)
    mask[1::n] &= n == 1

    def rank(comm, device):
        layer = layer_for(dtype, SyncBatchNorm, c=5, comm=comm, activation="relu").to(device)
        place = put if device == "cuda" else np.asarray
        mine, valid = [a[comm.rank :: n].copy() for a in (x, r, dy)], mask[comm.rank :: n]
        given = {} if comm.rank == 2 else {"mask": place(valid)}
        if given:
            for a in mine:
                np.moveaxis(a, 1, -1)[~valid] = np.nan
        mine, results = list(map(place, mine)), []
        for residual in (None, mine[1]):
            y = layer(mine[0], residual, **given)
            dx = layer.backward(mine[2])
            results += map(copy_to_host, (y, dx) if residual is None else (y, *dx))
        layer.eval()
        results.append(copy_to_host(layer(mine[0], **given)))
        if given:
            assert not any(np.moveaxis(a, 1, -1)[~valid].any() for a in results)
        return results, state(layer)

    backends.use_cpu_backend("numpy")
    theirs = run_ranks(n, rank, "cpu")
    for ours, exact in zip(run_ranks(n, rank, "cuda"), theirs, strict=True):
        for a, b in zip(ours[0], exact[0], strict=True):
            assert reference.error(a, b.astype(np.float64)) < TOLERANCE[dtype.name]
        for (name, a), (_, b) in zip(ours[1], exact[1], strict=True):
            assert reference.error(a, b.astype(np.float64)) < 1e-5, name


@pytest.mark.parametrize("residual", [False, True])
def test_a_bound_step_of_a_layer_enters_few_functions(cupy, residual):
    cupy.do_nothing()
    layer = BatchNorm2d(16, activation="relu" if residual else None, device="cuda")
    x = put(normal((8, 16, 7, 7)))
    more = (put(normal((8, 16, 7, 7))),) if residual else ()

    def step():
        layer(x, *more)
        layer.backward(x)

    for _ in range(3):
        step()
    entered = functions_entered(step)
    assert len(entered) <= (18 if residual else 16), entered


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bound_call_takes_arrays_at_any_address(dtype):
    """Other addresses are other launches, though the signature is the same."""
    x, r, dy = (normal((3, 5, 9, 9), dtype, seed) for seed in range(3))
    layer = layer_for(dtype, c=5, activation="relu").to("cuda")
    layer(put(x), put(r))
    expected = [a.get() for a in (layer(put(x), put(r)), *layer.backward(put(dy)))]
    for offsets in ((1, 1, 1), (0, 1, 3), (2, 0, 0), (0, 0, 0)):
        arrays = (placed(a, dtype, offset) for a, offset in zip((x, r, dy), offsets, strict=True))
        there_x, there_r, there_dy = map(fake_cupy.over, arrays)
        got = [a.get() for a in (layer(there_x, there_r), *layer.backward(there_dy))]
        for ours, exact in zip(got, expected, strict=True):
            assert reference.error(ours, exact.astype(np.float64)) < TOLERANCE[dtype.name]


def test_one_rank_and_a_plain_layer_that_streams_give_the_same_bits():
    x, dy = (put(normal((4, 5, 6, 6), seed=seed)) for seed in range(2))
    plain, alone = BatchNorm2d(5, device="cuda"), BatchNorm2d(5, device="cuda", check_finite=True)
    with resident("0"):
        for layer in (plain, alone):
            layer.y, layer.dx = layer(x), layer.backward(dy)
    assert plain.y.get().tobytes() == alone.y.get().tobytes()
    assert plain.dx.get().tobytes() == alone.dx.get().tobytes()
    assert bits(plain) == bits(alone)


def test_central_differences(numpy_arrays_there):
    x = normal((3, 2, 2, 3), np.float64)
    for options in ({}, {"affine": False}, {"activation": "relu"}, {"bias": False}):
        check_gradients(layer_for(np.float64, c=2, **options), x, residual=x**2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_launches(cupy, dtype, with_residual):
    """1 kernel a direction with one rank, 2 where it streams, 3 forward with several ranks; in
    evaluation 2 forward.
    """

    def launches(function, *args):
        cupy.launched.clear()
        function(*args)
        return sorted(name.removesuffix("_flat") for name in cupy.launched.elements())

    layer, x = layer_for(dtype, c=4, activation="relu"), put(normal((2, 4, 3, 3), dtype))
    layer.to("cuda")
    residual = (x.copy(),) if with_residual else ()
    forward = ["batch_moments", "finalize_moments", "normalize"]
    backward = ["backward_input", "backward_reduce"]
    assert launches(layer, x, *residual) == ["local_forward"]
    assert launches(layer.backward, x) == ["local_backward"]
    with resident("0"):
        assert launches(layer, x, *residual) == ["batch_moments", "normalize"]
        assert launches(layer.backward, x) == backward
    assert launches(layer.eval(), x, *residual) == ["finalize_moments", "normalize"]
    options = {"dtype": layer.weight.dtype, "device": "cuda"}

    def rank(comm):
        layer = SyncBatchNorm(4, comm=comm, activation="relu", **options)
        layer.backward(layer(x, *residual))

    if dtype == np.float64:
        forward = ["batch_moments", "recentre_moments", "normalize_recentred"]
    assert launches(run_ranks, 2, rank) == sorted((forward + backward) * 2)

    def empty(comm):
        SyncBatchNorm(4, comm=comm, **options)(x[: 0 if comm.rank else 2])

    of_the_empty = ["recentre_moments"] * (dtype == np.float64) + ["finalize_moments"]
    assert launches(run_ranks, 2, empty) == sorted(forward + of_the_empty)


def test_to_a_device_and_another_dtype_at_once():
    layer = layer_for(np.float32, c=4)
    before = layer.state_dict()
    assert layer.to("cuda", dtype=np.float64) is layer
    x = put(normal((2, 4, 3, 3), np.float64))
    y = layer(x)
    assert type(y) is fake_cupy.ndarray
    assert layer.backward(y).dtype == np.float64
    assert layer.to("cpu", dtype="float32").device == "cpu"
    for name, array in layer.state_dict().items():
        assert type(array) is np.ndarray
        assert array.dtype == before[name].dtype
    np.testing.assert_array_equal(layer.weight, before["weight"])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        "check_four_models", "check_uneven_batches_train_alike", "check_empty_ranks",
        "check_one_value_in_all", "check_large_means", "check_y_at_large_means", "check_constants",
        "check_messages", "check_every_split", "check_alone_is_plain", "check_same_bits",
        "check_double_backward",
    ],
)  # fmt: skip
def test_over_ranks(numpy_arrays_there, name, n):
    results = run_ranks(n, CHECKS[name], timeout=60)
    assert len(set(results)) == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_kernel_that_does_not_compile_changes_nothing(cupy, direction, n):
    """The last kernel of a pass is compiled before the first message, and before any write."""
    last = {"forward": "normalize", "backward": "backward_input"}[direction]
    last = f"local_{direction}" if n == 1 else last

    def failing(text, kernels):
        if last in kernels:
            raise RuntimeError("no compiler")
        return compile_module(text, kernels)

    cupy.build_with(failing)

    def rank(comm):
        spy = Spy(comm)
        layer = SyncBatchNorm(4, comm=spy, device="cuda")
        x = put(normal((2, 4, 3, 3)))
        if direction == "backward":
            layer.forward(x)
        before, sent = bits(layer), len(spy.sent)
        with pytest.raises(RuntimeError, match="no compiler"):
            getattr(layer, direction)(x)
        assert bits(layer) == before
        return len(spy.sent) - sent

    assert run_ranks(n, rank) == [int(n > 1)] * n  # the poison


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_kernel_that_does_not_compile_on_one_rank(monkeypatch, direction):
    last = {"forward": "normalize", "backward": "backward_input"}[direction]
    tensor_launch, broken = primitives.tensor_launch, threading.local()

    def failing(kernel, *args):
        if kernel == last and getattr(broken, "here", False):
            raise RuntimeError("no compiler")
        return tensor_launch(kernel, *args)

    monkeypatch.setattr(primitives, "tensor_launch", failing)

    def rank(comm):
        layer, x = SyncBatchNorm(4, comm=comm, device="cuda"), put(normal((2, 4, 3, 3)))
        layer.forward(x)
        before = bits(layer)
        broken.here = comm.rank == 1
        error = PeerError if comm.rank == 0 else RuntimeError
        match = "rank 1 failed" if comm.rank == 0 else "no compiler"
        with pytest.raises(error, match=match):
            getattr(layer, direction)(x)
        assert bits(layer) == before
        broken.here = False
        getattr(layer, direction)(x)

    run_ranks(2, rank)


@pytest.mark.parametrize("name", cuda.__all__)
def test_the_backends_have_the_same_signatures(name):
    def shape(module):
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(cuda) == shape(numpy_backend)


def test_the_primitives_agree_with_numpy():
    x = normal((4, 3, 5))
    ours = F.finalize_moments(F.batch_moments(put(x)), 1e-5)
    assert backends.backend_for(put(x)) is cuda
    for mine, exact in zip(ours, reference.forward(x)[1:3], strict=False):
        assert reference.error(mine.get(), exact) < 1e-6


QUICK = "empty or running or message or pooled or without or outputs or public or planned"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(["test_gpu_layers.py"], marks=pytest.mark.ptx),
        ["test_gpu_layers.py", "-k", "device or (training_and_evaluation and float32)"],
        ["test_gpu_transports.py"],
        pytest.param(
            ["test_gpu.py", "-k", f"({QUICK}) and not small and not one_launch"],
            marks=pytest.mark.ptx,
        ),
        pytest.param(["test_gpu.py", "-k", "every_mask and float32"], marks=pytest.mark.ptx),
    ],
    ids=lambda given: "-".join(given[::2]),
)
def test_the_tests_for_a_gpu_run_on_the_stand_in(given):
    """Streams that put off all work, CUDA graphs, allocators, two devices, ranks as threads."""
    tests = ROOT / "tests"
    path = os.pathsep.join(map(str, (tests / "stand_in", tests, ROOT)))
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command = [*pytest_, str(tests / given[0]), *given[1:]]
    process = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout[-5000:]
    assert " passed" in process.stdout
