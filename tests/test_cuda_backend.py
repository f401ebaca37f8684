"""The CUDA backend beside its arithmetic: messages, running statistics, scratch, launches."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import DTYPES
from cuda_tools import need
from hostcuda.build import missing
from kernel_cases import (
    SPLIT,
    Case,
    error,
    gaussian,
    host_kernels,
    parameter_dtype,
    parameters,
    run,
)

from cupybn.backends import cuda, device, source
from cupybn.backends import numpy as numpy_backend
from cupybn.statistics import BackwardSums, Moments, Transform

LAYOUTS = [(3, 32, 49), (3, 3, 49), (65, 24, 1), (33, 3, 1), (2, 3, 784), (3, 2, 10007)]


@pytest.fixture(autouse=True)
def host():
    need(missing())
    with host_kernels():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 5, 0), (0, 2, 1)])
def test_empty_batches_launch_nothing_over_the_data(shape, dtype):
    x = np.empty(shape, dtype)
    payload = np.ones(2 * shape[1])
    moments = cuda.batch_moments(x, payload=payload)
    assert moments.count == 0
    assert not payload.any()
    assert not moments.mean.any()
    running = [np.full(shape[1], 3, parameter_dtype(dtype)) for _ in range(2)]
    mean, var, invstd = cuda.finalize_moments(moments, 1e-5, running=tuple(running), factor=0.1)
    assert not mean.any()
    assert not var.any()
    assert (np.concatenate(running) == 3).all()
    assert cuda.normalize(x, Transform(mean, invstd)).shape == shape
    sums = cuda.backward_reduce(x, x, Transform(mean, invstd), payload=payload)
    assert not np.concatenate(sums).any()
    dweight = np.ones(shape[1], parameter_dtype(dtype))
    dx = cuda.backward_input(x, x, Transform(mean, invstd), sums=sums, local=sums, dweight=dweight)
    assert dx.shape == shape
    assert (dweight == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_running_statistics(dtype, factor, count):
    rng = np.random.default_rng(5)
    moments = Moments(count, rng.standard_normal(300), rng.uniform(0, 9, 300))
    moments.m2[0] = -1e-9
    ours = [rng.uniform(0, 2, 300).astype(parameter_dtype(dtype)) for _ in range(2)]
    theirs = [state.copy() for state in ours]
    got = cuda.finalize_moments(moments, 1e-3, running=tuple(ours), factor=factor)
    expected = numpy_backend.finalize_moments(moments, 1e-3, running=tuple(theirs), factor=factor)
    for a, b in zip((*got, *ours), (*expected, *theirs), strict=True):
        assert error(a, b) < 1e-6 if a.dtype == np.float32 else error(a, b) < 1e-14


def test_running_statistics_in_strided_memory():
    memory = np.ones((2, 5, 2), np.float32)
    running = (memory[0, :, 0], memory[1, :, 0])
    cuda.finalize_moments(Moments(4, np.zeros(5), np.zeros(5)), 1e-5, running=running, factor=1.0)
    assert not memory[:, :, 0].any()
    assert memory[:, :, 1].all()


def test_strided_running_statistics_after_the_second_message():
    """And without weight and bias; m2 below 0 counts as 0."""
    x = gaussian((3, 5, 9), np.float64, 1)
    moments = Moments(27, np.arange(5) * 27.0, np.array([-1e-9, 27.0, 54.0, 27.0, 0.0]))
    memory = np.ones((2, 5, 2))
    running = (memory[0, :, 0], memory[1, :, 0])
    y = np.empty_like(x)
    mean, invstd = cuda.finish_forward(
        moments, "recentred", x, y, None, None, 0.5, running=running, factor=0.5
    )
    assert (mean == np.arange(5)).all()
    assert error(invstd, 1 / np.sqrt(np.array([0, 1, 2, 1, 0]) + 0.5)) < 1e-15
    assert error(y, numpy_backend.normalize(x, Transform(mean, invstd))) < 1e-14
    assert error(memory[0, :, 0], (1 + mean) / 2) < 1e-15
    assert error(memory[1, :, 0], (1 + np.array([0, 1, 2, 1, 0]) * 27 / 26) / 2) < 1e-15
    assert memory[:, :, 1].all()


def ranks(dtype):
    shapes = ((3, 6, 49), (1, 6, 49), (70, 6, 49))
    return [gaussian(shape, dtype, i, 3 * i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != np.float64], ids=str)
def test_the_reduction_fills_the_message_and_finalize_reads_it(dtype):
    parts = ranks(dtype)
    total, count = np.zeros(12), 0
    for part in parts:
        message = np.full(16 + 12 + 3, np.nan)
        local = cuda.batch_moments(part, payload=message[16:28])
        assert np.isnan(message[:16]).all()
        assert np.isnan(message[28:]).all()
        assert error(message[16:28], local.pack()) < 1e-12
        total, count = total + message[16:28], count + local.count
    pooled = Moments(count, total[:6], total[6:])
    mean, var, invstd = cuda.finalize_moments(pooled, 1e-5, form="pooled")
    whole = np.concatenate(parts).astype(np.float64)
    assert error(mean, whole.mean(axis=(0, 2))) < 1e-6
    assert error(var, whole.var(axis=(0, 2))) < 1e-6
    assert error(invstd, 1 / np.sqrt(var + 1e-5)) < 1e-12


def test_float64_takes_two_messages():
    parts = [part + 1e6 for part in ranks(np.dtype(np.float64))]
    locals_, total, count = [], np.zeros(6), 0
    for part in parts:
        payload = np.full(6, np.nan)
        locals_.append(cuda.batch_moments(part, payload=payload))
        total, count = total + payload, count + locals_[-1].count
    second = np.zeros(6)
    for local in locals_:
        payload = np.full(6, np.nan)
        cuda.recentre_moments(local, total, count, payload)
        second += payload
    mean, var, _ = cuda.finalize_moments(Moments(count, total, second), 1e-5, form="recentred")
    whole = np.concatenate(parts)
    assert error(mean, whole.mean(axis=(0, 2))) < 1e-14
    assert error(var, whole.var(axis=(0, 2))) < 1e-9


def test_backward_sums_go_into_the_message():
    case = Case((33, 6, 49), np.dtype(np.float32), "relu")
    payload = np.full(12, np.nan)
    transform = Transform(case.forward.mean, case.forward.invstd, case.weight, case.bias)
    sums = cuda.backward_reduce(case.dy, case.x, transform, relu=True, payload=payload)
    assert (payload == np.concatenate(sums)).all()


def test_pooled_sums_shape_dx_and_local_ones_the_parameter_gradients():
    case = Case((3, 5, 49), np.dtype(np.float32), "plain")
    f = case.forward
    rng = np.random.default_rng(9)
    pooled, local = (BackwardSums(*rng.standard_normal((2, 5))) for _ in range(2))
    results = []
    for backend in (cuda, numpy_backend):
        gradients = [np.ones(10, np.float32)[::2], np.ones(5, np.float32)]
        dx = backend.backward_input(
            case.dy,
            case.x,
            Transform(f.mean, f.invstd, case.weight, case.bias),
            sums=pooled,
            count=1000,
            local=local,
            dweight=gradients[0],
            dbias=gradients[1],
        )
        results.append((dx, *gradients))
    for got, expected in zip(*results, strict=True):
        assert error(got, expected) < 1e-6


def test_without_weight_and_bias():
    for dtype in DTYPES:
        x = gaussian((3, 32, 49), dtype, 1)
        mean, invstd = np.full(32, 0.5), np.full(32, 2.0)
        y = cuda.normalize(x, Transform(mean, invstd), relu=True)
        assert error(y, numpy_backend.normalize(x, Transform(mean, invstd), relu=True)) < 8e-3


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_outputs_may_be_their_inputs(shape):
    case = Case(shape, np.dtype(np.float32), "residual relu", offsets=(1, 1, 1, 1))
    expected = run(cuda, case)
    transform = Transform(expected.mean, expected.invstd, case.weight, case.bias)
    y, dx = case.residual.copy(), case.dy.copy()
    mask = np.empty_like(expected.mask)
    options = {"relu": True, "mask": mask}
    cuda.normalize(case.x, transform, residual3=y, out3=y, **options)
    cuda.backward_input(dx, case.x, transform, sums=expected.sums, count=expected.count, out3=dx,
                        **options)  # fmt: skip
    assert error(y, expected.y) < 1e-6
    assert error(dx, expected.dx) < 1e-6


def test_two_runs_give_the_same_bits_and_counters_return_to_zero():
    for shape in SPLIT:
        x, dy = gaussian(shape, np.float32, 1), gaussian(shape, np.float32, 2)
        weight, bias = parameters(shape[1], np.float32)
        first, second = ([], [])
        for results in (first, second):
            moments = cuda.batch_moments(x)
            mean, _, invstd = cuda.finalize_moments(moments, 1e-5)
            sums = cuda.backward_reduce(dy, x, Transform(mean, invstd, weight, bias))
            results += [moments.mean, moments.m2, *sums]
        assert all((a == b).all() for a, b in zip(first, second, strict=True))
        for _, counters in device._kept.scratch.values():
            assert not counters.any()


def test_nothing_is_compiled_or_planned_twice():
    x = gaussian((3, 32, 49), np.float32, 1)
    cuda.batch_moments(x)
    planned = device._launch.cache_info().misses
    for _ in range(3):
        cuda.batch_moments(x)
    assert device._launch.cache_info().misses == planned
    assert device._launch.cache_info().maxsize is not None


def test_launches_are_three_forward_and_two_backward(monkeypatch):
    launches = []

    class Counted:
        def get_function(self, name):
            return lambda *a: launches.append(name)

    device.clear_caches()
    monkeypatch.setattr(source, "compile_module", lambda *a: Counted())
    run(cuda, Case((3, 32, 49), np.dtype(np.float32), "residual relu"))
    assert launches == [
        "batch_moments", "finalize_moments", "normalize", "backward_reduce", "backward_input",
    ]  # fmt: skip
