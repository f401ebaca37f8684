"""The CUDA kernels through their own backend, run on the CPU by the host build.

Oracles: the formulas in float64 on the values as stored, and the NumPy backend.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from conftest import DTYPES, TOLERANCE
from cuda_tools import need
from hostcuda.build import host_module, host_modules, missing
from kernel_cases import (
    CS,
    LARGE,
    LS,
    MODES,
    NS,
    ODD_ONES,
    SPLIT,
    Case,
    covering,
    error,
    gaussian,
    parameter_dtype,
    parameters,
    placed,
    run,
)

from cupybn.backends import cuda, source
from cupybn.backends import numpy as numpy_backend
from cupybn.statistics import BackwardSums, Moments

PER_CHANNEL = {"float16": 1e-5, "bfloat16": 1e-5, "float32": 1e-5, "float64": 1e-10}
LAYOUTS = [
    (3, 32, 49),
    (3, 3, 49),
    (65, 24, 1),
    (33, 3, 1),
    (2, 3, 784),
    (3, 2, 10007),
    (3, 6, 196),
]
OFFSETS = {"aligned": (0, 0, 0, 0), "all by one": (1, 1, 1, 1), "mixed": (0, 1, 3, 2)}
EVERY_PAIR = [
    (shape, DTYPES[i % len(DTYPES)], MODES[i // len(DTYPES) % len(MODES)])
    for i, shape in enumerate(covering(300_000))
]
CASES = [
    *((s, d, m, "aligned") for s, d, m in EVERY_PAIR),
    *((s, d, m, "aligned") for s, d, m in product(LAYOUTS, DTYPES, MODES)),
    *((s, d, "residual relu", "aligned") for s, d in product(ODD_ONES, DTYPES)),
    *((s, d, "relu", "aligned") for s, d in product(SPLIT, DTYPES[:2])),
    *((s, DTYPES[i], "plain", "aligned") for i, s in enumerate(LARGE)),
    *((s, DTYPES[0], m, o) for s, m, o in product(LAYOUTS, MODES[1::2], ("all by one", "mixed"))),
    *((s, DTYPES[1], "relu", o) for s, o in product(LAYOUTS, ("all by one", "mixed"))),
]


class _Nothing:
    def __call__(self, grid, block, arguments):
        pass


class _Collector:
    """In the place of a module: notes what would be compiled."""

    def __init__(self):
        self.texts = []

    def __call__(self, text, name):
        self.texts.append((text, [name]))
        return self

    def get_function(self, name):
        return _Nothing()


@pytest.fixture(scope="session")
def compiled():
    """Compiles what CASES need, on all cores; single tests would do it one by one."""
    need(missing())
    patch = pytest.MonkeyPatch()
    collector = _Collector()
    patch.setattr(source, "compile_module", collector)
    cuda.clear_caches()
    for shape, dtype, mode, offset in CASES:
        for constant in (False, True):
            case = Case(shape, dtype, mode, offsets=OFFSETS[offset], constant=constant)
            run(cuda, case)
    patch.undo()
    host_modules(collector.texts)


@pytest.fixture(autouse=True)
def host(monkeypatch, compiled):
    monkeypatch.setattr(source, "compile_module", lambda text, name: host_module(text, [name]))
    cuda.clear_caches()
    yield
    cuda.clear_caches()


def check(case, against_numpy=True):
    dtype = case.x.dtype.name
    tolerance, per_channel = TOLERANCE[dtype], PER_CHANNEL[dtype]
    f = case.forward
    got = run(cuda, case)
    assert got.count == case.count
    assert error(got.mean, f.mean) < per_channel
    assert (np.abs(got.var - f.var) <= per_channel * f.var).all()
    assert error(got.y, f.y) < tolerance
    kept = got.y > 0 if case.activation else None
    if got.mask is not None:
        assert (got.mask == np.packbits(kept)).all()
    b = case.backward(kept)
    assert error(got.dx, b.dx) < tolerance
    terms_dy, terms_xmu = b.terms
    assert (np.abs(got.dbias - b.dbias) <= per_channel * (1 + terms_dy)).all()
    assert (np.abs(got.dweight - b.dweight) <= per_channel * (1 + terms_xmu)).all()
    if got.mask is not None:
        assert error(got.dresidual, b.dresidual) == 0
    if against_numpy:
        outputs, case.outputs = case.outputs, [np.empty_like(o) for o in case.outputs]
        expected = run(numpy_backend, case)
        case.outputs = outputs
        assert error(got.invstd, expected.invstd) < per_channel
        assert error(got.y, expected.y) < tolerance
        assert error(got.dx, expected.dx) < tolerance
    return got


def name_of(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).replace(" ", "-")


@pytest.mark.parametrize(("shape", "dtype", "mode", "offset"), CASES, ids=name_of)
def test_kernels_agree_with_float64_and_numpy(shape, dtype, mode, offset):
    check(Case(shape, dtype, mode, seed=sum(shape), offsets=OFFSETS[offset]))


@pytest.mark.parametrize("shape", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_as_constants(shape, dtype):
    for mode in MODES:
        check(Case(shape, dtype, mode, constant=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c"), list(product(NS, CS)))
def test_every_shape(n, c, dtype):
    for length, mode, offset in product(LS, MODES, OFFSETS.values()):
        if n * c * length <= 1_000_000:
            check(Case((n, c, length), dtype, mode, offsets=offset), against_numpy=False)


def spread(values):
    return values.std(axis=(0, 2), keepdims=True)


@pytest.mark.parametrize("shape", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e6])
def test_a_mean_far_from_zero(shape, dtype, ratio):
    values = np.random.default_rng(3).standard_normal(shape)
    if dtype.itemsize == 2:
        ratio = min(ratio, 100)  # beyond, the stored values are constants
        values = values / 64
    x = placed(values + ratio * spread(values), dtype)
    check(Case(shape, dtype, "plain", x=x))


@pytest.mark.parametrize("shape", [*LAYOUTS, *SPLIT], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_outlier_comes_first(shape, dtype):
    values = np.random.default_rng(4).standard_normal(shape)
    values[0, :, 0] = 1e4
    check(Case(shape, dtype, "plain", x=placed(values, dtype)))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.1, 1234.567, 6e4, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_have_no_variance(value, dtype):
    for shape in (*LAYOUTS, (700, 8, 49), (3000, 3, 1)):
        x = placed(np.full(shape, value), dtype)
        moments = cuda.batch_moments(x)
        assert (moments.m2 == 0).all()
        assert (moments.mean == float(x.flat[0])).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_channel(bad, dtype):
    for shape, mode in product(LAYOUTS, MODES):
        clean = Case(shape, dtype, mode)
        spoilt = Case(shape, dtype, mode)
        channel = 1
        spoilt.x[-1, channel, shape[2] // 2] = bad
        with np.errstate(all="ignore"):
            expected, got = run(cuda, clean), run(cuda, spoilt)
        others = np.arange(shape[1]) != channel
        for name in ("mean", "var", "dweight", "dbias"):
            assert (getattr(got, name)[others] == getattr(expected, name)[others]).all()
        assert (got.y[:, others] == expected.y[:, others]).all()
        assert (got.dx[:, others] == expected.dx[:, others]).all()
        assert np.isnan(got.var[channel])
        assert np.isnan(got.y[:, channel].astype(np.float32)).all()


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
    assert cuda.normalize(x, mean, invstd).shape == shape
    sums = cuda.backward_reduce(x, x, mean, invstd, payload=payload)
    assert not np.concatenate(sums).any()
    dweight = np.ones(shape[1], parameter_dtype(dtype))
    dx = cuda.backward_input(x, x, mean, invstd, sums=sums, local=sums, dweight=dweight)
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
    transform = (case.forward.mean, case.forward.invstd, case.weight, case.bias)
    sums = cuda.backward_reduce(case.dy, case.x, *transform, activation="relu", payload=payload)
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
            case.dy, case.x, f.mean, f.invstd, case.weight, case.bias, sums=pooled, count=1000,
            local=local, dweight=gradients[0], dbias=gradients[1],
        )  # fmt: skip
        results.append((dx, *gradients))
    for got, expected in zip(*results, strict=True):
        assert error(got, expected) < 1e-6


def test_without_weight_and_bias():
    for dtype in DTYPES:
        x = gaussian((3, 32, 49), dtype, 1)
        mean, invstd = np.full(32, 0.5), np.full(32, 2.0)
        y = cuda.normalize(x, mean, invstd, activation="relu")
        assert error(y, numpy_backend.normalize(x, mean, invstd, activation="relu")) < 8e-3


@pytest.mark.parametrize("shape", LAYOUTS, ids=name_of)
def test_outputs_may_be_their_inputs(shape):
    case = Case(shape, np.dtype(np.float32), "residual relu", offsets=(1, 1, 1, 1))
    expected = run(cuda, case)
    transform = (expected.mean, expected.invstd, case.weight, case.bias)
    y, dx = case.residual.copy(), case.dy.copy()
    mask = np.empty_like(expected.mask)
    options = {"activation": "relu", "mask": mask}
    cuda.normalize(case.x, *transform, residual3=y, out3=y, **options)
    cuda.backward_input(dx, case.x, *transform, sums=expected.sums, count=expected.count, out3=dx,
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
            sums = cuda.backward_reduce(dy, x, mean, invstd, weight, bias)
            results += [moments.mean, moments.m2, *sums]
        assert all((a == b).all() for a, b in zip(first, second, strict=True))
        for _, counters in cuda._kept.scratch.values():
            assert not counters.any()


def test_nothing_is_compiled_or_planned_twice():
    x = gaussian((3, 32, 49), np.float32, 1)
    cuda.batch_moments(x)
    planned = cuda._launch.cache_info().misses
    for _ in range(3):
        cuda.batch_moments(x)
    assert cuda._launch.cache_info().misses == planned
    assert cuda._launch.cache_info().maxsize is not None


def test_launches_are_three_forward_and_two_backward(monkeypatch):
    launches = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def get_function(self, name):
            return lambda *a: launches.append(name)

    cuda.clear_caches()
    monkeypatch.setattr(source, "compile_module", lambda text, name: Counted(name))
    run(cuda, Case((3, 32, 49), np.dtype(np.float32), "residual relu"))
    assert launches == [
        "batch_moments", "finalize_moments", "normalize", "backward_reduce", "backward_input",
    ]  # fmt: skip
