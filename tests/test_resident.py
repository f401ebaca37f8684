"""One rank's forward and backward in one launch each: right, in bounds, and streamed where not."""

from __future__ import annotations

import re
from itertools import product
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest
from conftest import DTYPES, TOLERANCE
from cuda_tools import need
from cuda_variants import RESIDENT, variants
from kernel_cases import (
    LARGE,
    MODES,
    Case,
    back,
    error,
    gaussian,
    host_kernels,
    placed,
    plainly,
    resident,
    run_alone,
    there,
)
from ptx.launch import missing
from test_kernels import CASES, LAYOUTS, OFFSETS, PER_CHANNEL, QUICK, name_of

from cupybn.backends import cuda
from cupybn.backends.cuda import launch
from cupybn.backends.cuda.plan import RESIDENT_THREADS, plan_resident
from cupybn.statistics import Transform

if missing() is None:
    from ptx import nvrtc
    from ptx.launch import Module, PtxError, compile_module, counting, setting
    from test_ptx_kernels import large, some_blocks, without
    from traffic import _split, aligned, counted_kernels

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


def test_a_mask_of_valid_values_streams():
    fake_cupy.do_nothing()
    x, weight = fake_cupy.zeros((8, 16, 64), np.float16), fake_cupy.ones(16, np.float32)
    masked = {"mask": fake_cupy.ones((8, 64), np.uint8)}
    with resident("1"):
        mean, invstd = cuda.local_forward(x, x, weight, weight, 1e-5, **masked, count=512)
        transform = Transform(mean, invstd, weight, weight)
        cuda.local_backward(x, x, x, transform, count=512, **masked)
    assert launched() == STREAMING


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


# ---- beside results ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", LAYOUTS, ids=name_of)
def test_y_again_from_the_statistics_has_the_same_bits(shape):
    """What recomputing an activation relies on."""
    for dtype in DTYPES:
        case = Case(shape, dtype, "relu")
        with resident("1"):
            got = results(case)
        parameters = map(there, (got.mean, got.invstd, case.weight, case.bias))
        again = cuda.normalize(there(case.x), Transform(*parameters), relu=True)
        assert back(again).tobytes() == got.y.tobytes()


@pytest.mark.parametrize("shape", [(16, 4, 784), (65, 24, 1)], ids=name_of)
def test_outputs_may_be_their_inputs_and_arrays_of_channels_strided(shape):
    case = Case(shape, np.dtype(np.float32), "residual relu")
    with resident("1"):
        expected = results(case)
        wide = np.ones((6, shape[1], 2), np.float32)
        wide[:2, :, 0] = case.weight, case.bias
        wide[2] = 0
        weight, bias, *running, dweight, dbias = (there(row[:, 0]) for row in wide)
        y, dx = there(case.residual.copy()), there(case.dy.copy())
        bits = np.empty(case.x.size // 8, np.uint8)
        options = {"relu": True, "relu_bits": there(bits)}
        x, channels, state = there(case.x), (weight, bias), tuple(running)
        mean, invstd = plainly.local_forward(
            x, y, *channels, case.eps, **options, residual3=y, running=state, factor=0.5
        )
        options |= {"dresidual3": there(np.empty_like(case.dy)), "count": case.count}
        gradients = {"dweight": dweight, "dbias": dbias}
        plainly.local_backward(
            dx, x, dx, Transform(mean, invstd, *channels), **options, **gradients
        )
    assert launched().count("local_forward") == 2
    assert back(y).tobytes() == expected.y.tobytes()
    assert back(dx).tobytes() == expected.dx.tobytes()
    assert back(options["dresidual3"]).tobytes() == expected.dresidual.tobytes()
    assert bits.tobytes() == expected.relu_bits.tobytes()
    strided = [*expected.running, expected.dweight + 1, expected.dbias + 1]
    for row, values in zip(wide[2:], strided, strict=True):
        assert row[:, 0].tobytes() == values.tobytes()
    assert (wide[3:, :, 1] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, -3.1, 6e4])
def test_constants_have_no_variance(value, dtype):
    for shape in ((3, 32, 49), (2, 3, 784), (3000, 64, 1)):
        case = Case(shape, dtype, "plain", x=placed(np.full(shape, value), dtype))
        with resident("1"):
            got = results(case)
        assert (got.mean == float(case.x.flat[0])).all()
        assert (got.invstd == 1 / np.sqrt(case.eps)).all()
    assert launched().count("local_forward") == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_far_from_zero_and_an_outlier(dtype):
    """To the limits of the kernels that stream."""
    for shape in ((16, 4, 784), (3000, 64, 1), (80, 16, 49)):
        values = np.random.default_rng(3).standard_normal(shape)
        far = placed(values / 64 + (100 / 64 if dtype.itemsize == 2 else 1e6 / 64), dtype)
        values[0, :, 0] = 1e4
        with resident("1"):
            for x in (far, placed(values, dtype)):
                check(Case(shape, dtype, "plain", x=x))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_channel(bad):
    for dtype, shape in product(DTYPES, ((3, 32, 49), (40, 24, 1), (2, 3, 784))):
        clean, spoilt = Case(shape, dtype, "relu"), Case(shape, dtype, "relu")
        spoilt.x[-1, 1, shape[2] // 2] = bad
        with resident("1"), np.errstate(all="ignore"):
            expected, got = results(clean), results(spoilt)
        others = np.arange(shape[1]) != 1
        for name in ("mean", "invstd", "dweight", "dbias"):
            assert (getattr(got, name)[others] == getattr(expected, name)[others]).all()
        assert (got.y[:, others] == expected.y[:, others]).all()
        assert (got.dx[:, others] == expected.dx[:, others]).all()
        assert np.isnan(got.invstd[1])
        assert np.isnan(got.y[:, 1].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_static_shared_memory_and_threads_are_as_planned(dtype):
    """The plan allows for at least the static shared memory that the kernels have."""
    for variant in variants(dtype.name):
        for name in set(variant.kernels) & set(KERNELS):
            program = compile_module(variant.source).get_function(name).program
            static = sum(end - begin for begin, end in program.shared)
            rows, vector = (bool(dict(variant.defines)["ROWS"]), dict(variant.defines)["VECTOR"])
            shape = (4, 8, 512) if rows else (64, 16, 1)
            planned, _ = plan_resident(shape, dtype.itemsize, 16, 132, 227 << 10, 1, always=True)
            assert (planned.rows, planned.vector) == (rows, vector)
            assert 0 < static <= planned.table_bytes
            assert program.limit == RESIDENT_THREADS


# ---- planted faults ------------------------------------------------------------------------------

FAULTY = {"rows": (16, 2, 784), "runs": (8, 8, 49), "columns": (700, 16, 1)}


def outcome(shape, edit, mode="residual relu"):
    """Bits of a forward and backward by kernels whose PTX `edit` has changed; or the fault."""

    def build(text, kernels):
        return Module(edit(nvrtc.compile_text(text)))

    with host_kernels(build), resident("1"):
        try:
            got = run_alone(Case(shape, np.dtype(np.float32), mode))
        except PtxError as fault:
            return str(fault)
    assert launched() == KERNELS
    return [array.tobytes() for array in got]


@pytest.mark.ptx
@pytest.mark.parametrize("layout", FAULTY)
def test_every_copy_is_waited_for(layout):
    """Each wait is taken away, or waits for one batch less than it should."""
    for pattern, to in (
        (r"cp\.async\.wait_group \d+;", ""),
        (r"cp\.async\.wait_group 7;", "cp.async.wait_group 8;"),
        (r"cp\.async\.wait_group 3;", "cp.async.wait_group 4;"),
        (r"cp\.async\.commit_group;", ""),
    ):
        shape, changed = FAULTY[layout], []

        def edit(ptx, pattern=pattern, to=to, changed=changed):
            found, n = re.subn(pattern, to, ptx)
            changed.append(n)
            return found

        assert "a cp.async still writes" in str(outcome(shape, edit)), (pattern, to)
        assert any(changed)


@pytest.mark.ptx
@pytest.mark.parametrize("layout", FAULTY)
def test_every_barrier_is_missed(layout):
    """One after the other is taken away. The last of block_sum makes it safe to call it twice."""
    texts, faults = [], {}
    sound = outcome(FAULTY[layout], lambda ptx: texts.append(ptx) or ptx)
    assert isinstance(sound, list)
    count = sum(len(re.findall(r"bar\.sync", ptx)) for ptx in texts)
    for number in range(count):
        edit = without(r"bar\.sync", number)
        fault = outcome(FAULTY[layout], edit)
        assert edit.there
        faults[number] = isinstance(fault, str)
    assert count >= 8
    assert sum(not missed for missed in faults.values()) <= 2, faults


@pytest.mark.ptx
@pytest.mark.parametrize("layout", FAULTY)
def test_an_access_beside_the_arrays_is_found(layout):
    for pattern, to in (
        (r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+)\]", r"\1+4194304]"),
        (r"(cp\.async\.cg\.shared\.global \[%r\d+)\]", r"\1+240000]"),
        (r"(cp\.async\.cg\.shared\.global \[%r\d+)\]", r"\1+4]"),
        (r"(st\.global\.v4\.b32 \[%rd\d+)\]", r"\1+4194304]"),
    ):
        found = outcome(FAULTY[layout], lambda ptx: re.sub(pattern, to, ptx))  # noqa: B023
        assert "out of bounds" in str(found) or "misaligned" in str(found), (pattern, found)


@pytest.mark.ptx
@pytest.mark.parametrize("architecture", ["compute_75", "compute_80", "compute_120"])
def test_architectures_give_the_same_bits(architecture):
    """compute_75 has no cp.async: plain loads and stores."""
    for shape, dtype in product(FAULTY.values(), DTYPES):
        found = []
        for given in ("compute_90", architecture):
            build = lambda text, _: compile_module(text, architecture=given)  # noqa: B023, E731
            with host_kernels(build), resident("1"):
                found.append([x.tobytes() for x in run_alone(Case(shape, dtype, "residual relu"))])
        assert found[0] == found[1]


@pytest.mark.ptx
def test_more_than_2_to_31_elements():
    """The first, the last and some other blocks: in bounds, and what they wrote is right."""
    shape, dtype = (2, 9_000_000, 128), np.dtype(np.float16)
    assert np.prod(shape) > 2**31
    planned, other = (plan_resident(shape, 2, 16, 132, 227 << 10, n)[0] for n in (1, 2))
    assert planned == other
    blocks = some_blocks(planned.tiles)
    x, dy, y, dx = (large(shape, dtype) for _ in range(4))
    own = np.concatenate(
        [np.arange(planned.tile_channels) + block * planned.tile_channels for block in blocks]
    )
    own = np.unique(own[own < shape[1]])
    for tensor, seed in ((x, 1), (dy, 2)):
        tensor[:, own] = np.random.default_rng(seed).standard_normal((2, own.size, 128))
    with resident("1"), setting(blocks=some_blocks, races=False):
        mean, invstd = cuda.local_forward(there(x), there(y), None, None, 1e-5)
        cuda.local_backward(there(dy), there(x), there(dx), Transform(mean, invstd), count=256)
    assert launched() == KERNELS
    case = Case((2, own.size, 128), dtype, "plain", x=np.ascontiguousarray(x[:, own]))
    case.dy, case.weight, case.bias = dy[:, own], np.ones(own.size), np.zeros(own.size)
    assert error(back(mean)[own], case.forward.mean) < 1e-5
    assert error(y[:, own], case.forward.y) < TOLERANCE["float16"]
    assert error(dx[:, own], case.backward(None).dx) < TOLERANCE["float16"]


# ---- traffic -------------------------------------------------------------------------------------


def traffic_of(shape, dtype, relu_bits=False):
    """By kernel: bytes of whole tensors over those of x, sector use, bytes an access."""
    tensors = [aligned(shape, dtype) for _ in range(6 if relu_bits else 4)]
    for i, tensor in enumerate(tensors):
        tensor[...] = gaussian(shape, dtype, i)
    x, dy, y, dx, *more = map(there, tensors)
    residual, dresidual = more or (None, None)
    bits = there(np.empty(x.size // 8, np.uint8)) if relu_bits else None
    weight, bias, dweight, dbias = map(there, np.ones((4, shape[1]), np.float32))
    options = {"relu": relu_bits, "relu_bits": bits}
    with resident("1"), counting() as launches:
        mean, invstd = cuda.local_forward(x, y, weight, bias, 1e-5, residual3=residual, **options)
        gradients = {"dresidual3": dresidual, "dweight": dweight, "dbias": dbias}
        transform, count = Transform(mean, invstd, weight, bias), shape[0] * shape[2]
        cuda.local_backward(dy, x, dx, transform, count=count, **options, **gradients)
    found = {}
    for counted in launches:
        whole, _ = _split([counted], tensors)
        moved = sum(access.bytes for access in whole)
        sectors, lanes = sum(a.sectors for a in whole), sum(a.lanes for a in whole)
        found[counted.kernel] = moved / tensors[0].nbytes, moved / (32 * sectors), moved / lanes
    return found


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 64, 3136), "float16"),
        ((8, 128, 784), "float32"),
        ((8, 256, 196), "float16"),
        ((8, 512, 49), "float16"),
        ((1568, 256, 1), "float16"),
        ((392, 512, 1), "float32"),
    ],
)
def test_traffic_is_two_and_three_times_x(shape, dtype):
    """To 1 %: x read and y written; x and dy read, dx written. In vectors, and whole sectors."""
    short = 100 < shape[2] < 200 or shape[2] == 49
    with counted_kernels():
        found = traffic_of(shape, dtype)
        with_residual = traffic_of(shape, dtype, relu_bits=True)
    assert set(found) == set(with_residual) == set(KERNELS)
    floors = {"local_forward": 2, "local_backward": 3}
    for kernel, floor in floors.items():
        for figures, tensors in ((found, floor), (with_residual, floor + 1)):
            moved, sectors, width = figures[kernel]
            assert moved == pytest.approx(tensors, rel=0.01)
            assert sectors > (0.90 if short else 0.95)
            assert width > 15.5
