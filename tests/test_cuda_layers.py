"""Layers, functional and ranks through the CUDA backend, its kernels run by the host build."""

from __future__ import annotations

import inspect
import threading

import numpy as np
import pytest
import reference
from conftest import DTYPES, TOLERANCE
from cuda_tools import need
from hostcuda.build import host_module, missing
from kernel_cases import host_kernels
from rank_checks import CHECKS, Spy, bits
from test_layers import layer_for, layouts, normal

from cupybn import PeerError, SyncBatchNorm, backends
from cupybn import functional as F
from cupybn.backends import cuda, device, source
from cupybn.backends import numpy as numpy_backend
from cupybn.testing import check_gradients, run_ranks


class Launches:
    """Counts the kernels that are launched."""

    def __init__(self, kernel, names, name):
        self.kernel, self.names, self.name = kernel, names, name

    def __call__(self, *args, **options):
        self.names.append(self.name)
        return self.kernel(*args, **options)


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """NumPy arrays go through the CUDA backend; the names of the kernels launched."""
    need(missing())
    names = []

    class Module:
        def __init__(self, text, kernels):
            self.module = host_module(text, kernels)

        def get_function(self, name):
            return Launches(self.module.get_function(name), names, name)

    monkeypatch.setattr(backends, "cpu_backend", lambda: cuda)
    with host_kernels(Module):
        yield names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels-last", "negative strides"])
@pytest.mark.parametrize("relu", [False, True])
def test_training_and_evaluation(dtype, kind, relu):
    layer = layer_for(dtype, c=5, activation="relu" if relu else None)
    x, r, dy = (normal((3, 5, 7, 7), dtype, seed) for seed in range(3))
    tolerance = TOLERANCE[dtype.name]
    y = layer.forward(layouts(x)[kind], r)
    dx, dresidual = layer.backward(dy)
    expected = reference.forward(x, layer.weight, layer.bias, residual=r, relu=relu)
    kept = np.asarray(y) > 0 if relu else None
    gradient = reference.backward(dy, x, layer.weight, layer.bias, kept=kept)
    assert reference.error(y, expected.y) < tolerance
    assert reference.error(dx, gradient.dx) < tolerance
    assert reference.error(dresidual, gradient.dz if relu else dy) < tolerance
    assert reference.error(layer.grads["weight"], gradient.dweight) < 1e-5
    assert reference.error(layer.grads["bias"], gradient.dbias) < 1e-5
    assert reference.error(layer.running_mean, 0.1 * expected.mean) < 1e-6
    assert reference.error(layer.running_var, 0.9 + 0.1 * expected.unbiased) < 1e-6
    layer.eval()
    y = layer.forward(layouts(x)[kind], save_for_backward=True)
    dx = layer.backward(dy)
    fixed = layer.running_mean, layer.running_var
    exact = reference.normalized(x, *fixed, layer.weight, layer.bias, relu=relu)
    assert reference.error(y, exact) < tolerance
    kept = np.where(np.abs(exact) < 1e-5, y > 0, exact > 0) if relu else None
    gradient = reference.backward(dy, x, layer.weight, layer.bias, kept=kept, fixed=fixed)
    assert reference.error(dx, gradient.dx) < tolerance


def test_central_differences():
    x = normal((3, 2, 2, 3), np.float64)
    for options in ({}, {"affine": False}, {"activation": "relu"}, {"bias": False}):
        check_gradients(layer_for(np.float64, c=2, **options), x, residual=x**2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_launches(launched, dtype, with_residual):
    """At most 3 kernels forward and 2 backward, one rank or several; in evaluation two."""

    def launches(function, *args):
        del launched[:]
        function(*args)
        return sorted(name.removesuffix("_flat") for name in launched)

    layer, x = layer_for(dtype, c=4, activation="relu"), normal((2, 4, 3, 3), dtype)
    residual = (x.copy(),) if with_residual else ()
    forward = ["batch_moments", "finalize_moments", "normalize"]
    backward = ["backward_input", "backward_reduce"]
    assert launches(layer, x, *residual) == forward
    assert launches(layer.backward, x) == backward
    assert launches(layer.eval(), x, *residual) == ["finalize_moments", "normalize"]

    def rank(comm):
        layer = SyncBatchNorm(4, comm=comm, activation="relu", dtype=layer_dtype)
        layer.backward(layer(x, *residual))

    layer_dtype = layer.weight.dtype
    if dtype == np.float64:
        forward = ["batch_moments", "recentre_moments", "normalize_recentred"]
    assert launches(run_ranks, 2, rank) == sorted((forward + backward) * 2)

    def empty(comm):
        SyncBatchNorm(4, comm=comm, dtype=layer_dtype)(x[: 0 if comm.rank else 2])

    of_the_empty = ["recentre_moments"] * (dtype == np.float64) + ["finalize_moments"]
    assert launches(run_ranks, 2, empty) == sorted(forward + of_the_empty)


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
def test_over_ranks(name, n):
    results = run_ranks(n, CHECKS[name], timeout=60)
    assert len(set(results)) == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_kernel_that_does_not_compile_changes_nothing(monkeypatch, direction, n):
    """The last kernel of a pass is compiled before the first message, and before any write."""
    last = {"forward": "normalize", "backward": "backward_input"}[direction]
    compile_module = source.compile_module

    def failing(text, kernels):
        if last in kernels:
            raise RuntimeError("no compiler")
        return compile_module(text, kernels)

    monkeypatch.setattr(source, "compile_module", failing)

    def rank(comm):
        spy = Spy(comm)
        layer = SyncBatchNorm(4, comm=spy)
        x = normal((2, 4, 3, 3))
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
    get_kernel, broken = source.get_kernel, threading.local()

    def failing(kernel, **defines):
        if kernel == last and getattr(broken, "here", False):
            raise RuntimeError("no compiler")
        return get_kernel(kernel, **defines)

    def rank(comm):
        layer, x = SyncBatchNorm(4, comm=comm), normal((2, 4, 3, 3))
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

    with monkeypatch.context() as patched:
        patched.setattr(device, "_launch", device._launch.__wrapped__)  # else it is not compiled
        patched.setattr(source, "get_kernel", failing)
        run_ranks(2, rank)


@pytest.mark.parametrize(
    "name",
    [
        "batch_moments", "recentre_moments", "finalize_moments", "normalize", "backward_reduce",
        "backward_input", "given_statistics", "prepare_forward", "prepare_backward",
        "update_running", "finish_forward", "local_forward", "local_backward",
    ],
)  # fmt: skip
def test_the_backends_have_the_same_signatures(name):
    def shape(module):
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(cuda) == shape(numpy_backend)


def test_the_primitives_agree_with_numpy():
    x = normal((4, 3, 5))
    ours = F.finalize_moments(F.batch_moments(x), 1e-5)
    backend = backends.backend_for(x)
    assert backend is cuda
    for mine, exact in zip(ours, reference.forward(x)[1:3], strict=False):
        assert reference.error(mine, exact) < 1e-6
