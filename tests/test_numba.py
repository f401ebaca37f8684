"""The compiled CPU backend: threads, arrays of every kind, compiling in time, and who chooses it.

That its numbers are right is in test_primitives.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import BFLOAT16, DTYPES, NUMBA, ROOT, TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st
from plainly import Plainly

import cupybn
from cupybn import backends, launcher
from cupybn.backends import cpu as compiled
from cupybn.backends import numpy as plain
from cupybn.backends.cpu import plan as plans
from cupybn.backends.cpu import pool
from cupybn.errors import PeerError
from cupybn.statistics import BackwardSums, Moments, Transform
from cupybn.testing import run_ranks

PACKAGE = Path(cupybn.__file__).parent
needs_numba = pytest.mark.skipif(not NUMBA, reason="Numba is not installed")
SHAPES = [(8, 31, 100), (9, 5, 49), (300, 33, 1), (5, 40, 4), (3, 1, 200_003), (1, 2, 150_000)]
SHAPES += [(2501, 3, 1), (40, 3000, 1), (70_000, 5, 1)]
LARGE = [(70, 150, 201), (5, 3, 140_001), (9000, 333, 1), (33_001, 65, 1)]  # past the caches


@pytest.fixture(autouse=True)
def _as_before():
    yield
    pool.set_threads(None)


def normal(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def everything(backend, x, dy, relu=True):
    """All results of a forward and a backward through the primitives."""
    c = x.shape[1]
    weight, bias = normal(c, seed=1) + 1, normal(c, seed=2)
    residual = normal(x.shape, seed=3).astype(x.dtype) if relu else None
    relu_bits = np.empty(-(-x.size // 8), np.uint8) if relu else None
    moments = backend.batch_moments(x)
    mean, var, invstd = backend.finalize_moments(moments, 1e-5)
    y = backend.normalize(
        x, Transform(mean, invstd, weight, bias), residual3=residual, relu_bits=relu_bits, relu=relu
    )
    options = {"relu": relu, "relu_bits": relu_bits}
    sums = backend.backward_reduce(dy, x, Transform(mean, invstd, weight, bias), **options)
    gradients = [np.zeros(c, np.float32), np.zeros(c, np.float32)]
    dresidual = np.empty_like(x)
    dx = backend.backward_input(
        dy, x, Transform(mean, invstd, weight, bias), sums=sums, count=moments.count, local=sums,
        dweight=gradients[0], dbias=gradients[1], dresidual3=dresidual, **options,
    )  # fmt: skip
    return [mean, var, y, relu_bits if relu else mean, *sums, dx, dresidual, *gradients]


# ---- who computes --------------------------------------------------------------------------------


def chosen(code, cwd=None, **env):
    """What a fresh interpreter prints."""
    path = os.pathsep.join([env.pop("first_path", ""), str(ROOT)]).strip(os.pathsep)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CUPYBN")}
    return subprocess.run(
        [sys.executable, "-c", "import warnings, sys; from cupybn import backends; " + code],
        env=clean | {"PYTHONPATH": path} | env, capture_output=True, text=True, cwd=cwd,
    )  # fmt: skip


def test_the_environment_chooses():
    name = "print(backends.cpu_backend().__name__, 'numba' in sys.modules)"
    assert chosen(name, CUPYBN_CPU_BACKEND="numpy").stdout.split() == [plain.__name__, "False"]
    wrong = chosen(name, CUPYBN_CPU_BACKEND="Numba").stderr
    assert "CUPYBN_CPU_BACKEND must be 'auto', 'numba' or 'numpy', got 'Numba'" in wrong
    for env in ({}, {"CUPYBN_CPU_BACKEND": "auto"}, {"CUPYBN_CPU_BACKEND": ""}):
        expected = [compiled.__name__, "True"] if NUMBA else [plain.__name__, "False"]
        assert chosen(name, **env).stdout.split() == expected


def test_without_numba_numpy_computes(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.use_cpu_backend("auto") is plain


@pytest.mark.parametrize("raised", ["ImportError", "AttributeError", "OSError", "SystemError"])
def test_a_broken_numba_is_not_passed_over_in_silence(tmp_path, raised):
    (tmp_path / "numba.py").write_text(f"raise {raised}('Numba needs another NumPy')\n")
    name = "print(backends.cpu_backend().__name__)"
    forced = chosen(name, first_path=str(tmp_path), CUPYBN_CPU_BACKEND="numba")
    assert forced.returncode != 0
    said = "" if raised == "ImportError" else f"{raised}: "
    assert f"({said}Numba needs another NumPy): pip install --upgrade numba" in forced.stderr
    auto = chosen(name, first_path=str(tmp_path))
    assert auto.stdout.split() == [plain.__name__], auto.stderr
    assert "RuntimeWarning: Numba is installed, but cannot be used" in auto.stderr


@needs_numba
def test_python_in_place_of_compiled_loops_is_refused():
    code = "print(backends.cpu_backend().__name__)"
    forced = chosen(code, NUMBA_DISABLE_JIT="1", CUPYBN_CPU_BACKEND="numba")
    assert "NUMBA_DISABLE_JIT is set" in forced.stderr.splitlines()[-1]


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, 8), ({"OMP_NUM_THREADS": "3"}, 3), ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"NUMBA_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}, 5),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 2), ({"MPI_LOCALNRANKS": "3"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, 4), ({"PMI_LOCAL_SIZE": "100"}, 1),
        ({"OMP_NUM_THREADS": "none"}, 8),
    ],
)  # fmt: skip
def test_ranks_share_the_cores(monkeypatch, env, expected):
    for name in (
        *launcher.LOCAL_SIZE_VARIABLES,
        "SLURM_CPUS_ON_NODE",
        "OMP_NUM_THREADS",
        "NUMBA_NUM_THREADS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    pool.set_threads(None)
    assert pool.thread_count() == expected


@pytest.mark.parametrize("fails", ["caller", "helper"])
def test_an_error_of_the_caller_is_raised_and_one_of_a_helper_is_not(fails):
    pool.set_threads(2)
    came = [threading.Event() for _ in range(5)]

    def kernel(helper, turns, event):
        if helper:
            event.set()
        assert event.wait(timeout=30)
        if helper == (fails == "helper"):
            raise MemoryError("no stack")

    for event in came:
        if fails == "caller":
            with pytest.raises(MemoryError, match="no stack"):
                pool.spread(kernel, 2, (), None, event)
        else:
            pool.spread(kernel, 2, (), None, event)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pool.set_threads(0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads stay where they are put")
def test_a_worker_leaves_the_core_of_its_caller(monkeypatch):
    monkeypatch.setattr(pool, "_current_core", lambda: 3)
    moves = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda who, cores: moves.append((who, cores)))
    for allowed, caller, moved in (
        ({2, 3, 5}, 3, [(0, {2, 5})]), ({2, 3, 5}, 2, []), ({3}, 3, []),
    ):  # fmt: skip
        monkeypatch.setattr(os, "sched_getaffinity", lambda who, allowed=allowed: set(allowed))
        moves.clear()
        pool._leave_core(caller)
        assert moves == moved


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads stay where they are put")
def test_only_workers_are_moved():
    pool.set_threads(2)
    allowed, helpers, came = os.sched_getaffinity(0), set(), threading.Semaphore(0)

    def kernel(helper, turns):
        if helper:
            helpers.add(threading.get_ident())
            came.release()
        assert came.acquire(timeout=30)
        came.release()

    for _ in range(20):
        pool.spread(kernel, 4, (), None)
        assert os.sched_getaffinity(0) == allowed
    assert helpers
    assert threading.get_ident() not in helpers


@needs_numba
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_the_bits_do_not_depend_on_the_number_of_threads(shape, relu):
    x, dy = normal(shape), normal(shape, seed=4)
    pool.set_threads(1)
    expected = everything(compiled, x, dy, relu)
    for number in (2, 5):
        pool.set_threads(number)
        for actual, value in zip(everything(compiled, x, dy, relu), expected, strict=True):
            np.testing.assert_array_equal(actual, value)


@needs_numba
def test_every_item_is_done_once_whoever_calls():
    import numba

    from cupybn.backends.cpu.intrinsics import enter, leave, take

    @numba.njit(nogil=True)
    def kernel(helper, items, turns, times):
        taking, (times,) = enter(turns, helper, (times,))
        i = take(turns) if taking else len(items)
        while i < len(items):
            times[items[i]] += 1
            i = take(turns)
        leave(turns, helper)

    def call(times):
        items = np.arange(times.size)
        for _ in range(20):
            pool.spread(kernel, 5, (items,), np.zeros(2, np.int64), times)

    for number in (1, 2, 5):
        pool.set_threads(number)
        several = np.zeros((6, 20_000), np.int64)
        callers = [threading.Thread(target=call, args=(times,)) for times in several]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=60)
        assert (several == 20).all()


@needs_numba
def test_ranks_that_are_threads_compute_at_once():
    backends.use_cpu_backend("numba")
    pool.set_threads(3)
    x, dy = normal((32, 8, 50, 50)), normal((32, 8, 50, 50), seed=1)
    whole = cupybn.BatchNorm2d(8)
    y, dx = whole(x), whole.backward(dy)

    def rank(comm):
        layer = cupybn.SyncBatchNorm(8, comm=comm)
        mine = slice(8 * comm.rank, 8 * comm.rank + 8)
        for _ in range(5):
            results = layer(x[mine]), layer.backward(dy[mine])
        return results

    for i, (y_rank, dx_rank) in enumerate(run_ranks(4, rank)):
        np.testing.assert_allclose(y_rank, y[8 * i : 8 * i + 8], atol=1e-6)
        np.testing.assert_allclose(dx_rank, dx[8 * i : 8 * i + 8], atol=1e-6)


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    code = """if True:
        import os, numpy as np, cupybn
        from cupybn.backends.cpu import pool
        pool.set_threads(2)
        warnings.simplefilter("ignore")
        layer, x = cupybn.BatchNorm2d(40), np.ones((32, 40, 40, 40), np.float32)
        layer(x)
        child = os.fork()
        layer(x)
        if child == 0:
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    process = chosen(f"exec({code!r})", CUPYBN_CPU_BACKEND="numba")
    assert process.stdout.split() == ["7"], process.stderr


# ---- arrays --------------------------------------------------------------------------------------


@needs_numba
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_arrays_that_are_strided_or_read_only(shape):
    x, dy = normal(shape), normal(shape, seed=4)
    expected, plainly = everything(compiled, x, dy), Plainly(compiled)
    fixed = x.copy(), dy.copy()
    for array in fixed:
        array.flags.writeable = False
    wide = np.repeat(x, 2, axis=1)[:, ::2], np.repeat(dy, 2, axis=0)[::-2][::-1]
    for arrays in (fixed, wide):
        for actual, value in zip(everything(plainly, *arrays), expected, strict=True):
            np.testing.assert_array_equal(actual, value)
    mean, invstd = expected[0], np.ones(shape[1])
    weight = np.repeat(np.float32([2]), shape[1])
    weight.flags.writeable = False
    y = plainly.normalize(x, Transform(mean, invstd, weight))
    strided = np.zeros((shape[0], 2 * shape[1], shape[2]), np.float32)[:, ::2]
    assert (
        plainly.normalize(x, Transform(mean[::-1][::-1], invstd, weight), out3=strided) is strided
    )
    np.testing.assert_array_equal(strided, y)
    plainly.backward_input(dy, x, Transform(mean, invstd, weight), out3=strided)
    np.testing.assert_array_equal(strided, dy * 2)


def off_by_one(shape, dtype):
    """An array whose memory begins in the middle of a cache line."""
    return np.empty(int(np.prod(shape)) + 1, dtype)[1:].reshape(shape)


@needs_numba
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_goes_past_the_caches_arrives(shape, dtype):
    from cupybn.backends.cpu.forward import STREAMED

    wide = np.float64 if dtype == np.float64 else np.float32
    x, dy = normal(shape, wide).astype(dtype), normal(shape, wide, seed=4).astype(dtype)
    assert x.nbytes > STREAMED or dtype.itemsize == 2
    mean, invstd = normal(shape[1], np.float64), np.abs(normal(shape[1], np.float64, 1)) + 1
    y, dx = off_by_one(shape, dtype), off_by_one(shape, dtype)
    sums = compiled.backward_reduce(dy, x, Transform(mean, invstd))
    compiled.normalize(x, Transform(mean, invstd), out3=y)
    compiled.backward_input(dy, x, Transform(mean, invstd), sums=sums, count=1000, out3=dx)
    exact = (x.astype(np.float64) - mean[:, None]) * invstd[:, None]
    tolerance = TOLERANCE[dtype.name]
    np.testing.assert_allclose(y.astype(np.float64), exact, tolerance, tolerance)
    exact *= invstd[:, None] * sums.sum_dy_xmu[:, None] / -1000
    exact += dy.astype(np.float64) - sums.sum_dy[:, None] / 1000
    exact *= invstd[:, None]
    scale = np.abs(exact).max()
    assert np.abs(dx.astype(np.float64) - exact).max() < tolerance * scale


def unaligned(values):
    """A copy whose values begin in the middle of others."""
    memory = bytearray(values.nbytes + 1)
    copy = np.frombuffer(memory, np.uint8)[1:].view(values.dtype).reshape(values.shape)
    copy[...] = values
    assert not copy.flags.aligned
    return copy


@needs_numba
@pytest.mark.parametrize("shape", [(300, 33), (9000, 333), (70, 50, 30, 30)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_unaligned_arrays_are_taken(shape, ranks):
    backends.use_cpu_backend("numba")
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))

    def step(place, comm):
        layer = cupybn.SyncBatchNorm(shape[1], activation="relu", comm=comm)
        for arrays in (layer.params, layer.grads, layer.buffers):
            for name in {"weight", "bias", "running_mean", "running_var"} & set(arrays):
                arrays[name] = place(arrays[name])
        outs = [None, None] if place is np.copy else [place(x) for _ in range(2)]
        y = layer.forward(place(x), place(dy), out=outs[0])
        dx, dresidual = layer.backward(place(dy), out=outs[1])
        return [y, dx, dresidual, *layer.grads.values(), *layer.buffers.values()]

    def both(comm):
        for one, other in zip(step(unaligned, comm), step(np.copy, comm), strict=True):
            np.testing.assert_array_equal(one, other)

    run_ranks(ranks, both)


@needs_numba
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_past_the_caches_or_not_is_the_same(shape, dtype, in_place):
    wide = np.float64 if dtype == np.float64 else np.float32
    x, dy, residual = (normal(shape, wide, seed=i).astype(dtype) for i in range(3))
    c = shape[1]
    transform = normal(c, np.float64, 3), np.abs(normal(c, np.float64, 4)) + 1
    transform += normal(c, wide, 5), normal(c, wide, 6)
    sums = compiled.backward_reduce(dy, x, Transform(*transform))
    relu_bits = np.empty(-(-x.size // 8), np.uint8)

    def results(n, relu_bits=None):
        data, gradient = x[n].copy(), dy[n].copy()
        y, dx = (data, gradient) if in_place else map(off_by_one, (data.shape,) * 2, (dtype,) * 2)
        compiled.normalize(
            data,
            Transform(*transform),
            relu=True,
            residual3=residual[n],
            out3=y,
            relu_bits=relu_bits,
        )
        dresidual = np.empty_like(dx)
        compiled.backward_input(
            gradient, x[n], Transform(*transform), sums=sums, count=1000, relu=True, out3=dx,
            dresidual3=dresidual,
        )  # fmt: skip
        plain = compiled.backward_input(dy[n], x[n], Transform(*transform), sums=sums, count=1000)
        return [a.astype(wide) for a in (y, dx, dresidual, plain)]

    whole = results(slice(None), relu_bits)
    step = -(-shape[0] // 8)
    parts = zip(*(results(slice(n, n + step)) for n in range(0, shape[0], step)), strict=True)
    for one, many in zip(whole, parts, strict=True):
        tolerance = TOLERANCE[dtype.name]
        np.testing.assert_allclose(one, np.concatenate(many), tolerance, tolerance)
    np.testing.assert_array_equal(relu_bits, np.packbits(whole[0] > 0))


SIGNATURES = """
def there():
    from cupybn.backends.cpu import compiler
    return sum(len(kernel.signatures) for kernel in compiler._kernels)
"""


@needs_numba
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("direction", ["local forward", "local backward", "forward", "backward"])
def test_a_rehearsal_compiles_what_is_played(direction, columns):
    shape = (4, 3, 1) if columns else (4, 3, 200)
    code = f"""if True:
        import numpy as np
        from cupybn.backends import cpu
        from cupybn.statistics import Transform
        cpu.rehearse({direction.split()[-1]!r}, np.dtype("float32"), {columns}, True, False)
        before = there()
        x = np.ones({shape}, np.float32)
        y, one, numbers = x.copy(), np.ones(3, np.float32), np.zeros(6)
        transform = Transform(np.ones(3), np.ones(3), one, one)
        if {direction!r} == "local forward":
            cpu.local_forward(x, y, one, one, 1e-5, running=(one, one), factor=0.1)
        elif {direction!r} == "local backward":
            cpu.local_backward(x, x, y, transform, count=4, dweight=one, dbias=one)
        elif {direction!r} == "forward":
            moments = cpu.batch_moments(x, payload=numbers)
            cpu.finish_forward(moments, "local", x, y, one, None, 1e-5, running=(one, one))
            cpu.normalize(x, transform)
        else:
            sums = cpu.backward_reduce(x, x, transform, payload=numbers)
            options = dict(sums=sums, count=4, local=sums, dweight=one, dbias=one)
            cpu.backward_input(x, x, transform, **options)
        assert there() == before
    """
    process = chosen(f"exec({SIGNATURES!r}); exec({code!r})", CUPYBN_CPU_BACKEND="numba")
    assert not process.returncode, process.stderr


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE[0]], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_in_one_go_is_the_same_as_in_steps(shape, dtype, relu):
    wide = np.float64 if dtype == np.float64 else np.float32
    x, dy, residual = (normal(shape, wide, seed=i).astype(dtype) for i in range(3))
    c = shape[1]
    weight, bias = normal(c, wide, 3), normal(c, wide, 4)
    running = [[np.zeros(c, wide), np.ones(c, wide)] for _ in range(2)]
    masks = [np.empty(-(-x.size // 8), np.uint8) if relu else None for _ in range(2)]
    options = {"relu": relu}
    added = {"residual3": residual} if relu else {}

    moments = compiled.batch_moments(x)
    expected = compiled.finalize_moments(moments, 1e-5, running=running[0], factor=0.3)
    mean, _, invstd = expected
    y = compiled.normalize(
        x, Transform(mean, invstd, weight, bias), relu_bits=masks[0], **added, **options
    )
    y_alone = np.empty_like(x)
    alone = compiled.local_forward(
        x, y_alone, weight, bias, 1e-5, relu_bits=masks[1], running=running[1], factor=0.3,
        **added, **options,
    )  # fmt: skip
    pairs = [
        *zip((mean, invstd), alone, strict=True),
        *zip(*running, strict=True),
        (y, y_alone),
        masks,
    ]

    for constant in (False, True):
        gradients = [[np.ones(c, wide), np.ones(c, wide)] for _ in range(2)]
        dresidual = [np.empty_like(x) if relu else None for _ in range(2)]
        options["relu_bits"] = masks[0]
        sums = compiled.backward_reduce(dy, x, Transform(mean, invstd, weight, bias), **options)
        dx = compiled.backward_input(
            dy, x, Transform(mean, invstd, weight, bias), sums=None if constant else sums,
            count=moments.count, local=sums, dweight=gradients[0][0], dbias=gradients[0][1],
            dresidual3=dresidual[0], **options,
        )  # fmt: skip
        dx_alone = np.empty_like(x)
        compiled.local_backward(
            dy,
            x,
            dx_alone,
            Transform(mean, invstd, weight, bias),
            count=0 if constant else moments.count,
            dweight=gradients[1][0],
            dbias=gradients[1][1],
            dresidual3=dresidual[1],
            **options,
        )
        pairs += [*zip(*gradients, strict=True), (dx, dx_alone), dresidual]
    for value, other in pairs:
        np.testing.assert_array_equal(other, value)


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:5], LARGE[0]], ids=str)
def test_writing_over_what_is_read(shape, dtype):
    x, dy = normal(shape).astype(dtype), normal(shape, seed=4).astype(dtype)
    mean, invstd = normal(shape[1], np.float64), np.abs(normal(shape[1], np.float64, 1)) + 1
    for relu in (False, True):
        y = compiled.normalize(x, Transform(mean, invstd), residual3=dy, relu=relu)
        onto = dy.copy()
        compiled.normalize(x, Transform(mean, invstd), residual3=onto, out3=onto, relu=relu)
        np.testing.assert_array_equal(onto, y)
        onto = x.copy()
        compiled.normalize(onto, Transform(mean, invstd), out3=onto, relu=relu)
        y = compiled.normalize(x, Transform(mean, invstd), relu=relu)
        np.testing.assert_array_equal(onto, y)
        sums = compiled.backward_reduce(dy, x, Transform(mean, invstd), relu=relu)
        dx = compiled.backward_input(dy, x, Transform(mean, invstd), sums=sums, count=9, relu=relu)
        onto = dy.copy()
        compiled.backward_input(
            onto, x, Transform(mean, invstd), sums=sums, count=9, relu=relu, out3=onto
        )
        np.testing.assert_array_equal(onto, dx)


@needs_numba
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), *BFLOAT16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.7071, 3e-3])
def test_every_16_bit_value_is_read_and_rounded_as_by_numpy(dtype, scale):
    x = np.arange(65536, dtype=np.uint16).view(dtype).reshape(1, 1, -1)
    with np.errstate(all="ignore"):
        expected = (x.astype(np.float32) * np.float32(scale)).astype(dtype)
    for columns in (False, True):
        x3 = x.reshape(-1, 1, 1) if columns else x
        y = compiled.normalize(x3, Transform(np.zeros(1), np.full(1, scale))).reshape(x.shape)
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(y), nan)
        # no bits of NaN, and no sign of 0: x - 0 + 0
        np.testing.assert_array_equal(y[~nan], expected[~nan])


@given(
    n=st.integers(1, 5000), c=st.integers(1, 3000), length=st.integers(1, 5000),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_items_cover_every_value_once(n, c, length):
    n = min(n, max(1, 20_000_000 // (c * length)))
    plan = plans.plan_for(n, c, length)
    assert sum(plan.counts) == n * length
    for items in (plan.items, plan.alone):
        seen = np.zeros(n * c * length, np.uint8)
        per_segment = np.zeros(len(plan.counts))
        for item in map(plans.WorkItem._make, items):
            row = item.length if plan.columns else item.channels * item.length
            whole = seen[item.start :][: seen[item.start :].size // row * row]
            c0, c1 = (0, 1) if plan.columns else (item.c0, item.c1)
            block = whole.reshape(-1, row // item.length, item.length)
            block = block[item.n0 : item.n1, c0:c1, item.l0 : item.l1]
            block += 1
            per_segment[item.segment // c] += block.size
            assert (item.l1 - item.l0 if plan.columns else item.step) <= plans.WIDE
            if plan.columns:
                of = np.arange(item.l0, item.l1) // length % c  # the channel of each column
                assert (of.min(), of.max() + 1) == (item.c0, item.c1)
                assert item.step == length
        assert (seen == 1).all()
        np.testing.assert_array_equal(per_segment, np.array(plan.counts) * c)
    assert len(plan.alone) <= len(plan.items)


# ---- compiling -----------------------------------------------------------------------------------


@needs_numba
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("columns", [False, True])
def test_preparing_compiles_all_that_comes_after_a_message(columns, dtype):
    code = f"""if True:
        import numpy as np
        from cupybn.statistics import Transform
        from cupybn import functional as f
        from cupybn.backends import cpu as b
        x = np.ones((6, 2, {1 if columns else 60}), "{dtype}")
        w, relu_bits = np.ones(2, "{dtype}"), np.zeros(100, np.uint8)
        moments = b.batch_moments(x, payload=np.zeros(4))
        b.prepare_forward(x, x, residual3=x, relu_bits=relu_bits, relu=True, ranks=2)
        before = there()
        options = dict(relu=True, residual3=x, relu_bits=relu_bits)
        mean, invstd = b.finish_forward(moments, "pooled", x, x, w, None, 1.0, **options)
        b.finish_forward(moments, "local", x, x, None, w, 1.0, running=(w, w))
        b.normalize(x, Transform(mean, invstd, w), **options)
        assert there() == before, "forward"
        sums = b.backward_reduce(x, x, Transform(mean, invstd), payload=np.zeros(4))
        b.prepare_backward(x, x, x, ranks=2)
        before = there()
        of = Transform(mean, invstd, w)
        b.backward_input(x, x, of, sums=sums, local=sums, dweight=w, dresidual3=x)
        b.backward_input(x, x, of, dbias=w, relu=True, relu_bits=relu_bits)
        assert there() == before, "backward"
        b.prepare_forward(x, x, residual3=x, relu_bits=relu_bits, relu=True)
        b.prepare_backward(x, x, x)
        before = there()
        b.local_forward(x, x.copy(), w, None, 1.0, relu_bits=relu_bits, running=(w, w), relu=True)
        b.local_backward(x, x, x.copy(), of, count=6, dweight=w, dresidual3=x)
        assert there() == before, "alone"
        for odd in (x[::-1], np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)):
            _, saved = f.batch_norm_forward(odd, w[::-1], w)
            f.batch_norm_backward(odd, saved)
            f.batch_moments(odd, payload=np.zeros(8)[::2])
            f.backward_reduce(odd, x, mean[::-1], invstd)
            f.backward_input(x, odd, mean, invstd, w, sums=sums)
            f.normalize(odd, mean, invstd, w, residual3=odd)
        assert there() == before, "arrays of another kind"
        print("done")
    """
    process = chosen(f"exec({SIGNATURES!r}); exec({code!r})")
    assert process.stdout.split() == ["done"], process.stderr


@needs_numba
@pytest.mark.parametrize("shape", [(8, 16, 1), (4, 3, 200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_enters_one_function_and_its_kernel(shape, dtype):
    x = normal(shape).astype(dtype)
    y, dx, c = np.empty_like(x), np.empty_like(x), shape[1]
    w, b, mean, var, dw, db = np.ones((6, c), np.float64 if dtype == np.float64 else np.float32)
    relu_bits, message = np.empty(-(-x.size // 8), np.uint8), np.zeros(2 * c)
    total = BackwardSums(message[:c], message[c:])
    moments = Moments(9, message[:c], message[c:])
    extra, running = {"relu": True, "relu_bits": relu_bits}, {"running": (mean, var), "factor": 0.1}

    def forward(**extra):
        return compiled.local_forward(x, y, w, b, 1e-5, **running, **extra)

    of = Transform(*forward(residual3=x, **extra), w, b)

    def backward(**extra):
        compiled.local_backward(x, x, dx, of, count=9, dweight=dw, dbias=db, **extra)

    calls = [
        (forward, 2), (backward, 2),
        (lambda: forward(residual3=x, **extra), 5), (lambda: backward(dresidual3=y, **extra), 2),
        (lambda: compiled.batch_moments(x, payload=message), 2),
        (lambda: compiled.finish_forward(moments, "pooled", x, y, w, b, 1e-5, **running), 2),
        (lambda: compiled.backward_reduce(x, x, of, payload=message), 2),
        (lambda: compiled.backward_input(
            x, x, of, sums=total, count=9, out3=dx, local=total, dweight=dw, dbias=db), 2),
    ]  # fmt: skip
    for call, most in calls:
        call()
        entered = []

        def note(frame, event, _, entered=entered):
            name = frame.f_code.co_filename
            if event == "call" and ("numpy" in name or "cupybn/backends" in name):
                entered.append(frame.f_code.co_name)

        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
        assert len(entered) <= most, entered


@needs_numba
def test_a_rank_that_cannot_compile_tells_the_others(monkeypatch):
    backends.use_cpu_backend("numba")
    prepare = {name: getattr(compiled, name) for name in ("prepare_forward", "prepare_backward")}

    def rank(comm, direction):
        layer = cupybn.SyncBatchNorm(3, comm=comm)
        x = np.full((4, 3, 5, 5), comm.rank, np.float32) + normal((4, 3, 5, 5)) / 9

        def fails_on_rank_1(*arrays, **options):
            if threading.current_thread() is culprit[0]:
                raise OSError("no compiler")
            prepare[f"prepare_{direction}"](*arrays, **options)

        if comm.rank == 1:
            culprit.append(threading.current_thread())
        comm.allreduce(np.zeros(1))
        if direction == "backward":
            layer(x)
        comm.allreduce(np.zeros(1))
        monkeypatch.setattr(compiled, f"prepare_{direction}", fails_on_rank_1)
        comm.allreduce(np.zeros(1))
        with pytest.raises(OSError if comm.rank == 1 else PeerError):
            layer(x) if direction == "forward" else layer.backward(x)
        return layer.grads["weight"].any() or layer.num_batches_tracked

    for direction, tracked in (("forward", 0), ("backward", 1)):
        culprit = []
        assert run_ranks(3, rank, direction) == [tracked] * 3
        monkeypatch.undo()


@needs_numba
def test_compiling_is_logged(caplog):
    compiled.rehearse.cache_clear()
    x = normal((4, 3, 8))
    with caplog.at_level("DEBUG", logger="cupybn"):
        for ranks in (1, 1, 2, 2):
            compiled.prepare_forward(x, x, ranks=ranks)
    texts = [record.getMessage().partition(": ")[0] for record in caplog.records]
    assert texts == ["forward of float32 columns"]


@needs_numba
def test_compiling_is_told_once_and_done_again_where_any_file_changed(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "cupybn", ignore=shutil.ignore_patterns("__pycache__"))
    code = """if True:
        import numpy as np
        from cupybn.backends import cpu
        from cupybn.backends.cpu.plan import bits_items
        kernels, y = cpu.load(), np.ones((2, 3, 4), np.float32)
        kernels.pack_bits(False, bits_items(3), np.zeros(2, np.int64), y, np.zeros(3, np.uint8))
        print(kernels.compiled())
    """

    def run(**env):
        env = {"first_path": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache"), **env}
        process = chosen(f"exec({code!r})", cwd=tmp_path, **env)
        assert not process.returncode, process.stderr
        return int(process.stdout), process.stderr.splitlines()

    compilations, told = run()
    assert compilations == 1
    assert len(told) == 1, told
    assert told[0].startswith("cupybn: compiling for float32, once; kept in " + str(tmp_path))
    assert run() == (0, [])
    with (tmp_path / "cupybn/backends/cpu/intrinsics.py").open("a") as file:
        file.write("# changed\n")
    assert run(MPI_LOCALRANKID="1") == (compilations, [])  # one rank of a machine says it
    assert run() == (0, [])
    for file in (tmp_path / "cache").glob("*/*.nbc"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert run() == (compilations, told)


@needs_numba
@pytest.mark.parametrize("bar", [False, True])
def test_compile_command(capsys, monkeypatch, bar):
    from cupybn.cli import compile as command
    from cupybn.cli import main

    found = command.find_spec
    monkeypatch.setattr(
        command, "find_spec", lambda name: None if name == "tqdm" and not bar else found(name)
    )
    assert main(["compile", "--dtypes", "float32"]) == 0
    said = capsys.readouterr()
    kinds = [line.split(":")[0].split() for line in said.out.splitlines()]
    expected = [
        ["float32", layout, direction]
        for layout in ("rows", "columns")
        for direction in compiled.DIRECTIONS
    ]
    assert kinds == ([] if bar else expected) + [["compiled"]]
    assert ("float32 columns backward" in said.err) == bar
