"""The CUDA backend beside its arithmetic: messages, running statistics, scratch, launches."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from conftest import DTYPES, TOLERANCE
from cuda_tools import need
from kernel_cases import (
    SPLIT,
    Case,
    back,
    error,
    gaussian,
    host_kernels,
    mask_of,
    parameter_dtype,
    parameters,
    placed,
    plainly,
    resident,
    run,
    run_alone,
    there,
)
from ptx.launch import missing

from cupybn.backends import cuda
from cupybn.backends import numpy as numpy_backend
from cupybn.backends.cuda import launch, source
from cupybn.statistics import BackwardSums, Moments, Transform

NUMPY = str(Path(np.__file__).parent)
LAYOUTS = [(3, 32, 49), (3, 3, 49), (65, 24, 1), (33, 3, 1), (2, 3, 784), (3, 2, 10007)]


@pytest.fixture(autouse=True)
def host():
    need(missing())
    with host_kernels():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 5, 0), (0, 2, 1)])
def test_empty_batches_launch_nothing_over_the_data(shape, dtype):
    x = fake_cupy.empty(shape, dtype)
    payload = fake_cupy.ones(2 * shape[1])
    moments = cuda.batch_moments(x, payload=payload)
    assert moments.count == 0
    assert not payload.any()
    assert not moments.mean.any()
    running = [fake_cupy.full(shape[1], 3, parameter_dtype(dtype)) for _ in range(2)]
    mean, var, invstd = cuda.finalize_moments(moments, 1e-5, running=tuple(running), factor=0.1)
    assert not mean.any()
    assert not var.any()
    assert all((state == 3).all() for state in running)
    assert cuda.normalize(x, Transform(mean, invstd)).shape == shape
    sums = cuda.backward_reduce(x, x, Transform(mean, invstd), payload=payload)
    assert not any(x.any() for x in sums)
    dweight = fake_cupy.ones(shape[1], parameter_dtype(dtype))
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
    on_device = Moments(count, there(moments.mean), there(moments.m2))
    state = tuple(map(there, ours))
    got = map(back, cuda.finalize_moments(on_device, 1e-3, running=state, factor=factor))
    expected = numpy_backend.finalize_moments(moments, 1e-3, running=tuple(theirs), factor=factor)
    for a, b in zip((*got, *ours), (*expected, *theirs), strict=True):
        assert error(a, b) < 1e-6 if a.dtype == np.float32 else error(a, b) < 1e-14


def test_running_statistics_in_strided_memory():
    memory = np.ones((2, 5, 2), np.float32)
    running = (there(memory[0, :, 0]), there(memory[1, :, 0]))
    moments = Moments(4, fake_cupy.zeros(5), fake_cupy.zeros(5))
    plainly.finalize_moments(moments, 1e-5, running=running, factor=1.0)
    assert not memory[:, :, 0].any()
    assert memory[:, :, 1].all()


def test_strided_running_statistics_after_the_second_message():
    """And without weight and bias; m2 below 0 counts as 0."""
    x = gaussian((3, 5, 9), np.float64, 1)
    m2 = there(np.array([-1e-9, 27.0, 54.0, 27.0, 0.0]))
    moments = Moments(27, there(np.arange(5) * 27.0), m2)
    memory = np.ones((2, 5, 2))
    running = (there(memory[0, :, 0]), there(memory[1, :, 0]))
    y = np.empty_like(x)
    mean, invstd = plainly.finish_forward(
        moments, "recentred", there(x), there(y), None, None, 0.5, running=running, factor=0.5
    )
    mean, invstd = back(mean), back(invstd)
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
        local = cuda.batch_moments(there(part), payload=there(message[16:28]))
        assert np.isnan(message[:16]).all()
        assert np.isnan(message[28:]).all()
        assert error(message[16:28], local.pack().get()) < 1e-12
        total, count = total + message[16:28], count + local.count
    pooled = Moments(count, there(total[:6]), there(total[6:]))
    mean, var, invstd = map(back, cuda.finalize_moments(pooled, 1e-5, form="pooled"))
    whole = np.concatenate(parts).astype(np.float64)
    assert error(mean, whole.mean(axis=(0, 2))) < 1e-6
    assert error(var, whole.var(axis=(0, 2))) < 1e-6
    assert error(invstd, 1 / np.sqrt(var + 1e-5)) < 1e-12


@pytest.mark.parametrize("strided", [False, True])
def test_float64_takes_two_messages(strided):
    """Their payloads may be strided where another framework owns the collective."""
    parts = [part + 1e6 for part in ranks(np.dtype(np.float64))]

    def payload():
        return np.full(12, np.nan)[::2] if strided else np.full(6, np.nan)

    locals_, total, count = [], np.zeros(6), 0
    for part in parts:
        message = payload()
        locals_.append(plainly.batch_moments(there(part), payload=there(message)))
        total, count = total + message, count + locals_[-1].count
    second = np.zeros(6)
    for local in locals_:
        message = payload()
        plainly.recentre_moments(local, there(total), count, there(message))
        second += message
    pooled = Moments(count, there(total), there(second))
    mean, var, _ = map(back, cuda.finalize_moments(pooled, 1e-5, form="recentred"))
    whole = np.concatenate(parts)
    assert error(mean, whole.mean(axis=(0, 2))) < 1e-14
    assert error(var, whole.var(axis=(0, 2))) < 1e-9


def test_backward_sums_go_into_the_message():
    case = Case((33, 6, 49), np.dtype(np.float32), "relu")
    payload = np.full(12, np.nan)
    transform = Transform(case.forward.mean, case.forward.invstd, case.weight, case.bias)
    sums = cuda.backward_reduce(
        there(case.dy),
        there(case.x),
        Transform(*map(there, transform)),
        relu=True,
        payload=there(payload),
    )
    assert (payload == np.concatenate(back(sums))).all()


def test_pooled_sums_shape_dx_and_local_ones_the_parameter_gradients():
    case = Case((3, 5, 49), np.dtype(np.float32), "plain")
    f = case.forward
    rng = np.random.default_rng(9)
    pooled, local = (BackwardSums(*rng.standard_normal((2, 5))) for _ in range(2))
    results = []
    for backend in (plainly, numpy_backend):
        place = there if backend is plainly else lambda x: x
        gradients = [np.ones(10, np.float32)[::2], np.ones(5, np.float32)]
        dx = backend.backward_input(
            place(case.dy),
            place(case.x),
            Transform(*map(place, (f.mean, f.invstd, case.weight, case.bias))),
            sums=BackwardSums(*map(place, pooled)),
            count=1000,
            local=BackwardSums(*map(place, local)),
            dweight=place(gradients[0]),
            dbias=place(gradients[1]),
        )
        results.append((back(dx) if backend is plainly else dx, *gradients))
    for got, expected in zip(*results, strict=True):
        assert error(got, expected) < 1e-6


def test_without_weight_and_bias():
    for dtype in DTYPES:
        x = gaussian((3, 32, 49), dtype, 1)
        transform = Transform(np.full(32, 0.5), np.full(32, 2.0))
        y = cuda.normalize(there(x), Transform(*map(there, transform)), relu=True)
        assert error(back(y), numpy_backend.normalize(x, transform, relu=True)) < 8e-3


@pytest.mark.parametrize("shape", [(3, 5, 49), (7, 6, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_tensors_and_channels(shape, dtype):
    """What the public primitives may be given: the same bits as of dense arrays, and written to."""

    def strided(x):
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), 1, x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    case = Case(shape, dtype, "residual relu")
    expected = run(cuda, case)
    tensors = [x.copy() for x in (expected.y, expected.dx, expected.dresidual)]
    for name in ("x", "dy", "residual", "weight", "bias"):
        setattr(case, name, strided(getattr(case, name)))
    case.outputs = list(map(strided, case.outputs))
    got = run(plainly, case)
    for ours, theirs in zip((got.y, got.dx, got.dresidual), tensors, strict=True):
        assert not ours.flags.c_contiguous
        assert ours.tobytes() == theirs.tobytes()
    for name in ("mean", "var", "relu_bits", "dweight", "dbias"):
        assert getattr(got, name).tobytes() == getattr(expected, name).tobytes()


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_outputs_may_be_their_inputs(shape):
    case = Case(shape, np.dtype(np.float32), "residual relu", offsets=(1, 1, 1, 1))
    expected = run(cuda, case)
    channels = (expected.mean, expected.invstd, case.weight, case.bias)
    transform = Transform(*map(there, channels))
    y, dx = there(case.residual.copy()), there(case.dy.copy())
    relu_bits = fake_cupy.empty_like(there(expected.relu_bits))
    options = {"relu": True, "relu_bits": relu_bits}
    sums = BackwardSums(*map(there, expected.sums))
    cuda.normalize(there(case.x), transform, residual3=y, out3=y, **options)
    cuda.backward_input(
        dx, there(case.x), transform, sums=sums, count=expected.count, out3=dx, **options
    )
    assert error(back(y), expected.y) < 1e-6
    assert error(back(dx), expected.dx) < 1e-6


def test_two_runs_give_the_same_bits_and_counters_return_to_zero():
    for shape in SPLIT:
        x, dy = there(gaussian(shape, np.float32, 1)), there(gaussian(shape, np.float32, 2))
        weight, bias = map(there, parameters(shape[1], np.float32))
        first, second = ([], [])
        for results in (first, second):
            moments = cuda.batch_moments(x)
            mean, _, invstd = cuda.finalize_moments(moments, 1e-5)
            sums = cuda.backward_reduce(dy, x, Transform(mean, invstd, weight, bias))
            results += [moments.mean, moments.m2, *sums]
        assert all((a == b).all() for a, b in zip(first, second, strict=True))
        for _, counters in launch._kept.scratch.values():
            assert not counters.any()


def test_scratch_is_of_one_thread_device_and_stream():
    fake_cupy.do_nothing()
    small, large = (fake_cupy.zeros(shape) for shape in (SPLIT[0], (40000, 64, 1)))
    cuda.batch_moments(small)
    (first,) = launch._kept.scratch.values()
    cuda.batch_moments(large)
    (second,) = launch._kept.scratch.values()
    assert second[0].size >= 2 * first[0].size
    stream = fake_cupy.cuda.Stream(non_blocking=True)
    with stream:
        cuda.batch_moments(small)
    with fake_cupy.cuda.Device(1):
        cuda.batch_moments(there(back(small)))
    assert set(launch._kept.scratch) == {(0, 0), (0, stream.ptr), (1, 0)}
    assert launch._kept.scratch[0, 0] is second
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cuda.batch_moments, small).result()
        assert pool.submit(lambda: list(launch._kept.scratch)).result() == [(0, 0)]
        assert pool.submit(lambda: launch._kept.scratch[0, 0]).result() is not second


def test_a_captured_launch_has_scratch_of_its_own_for_good():
    """Neither eager work of the stream nor another graph of it uses that, nor another launch."""
    used = []

    def noting(text, names):
        def launched(name):
            return lambda grid, block, args, **more: used.append((name, args[7], args[8]))

        return SimpleNamespace(get_function=launched)

    fake_cupy.build_with(noting)
    x, stream = fake_cupy.zeros((40000, 64, 1)), fake_cupy.cuda.Stream(non_blocking=True)

    def capture():
        with stream:
            stream.begin_capture()
            cuda.batch_moments(x)
            cuda.batch_moments(x)
            return stream.end_capture()

    with stream:
        cuda.batch_moments(x)
    with ThreadPoolExecutor(1) as pool:
        graphs = capture(), pool.submit(capture).result()  # a thread's own things end with it
    with stream:
        cuda.batch_moments(x)
        for graph in graphs:
            graph.launch()
            graph.launch()
    names, partials, counters = zip(*used, strict=True)
    assert set(names) == {"batch_moments"}
    for arrays in (partials, counters):
        addresses = [array.ctypes.data for array in arrays]
        assert addresses[0] == addresses[1]  # eager
        assert addresses[2:4] == addresses[4:6]  # the first graph, twice
        assert addresses[6:8] == addresses[8:10]
        assert len(set(addresses)) == 5
        held = {pair[arrays is counters].data.ptr for pair in launch._captured}
        assert held == set(addresses[2:])
    assert not any(array.any() for array in counters)


@pytest.mark.parametrize("resident", [1, 2, 4])
def test_blocks_are_as_many_as_the_driver_says_the_device_holds(monkeypatch, resident):
    """The occupancy is asked for the compiled kernel, with its threads and shared memory."""
    asked, launches = [], []

    def holds(function, threads, shared):
        asked.append((threads, shared))
        return resident

    driver = "occupancyMaxActiveBlocksPerMultiprocessor"
    monkeypatch.setattr(fake_cupy.cuda.driver, driver, holds)

    def launched(grid, block, args, shared_mem=0):
        launches.append((grid, (*block, shared_mem)))

    fake_cupy.build_with(lambda *text: SimpleNamespace(get_function=lambda name: launched))
    for shape in ((64, 64, 12544), (401408, 64, 1)):
        x = fake_cupy.zeros(shape, np.float16)
        moments = cuda.batch_moments(x)
        cuda.normalize(x, Transform(moments.mean, moments.m2))
    assert [how for _, how in launches] == asked
    assert [shared > 0 for _, (_, shared) in launches] == [False, False, True, False]
    for grid, _ in launches:
        assert 0.85 <= grid[0] * grid[1] / (132 * resident) <= 1


def test_nothing_is_compiled_or_planned_twice():
    x = there(gaussian((3, 32, 49), np.float32, 1))
    cuda.batch_moments(x)
    planned = launch.tensor_launch.cache_info().misses
    for _ in range(3):
        cuda.batch_moments(x)
    assert launch.tensor_launch.cache_info().misses == planned
    assert launch.tensor_launch.cache_info().maxsize is not None


def bound_step(relu, residual, running=True, n=8, dtype=np.float32):
    """One forward and backward of one rank, by what the core calls once all is bound."""
    shape, c = (n, 16, 49), 16
    x, dy, y, dx = (there(gaussian(shape, dtype, i)) for i in range(4))
    more = there(gaussian(shape, dtype, 5)) if residual else None
    relu_bits = fake_cupy.zeros((x.size + 7) // 8, np.uint8) if residual and relu else None
    dresidual = fake_cupy.zeros_like(x) if relu_bits is not None else None
    weight, bias = map(there, parameters(c, dtype))
    state = (fake_cupy.zeros_like(weight), fake_cupy.ones_like(weight)) if running else None
    gradients = fake_cupy.zeros_like(weight), fake_cupy.zeros_like(bias)

    def step():
        mean, invstd = cuda.local_forward(
            x, y, weight, bias, 1e-5, relu=relu, residual3=more, relu_bits=relu_bits, running=state
        )
        transform = Transform(mean, invstd, weight, bias)
        options = {"relu": relu, "relu_bits": relu_bits, "dresidual3": dresidual, "count": n * 49}
        cuda.local_backward(
            dy, x, dx, transform, dweight=gradients[0], dbias=gradients[1], **options
        )

    return step


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("n", "setting"), [(8, "0"), (8000, "0"), (8, "1")])
def test_a_bound_step_enters_few_functions_and_allocates_few_arrays(n, setting, residual):
    with resident(setting):
        check_bound_step(n, residual, alone=setting == "1")


def check_bound_step(n, residual, alone):
    """`alone`: each direction is one launch, which takes no scratch and leaves no sums."""
    fake_cupy.do_nothing()
    step = bound_step(residual, residual, n=n)
    step()
    entered, allocated, launched = [], [], fake_cupy.launched.copy()
    package = str(Path(cuda.__file__).parents[2])

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith((package, NUMPY)):
            entered.append(frame.f_code.co_name)
        if event == "call" and frame.f_code is fake_cupy._Memory.__init__.__code__:
            allocated.append(frame.f_locals["size"])

    sys.setprofile(count)
    step()
    sys.setprofile(None)
    one = [
        "local_forward",
        "_pointers",
        "scratch_for",
        "local_backward",
        "_pointers",
        "scratch_for",
    ]
    assert entered == [name for name in one if name != "scratch_for" or n > 8]
    assert allocated == [8 * 16, 8 * 16] + ([] if alone else [2 * 8 * 16])
    assert sum((fake_cupy.launched - launched).values()) == (2 if alone else 4)


def test_launches_of_one_rank_that_streams_are_two_a_direction():
    """The statistics are final in the launch that sums; asked for, they take another."""
    with resident("0"):
        bound_step(True, True)()
    kernels = ["batch_moments", "normalize", "backward_reduce", "backward_input"]
    assert list(fake_cupy.launched) == kernels
    assert set(fake_cupy.launched.values()) == {1}
    run(cuda, Case((3, 32, 49), np.dtype(np.float32), "residual relu"))
    assert fake_cupy.launched == dict.fromkeys(kernels, 2) | {"finalize_moments": 1}


def test_arrays_of_another_device_are_not_launched_on():
    """Whoever calls the backend makes the device of the arrays current; nothing here does."""
    x = there(gaussian((3, 32, 49), np.float32, 1))
    with (
        fake_cupy.cuda.Device(1),
        pytest.raises(ValueError, match="array device = 0 while current"),
    ):
        cuda.batch_moments(x)


# ---- masks ---------------------------------------------------------------------------------------


def masked_case(shape, dtype=np.float32, kind="half", mode="residual relu"):
    return Case(shape, np.dtype(dtype), mode, mask=mask_of(kind, shape, sum(shape)))


def test_valid_positions_are_counted():
    for shape in ((5, 1, 67), (1, 1, 1), (300, 1, 1), (0, 1, 4)):
        mask = mask_of("half", shape, 3)
        assert cuda.count_valid(there(mask)) == np.count_nonzero(mask)
    assert cuda.count_valid(there(mask_of("all valid", (40, 1, 67)))) == 40 * 67
    assert plainly.count_valid(there(mask_of("all valid", (40, 1, 67))[:, ::2])) == 40 * 34


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_a_mask_may_lie_anywhere(shape):
    """At an odd address, or strided: the same bits."""
    case = masked_case(shape)
    expected = [run(cuda, case), run_alone(case)]
    expected = [x.tobytes() for x in (expected[0].y, expected[0].dx, *expected[1])]
    wide = np.zeros((shape[0], 2 * shape[2]), np.uint8)
    wide[:, ::2] = case.mask
    for mask in (placed(case.mask, np.uint8, 3), wide[:, ::2]):
        case.mask = mask
        got = run(plainly, case)
        assert [got.y.tobytes(), got.dx.tobytes()] == expected[:2]
    case.mask = placed(case.mask, np.uint8, 3)
    assert [x.tobytes() for x in run_alone(case)] == expected[2:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_with_masks_pool_what_is_valid(dtype):
    """One of them has all values, another none."""
    shapes = ((3, 6, 49), (1, 6, 49), (70, 6, 49))
    cases = [
        masked_case(shape, dtype, kind, "plain")
        for shape, kind in zip(shapes, ("half", "none valid", "padded"), strict=True)
    ]
    cases.append(Case((2, 6, 49), dtype, "plain"))
    half = dtype == np.float64
    locals_, total = [], np.zeros(6 if half else 12)
    for case in cases:
        message = np.full(total.size, np.nan)
        given = case.counted | ({"mask": there(case.mask)} if case.counted else {})
        locals_.append(cuda.batch_moments(there(case.x), payload=there(message), **given))
        assert locals_[-1].count == case.count
        total += message
    count, second = sum(case.count for case in cases), total[6:]
    if half:
        second = np.zeros(6)
        for local in locals_:
            message = np.full(6, np.nan)
            cuda.recentre_moments(local, there(total), count, there(message))
            second += message
    moments = Moments(count, there(total[:6].copy()), there(second.copy()))
    whole = [np.where(c.valid, c.x, 0).astype(np.float64).transpose(0, 2, 1) for c in cases]
    whole = np.concatenate([x[c.valid[:, 0]] for x, c in zip(whole, cases, strict=True)])
    mean, var = whole.mean(axis=0), whole.var(axis=0)
    for case in cases:
        y, masked = there(case.outputs[0]), {}
        if case.masked:
            masked["mask"] = there(case.mask)
        form = "recentred" if half else "pooled"
        finish = cuda.finish_forward(moments, form, there(case.x), y, None, None, 1e-5, **masked)
        assert error(back(finish[0]), mean) < 1e-5
        exact = (case.x.astype(np.float64) - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]
        assert error(back(y), np.where(case.valid, exact, 0)) < TOLERANCE[dtype.name]


def test_launches_with_a_mask_are_two_a_direction_too():
    run_alone(masked_case((3, 32, 49)))
    assert fake_cupy.launched == dict.fromkeys(
        ("batch_moments", "normalize", "backward_reduce", "backward_input"), 1
    )


def test_nothing_valid_leaves_the_running_statistics_alone():
    case = masked_case((3, 32, 49), kind="none valid")
    mean, invstd, *running, y, dx, dweight, dbias, _, _ = run_alone(case)
    assert not mean.any()
    assert (running[0] == 0).all()
    assert (running[1] == 1).all()
    assert not y.any()
    assert not dx.any()
    assert (dweight == 1).all()
    assert (dbias == 1).all()
    assert error(invstd, np.full(32, 1 / np.sqrt(case.eps))) < 1e-12


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_with_a_mask_are_ready_before_a_message(dtype, ranks):
    """What is prepared is what is launched then."""
    case = masked_case((3, 32, 49), dtype)
    x, y, dy, mask = map(there, (case.x, case.outputs[0], case.dy, case.mask))
    bits = fake_cupy.zeros((case.x.size + 7) // 8, np.uint8)
    residual = there(case.residual)
    options = {"relu": True, "relu_bits": bits, "mask": mask}
    more = {"ranks": ranks, "running_dtype": "float64" if dtype == np.float64 else "float32"}
    cuda.prepare_forward(x, y, residual3=residual, **options, **more)
    cuda.prepare_backward(dy, x, y, dresidual3=residual, **options, ranks=ranks)
    if ranks == 2:  # what comes before the message may fail
        moments = cuda.batch_moments(x, mask=mask, count=case.count)
        sums = cuda.backward_reduce(dy, x, Transform(moments.mean, moments.m2), **options)
    before = set(source._kernels)
    if ranks == 1:
        mean, invstd = cuda.local_forward(
            x, y, None, None, 1e-5, residual3=residual, count=case.count, **options
        )
        transform = Transform(mean, invstd)
        cuda.local_backward(dy, x, y, transform, count=case.count, **options)
    else:
        form = "recentred" if dtype == np.float64 else "pooled"
        state = (
            there(np.zeros(32, parameter_dtype(dtype))),
            there(np.ones(32, parameter_dtype(dtype))),
        )
        statistics = cuda.finish_forward(
            moments, form, x, y, None, None, 1e-5, residual3=residual, running=state, **options
        )
        cuda.backward_input(dy, x, Transform(*statistics), sums=sums, count=7, out3=y, **options)
    assert set(source._kernels) == before
