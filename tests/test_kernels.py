"""The CUDA kernels through their own backend, run on the CPU by the machine for PTX.

Oracles: the formulas in float64 on the values as stored, and the NumPy backend.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from conftest import DTYPES, TOLERANCE
from cuda_tools import need
from cuda_variants import masked_variants, variants
from kernel_cases import (
    CS,
    LARGE,
    LS,
    MASKS,
    MODES,
    NS,
    ODD_ONES,
    SPLIT,
    Case,
    back,
    covering,
    error,
    host_kernels,
    launched_by,
    mask_of,
    placed,
    resident,
    run,
    run_alone,
    run_recentred,
    there,
)
from ptx.launch import compile_module, missing

from cupybn.backends import cuda
from cupybn.backends import numpy as numpy_backend
from cupybn.backends.cuda import source

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
# in elements; "half" vectors at least, as of 16 bit
OFFSETS = {
    "aligned": (0, 0, 0, 0),
    "all by one": (1, 1, 1, 1),
    "mixed": (0, 1, 3, 2),
    "all by two": (2, 2, 2, 2),
    "all by four": (4, 4, 4, 4),
}
MOVED = [(3, 32, 49), (65, 24, 1), (2, 3, 784)]
EVERY_PAIR = covering(DTYPES, MODES, OFFSETS)
CASES = [
    *((*case, False) for case in EVERY_PAIR),
    *((s, d, m, "aligned", False) for s, d, m in product(LAYOUTS, DTYPES, MODES)),
    *((s, d, "residual relu", "aligned", False) for s, d in product(ODD_ONES, DTYPES)),
    *((s, d, "relu", "aligned", False) for s, d in product(SPLIT, DTYPES[:2])),
    *((s, d, "plain", "aligned", False) for s, d in product(LARGE, DTYPES)),
    *((s, d, m, o, False) for s, d, m, o in product(MOVED, DTYPES, MODES[1::2], OFFSETS)),
    *(
        (s, DTYPES[i % len(DTYPES)], m, "aligned", True)
        for i, s in enumerate(LAYOUTS)
        for m in MODES
    ),
]
# Shapes and addresses of every geometry; the masks and modes go by at their own pace.
SOME_VALID = [kind for kind in MASKS if kind != "none valid"]
MASKED = [
    *((shape, "aligned") for shape in [*LAYOUTS, (5, 6, 24), *ODD_ONES, *SPLIT[2:]]),
    *product([*MOVED, (66, 24, 1)], OFFSETS),
    *((shape, "aligned") for shape in product((5, 7), (258,), (2, 3))),  # narrow runs
]
MASKED_CASES = [
    *(
        (shape, dtype, MODES[(i + j) % 4], offset, SOME_VALID[i % 5])
        for j, dtype in enumerate(DTYPES)
        for i, (shape, offset) in enumerate(MASKED)
    ),
    *((s, DTYPES[i % 4], MODES[3], "aligned", "none valid") for i, s in enumerate(LAYOUTS)),
]
# `make test` runs a part of them, `make test-ptx` all.
QUICK = 12
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def machine():
    need(missing())
    with host_kernels():
        yield


def check(case, against_numpy=True):
    dtype = case.x.dtype.name
    tolerance, per_channel = TOLERANCE[dtype], PER_CHANNEL[dtype]
    f = case.forward
    got = run(cuda, case)
    assert got.count == case.count
    assert error(got.mean, f.mean) < per_channel
    assert (np.abs(got.var - f.var) <= per_channel * f.var).all()
    unbiased = f.var * (case.count / max(case.count - 1, 1))
    state = (f.mean / 2, (1 + unbiased) / 2) if case.count else (0 * f.mean, 1 + 0 * f.mean)
    assert error(got.running[0], state[0]) < per_channel
    assert error(got.running[1], state[1]) < per_channel
    assert error(got.y, f.y) < tolerance
    kept = got.y > 0 if case.activation else None
    if got.relu_bits is not None:
        assert (got.relu_bits == np.packbits(kept)).all()
    b = case.backward(kept)
    assert error(got.dx, b.dx) < tolerance
    terms_dy, terms_xmu = b.terms
    assert (np.abs(got.dbias - b.dbias) <= per_channel * (1 + terms_dy)).all()
    assert (np.abs(got.dweight - b.dweight) <= per_channel * (1 + terms_xmu)).all()
    if case.needs_dresidual:
        assert error(got.dresidual, b.dresidual) == 0
    in_steps = [got.mean, got.invstd, *got.running, got.y, got.dx, got.dweight + 1, got.dbias + 1]
    in_steps += [] if got.relu_bits is None else [got.relu_bits]
    in_steps += [got.dresidual] if case.needs_dresidual else []
    in_steps = [x.copy() for x in in_steps]
    with resident("0"):
        for one, other in zip(in_steps, run_alone(case), strict=True):
            assert one.tobytes() == other.tobytes()
    if dtype == "float64":
        fused, apart = (run_recentred(case, fused) for fused in (True, False))
        assert all((a == b).all() for a, b in zip(fused, apart, strict=True))
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


def some(cases):
    """Each in QUICK for the quick choice, and none that is large."""
    for i, case in enumerate(cases):
        quick = i % QUICK == 0 and np.prod(case[0]) < 100_000
        yield pytest.param(*case, marks=() if quick else pytest.mark.ptx)


@pytest.mark.parametrize(
    ("shape", "dtype", "mode", "offset", "constant"), list(some(CASES)), ids=name_of
)
def test_kernels_agree_with_float64_and_numpy(shape, dtype, mode, offset, constant):
    check(Case(shape, dtype, mode, sum(shape), OFFSETS[offset], constant=constant))


def in_memory(values):
    """As unsigned integers: -0 is not 0, and NaN itself."""
    return values.view(f"u{values.itemsize}")


def packed(values, valid):
    """(N, C, L) values in valid positions, as columns (P, C, 1)."""
    return np.ascontiguousarray(values.transpose(0, 2, 1)[valid[:, 0]])[:, :, None]


@pytest.mark.parametrize(
    ("shape", "dtype", "mode", "offset", "kind"), list(some(MASKED_CASES)), ids=name_of
)
def test_masked_values_count_for_nothing(shape, dtype, mode, offset, kind):
    """As float64 has it, and as the NumPy backend has it of the valid values alone, packed."""
    mask = mask_of(kind, shape, sum(shape))
    case = Case(shape, dtype, mode, sum(shape), OFFSETS[offset], mask=mask)
    got = check(case, against_numpy=False)
    tensors = [got.y, got.dx, *([got.dresidual] if case.needs_dresidual else [])]
    nothing = np.broadcast_to(~case.valid, shape)
    assert all((in_memory(tensor)[nothing] == 0).all() for tensor in tensors)
    if case.count == 0:
        return
    alone = Case((case.count, shape[1], 1), dtype, mode, x=packed(case.x, case.valid))
    alone.dy, alone.weight, alone.bias = packed(case.dy, case.valid), case.weight, case.bias
    alone.residual = None if case.residual is None else packed(case.residual, case.valid)
    expected = run(numpy_backend, alone)
    tolerance, per_channel = TOLERANCE[dtype.name], PER_CHANNEL[dtype.name]
    assert error(got.mean, expected.mean) < per_channel
    assert error(got.invstd, expected.invstd) < per_channel
    assert error(packed(got.y, case.valid), expected.y) < tolerance
    assert error(packed(got.dx, case.valid), expected.dx) < tolerance


def masks_left():
    """Kernels with a mask that no case launches: as below, moments of rows by the element."""
    compiled = launched_by(
        Case(*case[:3], offsets=OFFSETS[case[3]], mask=mask_of(case[4], case[0]))
        for case in MASKED_CASES
    )
    every = {(v.source, k): v for d in DTYPES for v in masked_variants(d.name) for k in v.kernels}
    assert {kernel for _, kernel in compiled - set(every)} == {"finalize_moments"}
    by_element = ("RAGGED_VECTORS", 0), ("ROWS", 1), ("VECTOR", 1)
    return {
        (kernel, v.defines)
        for (text, kernel), v in every.items()
        if (text, kernel) not in compiled
        and not (kernel == "batch_moments" and set(by_element) <= set(v.defines))
    }


@pytest.mark.ptx
def test_every_variant_runs():
    """But for two that test_ptx_kernels.py runs, the one between two messages, and a tensor alone
    is never read by the element for the sake of others; and one of test_cuda_backend.py.
    """
    compiled = launched_by(
        Case(*case[:3], offsets=OFFSETS[case[3]], constant=case[4]) for case in CASES
    )
    every = [v for d in DTYPES for v in variants(d.name)]
    kernels = {(v.source, kernel): v for v in every for kernel in v.kernels}
    assert compiled <= set(kernels)
    left = {
        (name, v.defines) for (text, name), v in kernels.items() if (text, name) not in compiled
    }
    assert not masks_left()
    by_element = (("RAGGED_VECTORS", 0), ("ROWS", 1))
    assert {(name, defines[:2]) for name, defines in left} == {
        ("recentre_moments", ()), ("count_valid", ()), ("batch_moments", by_element),
    }  # fmt: skip
    assert len(left) == 2 + len(DTYPES)


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


@pytest.mark.ptx
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


@pytest.mark.parametrize("shape", [(6, 32, 49), (65, 24, 1), (4, 3, 784)], ids=name_of)
@pytest.mark.parametrize("first", [1, 40, 10**6])
def test_deviations_are_taken_from_a_valid_value(shape, first):
    """Wherever the first one is; from 0 the variance would have lost all its digits."""
    mask = mask_of("all valid", shape)
    mask.flat[: min(first, mask.size - 5)] = 0
    values = np.random.default_rng(3).standard_normal(shape) + 1e8
    check(Case(shape, np.dtype(np.float64), "plain", x=values, mask=mask), against_numpy=False)


@pytest.mark.ptx
@pytest.mark.parametrize("shape", [*LAYOUTS, *SPLIT], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_outlier_comes_first(shape, dtype):
    values = np.random.default_rng(4).standard_normal(shape)
    values[0, :, 0] = 1e4
    check(Case(shape, dtype, "plain", x=placed(values, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormals(dtype):
    """Those of float32, which are bfloat16's, too, count as 0: CuPy compiles with ``-ftz=true``.

    The squares of the others are less than any float32: the variance is 0, or as good as that
    beside eps.
    """
    smallest = float(np.nextafter(dtype.type(0), dtype.type(1)))
    flushed = dtype.name in ("float32", "bfloat16")
    for shape in LAYOUTS:
        values = np.random.default_rng(5).integers(1, 100, shape) * smallest
        case = Case(shape, dtype, "plain", x=placed(values, dtype))
        got = run(cuda, case)
        f = case.forward
        if flushed:
            f = Case(shape, dtype, "plain", x=np.zeros_like(case.x)).forward
        assert (np.abs(got.mean - f.mean) <= 1e-5 * f.mean).all()
        assert (np.abs(got.var - f.var) <= 1e-5 * f.var + 1e-70).all()
        assert error(got.y, f.y) < TOLERANCE[dtype.name]


@pytest.mark.ptx
@pytest.mark.parametrize("value", [0.0, 1.0, -3.1, 1234.567, 6e4, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_have_no_variance(value, dtype):
    for shape in (*LAYOUTS, (700, 8, 49), (3000, 3, 1)):
        x = placed(np.full(shape, value), dtype)
        moments = cuda.batch_moments(there(x))
        assert (back(moments.m2) == 0).all()
        assert (back(moments.mean) == float(x.flat[0])).all()


@pytest.mark.ptx
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


def test_bfloat16_by_its_bits():
    """As GPUs without an instruction for it round, and as all of them read it."""
    bfloat16 = next(d for d in DTYPES if d.name == "bfloat16")
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = bits.view(np.float32)
    text = """extern "C" __global__
    void there_and_back(bfloat16* there, float* back, const float* x) {
      i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
      narrow(x[i], there[i]);
      back[i] = widen(there[i]);
    }
    """
    module = compile_module("#define SCALAR bfloat16\n" + source.paste("numeric.cuh") + text,
                         ["there_and_back"])  # fmt: skip
    there, back = np.empty(values.shape, np.uint16), np.empty_like(values)
    module.get_function("there_and_back")((values.size // 256,), (256,), (there, back, values))
    with np.errstate(invalid="ignore"):
        expected = values.astype(bfloat16)
    number = ~np.isnan(values)
    assert (there.view(bfloat16)[number] == expected[number]).all()
    assert np.isnan(back[~number]).all()
    assert (back[number] == expected[number].astype(np.float32)).all()
