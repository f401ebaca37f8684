"""One rank's forward and backward in one launch each: right, in bounds, and streamed where not."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from conftest import DTYPES, TOLERANCE
from cuda_tools import need
from cuda_variants import RESIDENT
from kernel_cases import (
    LARGE,
    MODES,
    Case,
    error,
    host_kernels,
    resident,
    run_alone,
)
from ptx.launch import missing
from test_kernels import CASES, OFFSETS, PER_CHANNEL, QUICK, name_of

from cupybn.backends import cuda
from cupybn.backends.cuda import launch
from cupybn.statistics import Transform

pytestmark = pytest.mark.timeout(600)
KERNELS = sorted(RESIDENT)
STREAMING = ["backward_input", "backward_reduce", "batch_moments", "normalize"]
# Beside those of test_kernels.py: tiles of several rounds of a thread, in blocks of 256 and 512.
LONGER = [(16, 4, 784), (40, 2, 784), (40, 34, 196), (80, 16, 49), (3000, 64, 1), (1200, 24, 1)]
LONGER_MODES = product(LONGER, DTYPES, MODES[1::2], (False, True))
SOME = [
    *((shape, dtype, mode, "aligned", c) for shape, dtype, mode, c in LONGER_MODES),
    *(case for case in CASES if case[0] not in LARGE or case[1].itemsize == 2),
]


@pytest.fixture(autouse=True)
def machine():
    need(missing())
    with host_kernels():
        yield


def launched():
    """The kernels that ran since this was asked last."""
    found = sorted(name.removesuffix("_flat") for name in fake_cupy.launched.elements())
    fake_cupy.launched.clear()
    return found


def results(case):
    mean, invstd, running_mean, running_var, y, dx, dweight, dbias, *more = run_alone(case)
    bits, dresidual = more or (None, None)
    return SimpleNamespace(
        mean=mean, invstd=invstd, running=(running_mean, running_var), y=y, dx=dx,
        dweight=dweight - 1, dbias=dbias - 1, relu_bits=bits, dresidual=dresidual,
    )  # fmt: skip


def check(case):
    """Against the formulas in float64: the limits of the kernels that stream."""
    f, dtype = case.forward, case.x.dtype.name
    got = results(case)
    tolerance, per_channel = TOLERANCE[dtype], PER_CHANNEL[dtype]
    assert error(got.mean, f.mean) < per_channel
    var = got.invstd**-2.0 - case.eps
    assert (np.abs(var - f.var) <= per_channel * (f.var + case.eps)).all()
    unbiased = f.var * (case.count / max(case.count - 1, 1))
    assert error(got.running[0], f.mean / 2) < per_channel
    assert error(got.running[1], (1 + unbiased) / 2) < per_channel
    assert error(got.y, f.y) < tolerance
    kept = got.y > 0 if case.activation else None
    if got.relu_bits is not None:
        assert (got.relu_bits == np.packbits(kept)).all()
    b = case.backward(kept)
    assert error(got.dx, b.dx) < tolerance
    terms_dy, terms_xmu = b.terms
    assert (np.abs(got.dbias - b.dbias) <= per_channel * (1 + terms_dy)).all()
    assert (np.abs(got.dweight - b.dweight) <= per_channel * (1 + terms_xmu)).all()
    if got.relu_bits is not None:
        assert error(got.dresidual, b.dresidual) == 0


def some():
    for i, case in enumerate(SOME):
        quick = i % (2 * QUICK) == 0 and np.prod(case[0]) < 100_000
        yield pytest.param(*case, marks=() if quick else pytest.mark.ptx)


@pytest.mark.parametrize(
    ("shape", "dtype", "mode", "offset", "constant"), list(some()), ids=name_of
)
def test_a_direction_in_one_launch_agrees_with_float64(shape, dtype, mode, offset, constant):
    with resident("1"):
        check(Case(shape, dtype, mode, sum(shape), OFFSETS[offset], constant=constant))


def test_both_directions_are_resident_in_most_cases():
    """The test above would else look at kernels that stream."""
    fake_cupy.do_nothing()
    with resident("1"):
        for shape, dtype in product(LONGER, DTYPES):
            run_alone(Case(shape, dtype, "residual relu"))
            assert "local_forward" in launched() or dtype == np.float64, (shape, dtype)
        some = [case for case in CASES[::5] if np.prod(case[0]) < 100_000]
        found = []
        for shape, dtype, mode, offset, constant in some:
            run_alone(Case(shape, dtype, mode, offsets=OFFSETS[offset], constant=constant))
            found += launched()
    for kernel in KERNELS:
        assert found.count(kernel) > len(some) / 4


# ---- what streams --------------------------------------------------------------------------------


def passes(shape=(8, 16, 64), dtype=np.float16, offsets=(0, 0, 0, 0), mode="plain"):
    """The kernels of a forward and a backward of one rank, which do nothing."""
    fake_cupy.do_nothing()
    launch.forward_launches.cache_clear()
    launch.backward_launches.cache_clear()
    run_alone(Case(shape, np.dtype(dtype), mode, offsets=offsets))
    return launched()


def test_what_fits_is_resident():
    assert passes() == ["local_backward", "local_forward"]


@pytest.mark.parametrize(
    ("what", "forward", "backward"),
    [
        ({"shape": (20, 3, 6272)}, STREAMING[2:], STREAMING[:2]),  # 251 KB a channel
        ({"shape": (12, 66, 6272)}, ["local_forward"], STREAMING[:2]),  # 151 KB
        ({"offsets": (1, 0, 0, 0)}, STREAMING[2:], STREAMING[:2]),  # x begins at 2 bytes
        ({"offsets": (0, 4, 0, 0)}, ["local_forward"], STREAMING[:2]),  # dy
        ({"offsets": (0, 0, 0, 4)}, STREAMING[2:], STREAMING[:2]),  # y and dx
        ({"offsets": (0, 0, 4, 0), "mode": "residual"}, STREAMING[2:], ["local_backward"]),
        ({"shape": (3, 3, 1001)}, STREAMING[2:], STREAMING[:2]),  # ragged rows
        ({"shape": (5, 3, 49)}, STREAMING[2:], STREAMING[:2]),  # ragged runs
        ({"shape": (64, 257, 1)}, STREAMING[2:], STREAMING[:2]),  # by the element
    ],
    ids=str,
)
@pytest.mark.parametrize("setting", ["auto", "1"])
def test_what_does_not_fit_or_is_not_in_whole_vectors_streams(what, forward, backward, setting):
    with resident(setting):
        assert passes(**what) == sorted(forward + backward)


def test_few_tiles_of_a_large_tensor_stream_unless_told():
    large = (40, 24, 2352)  # 188 KB a channel: 24 multiprocessors of 132 would work
    with resident("auto"):
        assert passes(large) == STREAMING
    with resident("1"):
        assert passes(large) == ["backward_input", "backward_reduce", "local_forward"]
    with resident("0"):
        assert passes() == STREAMING


@pytest.mark.parametrize("refused", [True, False])
def test_a_device_that_refuses_the_shared_memory(monkeypatch, refused):
    """It has said that a block can have so much."""
    if refused:
        monkeypatch.setattr(fake_cupy, "SHARED", 64 << 10)
    x = Case((4, 32, 3136), np.dtype(np.float16), "plain")
    assert passes(x.x.shape) == (STREAMING if refused else ["local_backward", "local_forward"])


@pytest.mark.parametrize(("kilobytes", "expected"), [(227, 2), (99, 1), (48, 0)])
def test_the_device_is_asked_how_much_a_block_can_have(monkeypatch, kilobytes, expected):
    """56 KB a channel: x alone, x with dy, or neither."""
    attributes = fake_cupy.Device.attributes | {"MaxSharedMemoryPerBlockOptin": kilobytes << 10}
    monkeypatch.setattr(fake_cupy.Device, "attributes", attributes)
    launch._shared_memory.cache_clear()
    found = passes((9, 24, 3136))
    launch._shared_memory.cache_clear()
    assert sum(name in KERNELS for name in found) == expected


def test_several_ranks_stream():
    from cupybn import SyncBatchNorm
    from cupybn.testing import run_ranks

    fake_cupy.do_nothing()
    x = fake_cupy.zeros((8, 16, 64), np.float16)

    def rank(comm):
        layer = SyncBatchNorm(16, comm=comm, device="cuda")
        layer.backward(layer(x))

    with resident("1"):
        run_ranks(2, rank)
    assert launched() == sorted([*STREAMING, "finalize_moments"] * 2)


@pytest.mark.parametrize("setting", ["yes", "2", "AUTO"])
def test_a_wrong_setting_is_named(setting):
    message = f"CUPYBN_RESIDENT must be auto, 0 or 1, got '{setting}'"
    with resident(setting), pytest.raises(ValueError, match=message):
        passes()


def test_empty_batches():
    with resident("1"):
        x, weight = fake_cupy.zeros((0, 4, 8), np.float16), fake_cupy.ones(4, np.float32)
        mean, invstd = cuda.local_forward(x, x, weight, weight, 1e-5)
        assert not mean.any()
        cuda.local_backward(x, x, x, Transform(mean, invstd, weight, weight), count=0)
    assert launched() == ["finalize_moments"]
