"""The CUDA kernels on a GPU: every shape, dtype, layout and variant.

Oracles: the formulas in float64 on the values as stored, computed on the device, for some shapes
by NumPy too; and the NumPy backend. Tests loop over their cases and name all that fail. Every array
lies between guards, which hold huge numbers and must stay as they are: a kernel that reads or
writes past an array shows, though the memory there is its process' own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import product
from math import prod
from types import SimpleNamespace

import kernel_cases
import numpy as np
import pytest
from conftest import DTYPES, ROOT, TOLERANCE
from cuda_variants import masked_variants, variants
from kernel_cases import (
    CS,
    LARGE,
    LS,
    MODES,
    NS,
    ODD_ONES,
    SPLIT,
    clear_caches,
    covering,
    in_two_launches,
    parameter_dtype,
    parameters,
    plainly,
    resident,
)

from cupybn import functional as F
from cupybn.arrays import copy_to_host
from cupybn.backends import cuda
from cupybn.backends import numpy as numpy_backend
from cupybn.backends.cuda import launch, source
from cupybn.statistics import BackwardSums, Moments, Transform


def _load_cupy():
    """(CuPy, None), or (None, why these tests cannot run)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import cupy
        except Exception as error:  # a broken CUDA raises more than ImportError
            return None, f"needs CuPy, whose import fails here: {type(error).__name__}: {error}"
        if not cupy.cuda.is_available():
            return None, "needs a CUDA device: cupy.cuda.is_available() is False here"
    return cupy, None


cp, MISSING = _load_cupy()
if cp is not None and int(cp.__version__.split(".")[0]) < 14:  # which takes no bfloat16 of NumPy's
    DTYPES = [dtype for dtype in DTYPES if dtype.name != "bfloat16"]
# Warnings of CuPy, PyTorch and others are shown, not turned into errors.
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(cp is None, reason=str(MISSING)),
    pytest.mark.filterwarnings("default"),
]
pytestmark = ON_GPU

PER_CHANNEL = {"float16": 1e-5, "bfloat16": 1e-5, "float32": 1e-5, "float64": 1e-10}
OFFSETS = {"aligned": (0, 0, 0, 0), "all by one": (1, 1, 1, 1), "mixed": (0, 1, 3, 2)}
LAYOUTS = [
    (3, 32, 49),
    (3, 3, 49),
    (65, 24, 1),
    (33, 3, 1),
    (2, 3, 784),
    (3, 2, 10007),
    (3, 6, 196),
]
TINY = bool(os.environ.get("CUPYBN_TINY"))  # a rehearsal: few shapes
SMALL = 4_000_000  # elements; larger shapes of the product have a test of their own
PART = 1 << 25  # elements for which the float64 arrays of a comparison exist at once
PERIOD = 1 << 22


# ---- arrays --------------------------------------------------------------------------------------


def widen(xp, array):
    """The values in float64. A bfloat16 is the upper half of a float32."""
    if array.dtype.name == "bfloat16":
        upper = array.view(xp.uint16).astype(xp.uint32) << xp.uint32(16)
        array = upper.view(xp.float32)
    return array.astype(xp.float64)


def narrow(xp, values, dtype):
    """Float64 values rounded to a dtype."""
    if dtype.name != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(xp.float32).view(xp.uint32)
    bits = bits + (xp.uint32(0x7FFF) + ((bits >> xp.uint32(16)) & xp.uint32(1)))
    return (bits >> xp.uint32(16)).astype(xp.uint16).view(dtype)


@cache
def random_pool(xp):
    values = np.random.default_rng(12).standard_normal(PERIOD + (1 << 20))
    return xp.asarray(values)


def fill_normal(xp, array, seed, mean=0.0):
    """Fills a contiguous array with N(mean, 1), the same values every PERIOD elements."""
    flat, begin = array.reshape(-1), seed * 12289 % (1 << 20)
    values = narrow(xp, random_pool(xp)[begin : begin + PERIOD] + mean, array.dtype)
    for i in range(0, flat.size, PERIOD):
        flat[i : i + PERIOD] = values[: flat.size - i]


def address(array):
    return array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data


class Field:
    """A contiguous array, `offset` elements behind a 64-byte boundary, between guards.

    With MARGIN 0 there are none: the array ends where its memory ends.
    """

    GUARD, MARGIN = 0x7F, 256  # bytes

    def __init__(self, xp, shape, dtype, offset=0):
        itemsize, margin = np.dtype(dtype).itemsize, self.MARGIN
        size, ahead = prod(shape) * itemsize, offset * itemsize
        self.memory = xp.full(size + ahead + 2 * margin, self.GUARD, dtype=xp.uint8)
        misplaced = -address(self.memory) % 64 if margin else 0  # CuPy's memory is aligned
        self.begin = min(margin, 64 + misplaced) + ahead
        self.end = self.begin + size
        self.array = self.memory[self.begin : self.end].view(dtype).reshape(shape)

    def broken(self):
        """How many bytes of the guards have changed, on the device."""
        before, after = self.memory[: self.begin], self.memory[self.end :]
        return (before != self.GUARD).sum() + (after != self.GUARD).sum()


def parts(shape):
    """Slices of an (N, C, L) array with all channels and about PART elements each."""
    n, c, length = shape
    samples = max(1, PART // max(1, c * length))
    run = length if c * length <= PART else max(1, PART // c)
    return [
        (slice(i, i + samples), slice(None), slice(j, j + run))
        for i in range(0, n, samples)
        for j in range(0, length, run)
    ]


# ---- cases ---------------------------------------------------------------------------------------


class Case:
    """One forward and backward: inputs, results in float64, and limits of the errors.

    `offsets`, in elements, are those of x, dy, the residual and the outputs.
    """

    eps = 1e-5

    def __init__(self, shape, dtype, mode, offsets=(0, 0, 0, 0), seed=0, x=None, xp=None):
        self.xp = xp = cp if xp is None else xp
        self.shape, self.dtype, self.mode, self.offsets = shape, np.dtype(dtype), mode, offsets
        self.relu, self.count = "relu" in mode, shape[0] * shape[2]
        self.fields = []
        self.x = self.field(offsets[0])
        if x is None:
            fill_normal(xp, self.x, seed, 0.5)
        else:
            self.x[...] = xp.asarray(x)
        self.dy = self.field(offsets[1])
        fill_normal(xp, self.dy, seed + 1, 0.25)
        self.weight, self.bias = map(xp.asarray, parameters(shape[1], self.dtype))
        self.residual = None
        if "residual" in mode:
            self.residual = self.field(offsets[2])
            fill_normal(xp, self.residual, seed + 2)
        self._take_statistics()
        self._leave_the_kink()

    def field(self, offset):
        self.fields.append(Field(self.xp, self.shape, self.dtype, offset))
        return self.fields[-1].array

    def on_host(self):
        """The same case in NumPy arrays, its float64 results by NumPy."""
        twin = object.__new__(Case)
        twin.__dict__ |= self.__dict__ | {"xp": np, "fields": []}
        for name in ("x", "dy", "weight", "bias", "residual"):
            array = getattr(self, name)
            setattr(twin, name, None if array is None else copy_to_host(array))
        twin._take_statistics()
        return twin

    @property
    def activation(self):
        return "relu" if self.relu else None

    @property
    def needs_bits(self):
        return self.relu and self.residual is not None

    @property
    def label(self):
        return f"{self.dtype} {self.shape} {self.mode}, offsets {self.offsets}"

    def wide(self, array, part):
        return widen(self.xp, array[part])

    def total(self, values_of):
        return sum(values_of(part).sum(axis=(0, 2)) for part in parts(self.shape))

    def _take_statistics(self):
        xp, n = self.xp, self.count
        mean = self.total(lambda part: self.wide(self.x, part)) / n
        self.mean = mean + self.total(lambda part: self.wide(self.x, part) - mean[:, None]) / n
        self.var = self.total(lambda part: self.centred(part) ** 2) / n
        self.invstd = 1 / xp.sqrt(self.var + self.eps)
        self.scale = self.invstd * self.weight.astype(xp.float64)

    def centred(self, part):
        return self.wide(self.x, part) - self.mean[:, None]

    def before_activation(self, part):
        y = self.centred(part) * self.scale[:, None] + self.bias.astype(self.xp.float64)[:, None]
        return y if self.residual is None else y + self.wide(self.residual, part)

    def _leave_the_kink(self):
        """No gradient where rounding decides what passes the ReLU."""
        if not self.relu:
            return
        bits = self.dy.view(f"u{self.dtype.itemsize}")
        for part in parts(self.shape):
            keep = self.xp.abs(self.before_activation(part)) >= 1e-3
            bits[part] *= keep.astype(bits.dtype)

    def failures(self, got, constant=False):
        """What of the results is off, as lines; and broken guards."""
        ratios = [*self._forward_ratios(got), *self._backward_ratios(got, constant)]
        ratios += [("guards", 2 * field.broken()) for field in self.fields]
        values = copy_to_host(self.xp.stack([v.astype(self.xp.float64) for _, v in ratios]))
        worst = {}
        for (name, _), value in zip(ratios, values.tolist(), strict=True):
            worst[name] = max(worst.get(name, 0.0), value)
        bad = [f"{name} {value:.3g}" for name, value in worst.items() if not value <= 1]
        how = ", constant statistics" if constant else ""
        return [f"{self.label}{how}: times the limit: {', '.join(bad)}"] if bad else []

    def _ratio(self, got, expected, limit):
        """The largest error over its limit, infinite if anything is not finite."""
        ratio = self.xp.abs(got - expected) / limit
        return self.xp.where(self.xp.isfinite(ratio), ratio, self.xp.inf).max()

    def _forward_ratios(self, got):
        xp, tolerance = self.xp, TOLERANCE[self.dtype.name]
        relative = PER_CHANNEL[self.dtype.name]
        tiny, rounding = 1e-300, 4 * np.finfo(np.float64).eps * xp.abs(self.mean)
        limit = relative * xp.maximum(1, xp.abs(self.mean)) + rounding
        yield "mean", self._ratio(got.mean, self.mean, limit)
        if got.var is None:
            yield "invstd", self._ratio(got.invstd, self.invstd, relative * self.invstd)
        else:
            yield "var", self._ratio(got.var, self.var, relative * self.var + tiny)
            invstd = 1 / xp.sqrt(got.var + self.eps)
            yield "invstd", self._ratio(got.invstd, invstd, 1e-12 * invstd)
        scale = xp.abs(self.scale)[:, None]
        for part in parts(self.shape):
            y = self.before_activation(part)
            limit = tolerance * xp.maximum(1, xp.abs(y)) + rounding[:, None] * scale
            limit = limit + relative * xp.abs(self.centred(part)) * scale
            expected = xp.maximum(y, 0) if self.relu else y
            yield "y", self._ratio(self.wide(got.y, part), expected, limit)
        if got.relu_bits is not None:
            bits = got.y.reshape(-1)
            step = PART  # a multiple of 8
            for i in range(0, bits.size, step):
                packed = xp.packbits(widen(xp, bits[i : i + step]) > 0)
                yield (
                    "relu_bits",
                    2 * (packed != got.relu_bits[i // 8 : i // 8 + packed.size]).sum(),
                )

    def _backward_ratios(self, got, constant):
        xp, n = self.xp, self.count
        tolerance, relative = TOLERANCE[self.dtype.name], PER_CHANNEL[self.dtype.name]

        def passed(part):
            dy = self.wide(self.dy, part)
            return dy * (self.wide(got.y, part) > 0) if self.relu else dy

        sum_dy = self.total(passed)
        sum_dy_xmu = self.total(lambda part: passed(part) * self.centred(part))
        terms_dy = self.total(lambda part: xp.abs(passed(part)))
        terms_xmu = self.total(lambda part: xp.abs(passed(part) * self.centred(part)))
        yield "dbias", self._ratio(got.dbias, sum_dy, relative * (1 + terms_dy))
        limit = relative * (1 + terms_xmu * self.invstd)
        yield "dweight", self._ratio(got.dweight, sum_dy_xmu * self.invstd, limit)
        slope, steepest = (s * self.invstd**2 / n for s in (sum_dy_xmu, terms_xmu))
        for part in parts(self.shape):
            dy, centred = passed(part), self.centred(part)
            inner = dy if constant else dy - (sum_dy / n)[:, None] - centred * slope[:, None]
            dx = inner * self.scale[:, None]
            size = xp.abs(dy) + (terms_dy / n)[:, None] + xp.abs(centred) * steepest[:, None]
            limit = relative * size * xp.abs(self.scale)[:, None]
            limit = limit + tolerance * xp.maximum(1, xp.abs(dx))
            yield "dx", self._ratio(self.wide(got.dx, part), dx, limit)
            if got.dresidual is not None:
                exact = (self.wide(got.dresidual, part) != dy).sum()
                yield "dresidual", 2 * exact


def run(backend, case, constant=False):
    """One forward and backward of a backend: everything it gives."""
    xp, fused = case.xp, case.needs_bits
    y, dx = case.field(case.offsets[3]), case.field(case.offsets[3])
    dresidual = case.field(case.offsets[3]) if fused else None
    relu_bits = xp.full((case.x.size + 7) // 8, 0xAA, dtype=xp.uint8) if fused else None
    moments = backend.batch_moments(case.x)
    mean, var, invstd = backend.finalize_moments(moments, case.eps)
    transform = Transform(mean, invstd, case.weight, case.bias)
    options = {"relu": case.activation is not None, "relu_bits": relu_bits}
    backend.normalize(case.x, transform, **options, residual3=case.residual, out3=y)
    sums = backend.backward_reduce(case.dy, case.x, transform, **options)
    dweight, dbias = xp.ones_like(case.weight), xp.ones_like(case.bias)
    backend.backward_input(
        case.dy, case.x, transform, **options, sums=None if constant else sums,
        count=moments.count, out3=dx, dresidual3=dresidual, local=sums, dweight=dweight,
        dbias=dbias,
    )  # fmt: skip
    return SimpleNamespace(
        moments=moments, mean=mean, var=var, invstd=invstd, y=y, relu_bits=relu_bits, sums=sums,
        dx=dx, dresidual=dresidual, dweight=dweight.astype(xp.float64) - 1,
        dbias=dbias.astype(xp.float64) - 1,
    )  # fmt: skip


def run_alone(backend, case, constant=False):
    """The same as one rank, each direction in one launch where that is possible."""
    xp, fused = case.xp, case.needs_bits
    y, dx = case.field(case.offsets[3]), case.field(case.offsets[3])
    dresidual = case.field(case.offsets[3]) if fused else None
    bits = xp.full((case.x.size + 7) // 8, 0xAA, dtype=xp.uint8) if fused else None
    options = {"relu": case.activation is not None, "relu_bits": bits}
    dweight, dbias = xp.ones_like(case.weight), xp.ones_like(case.bias)
    with resident("1"):
        mean, invstd = backend.local_forward(
            case.x, y, case.weight, case.bias, case.eps, **options, residual3=case.residual
        )
        backend.local_backward(
            case.dy, case.x, dx, Transform(mean, invstd, case.weight, case.bias), **options,
            count=0 if constant else case.count, dresidual3=dresidual, dweight=dweight,
            dbias=dbias,
        )  # fmt: skip
    return SimpleNamespace(
        mean=mean, var=None, invstd=invstd, y=y, relu_bits=bits, dx=dx, dresidual=dresidual,
        dweight=dweight.astype(xp.float64) - 1, dbias=dbias.astype(xp.float64) - 1,
    )  # fmt: skip


def check_all(cases):
    """Runs (shape, dtype, mode, offsets) one after the other; fails with all that is wrong.

    Statistics as constants are tried where the offsets are mixed.
    """
    failures, ran = [], 0
    for shape, dtype, mode, offsets in cases:
        case = Case(shape, dtype, mode, OFFSETS[offsets], seed=sum(shape) % 50)
        for constant in (False, True) if offsets == "mixed" else (False,):
            failures += case.failures(run(cuda, case, constant), constant)
            found = case.failures(run_alone(cuda, case, constant), constant)
            failures += [f"as one rank: {line}" for line in found]
            ran += 2
    fail_with(failures, ran)


def fail_with(failures, ran):
    more = f"\n... and {len(failures) - 60} more" if len(failures) > 60 else ""
    assert not failures, f"{len(failures)} of {ran}:\n" + "\n".join(failures[:60]) + more
    assert ran > 0


@contextmanager
def allocating_with(allocator):
    """CuPy's memory comes from an allocator, scratch included; None: straight from CUDA."""
    before = cp.cuda.get_allocator()
    clear_caches()
    cp.cuda.set_allocator(allocator)
    try:
        yield
    finally:
        cp.cuda.Device().synchronize()
        clear_caches()
        cp.cuda.set_allocator(before)


def free_blocks():
    clear_caches()
    cp.get_default_memory_pool().free_all_blocks()


@pytest.fixture(scope="module")
def compiled():
    """Every module there is, compiled into CuPy's cache on disk by several threads."""
    kinds = variants, masked_variants
    every = [v for dtype in DTYPES for variants_of in kinds for v in variants_of(dtype.name)]
    began = time.perf_counter()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda v: source.compile_module(v.source, v.kernels), every))
    return len(every), time.perf_counter() - began


# ---- every shape ---------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_every_variant_compiles(compiled, capsys):
    with capsys.disabled():
        print(f" {compiled[0]} modules in {compiled[1]:.1f} s (or from CuPy's cache) ", end="")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("offsets", list(OFFSETS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(dtype, offsets, compiled):
    shapes = [s for s in product(NS, CS, LS) if prod(s) <= SMALL]
    check_all((shape, dtype, mode, offsets) for shape, mode in product(shapes, MODES))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_shapes_of_the_product(dtype):
    """Modes and offsets in turn; shapes for which the device has too little memory are named."""
    shapes = [s for s in product(NS, CS, LS) if prod(s) > SMALL]
    names, failures, too_large, ran = list(OFFSETS), [], [], 0
    for i, shape in enumerate(shapes):
        free_blocks()
        needed = prod(shape) * dtype.itemsize * 7 + 16 * PART * 8
        if cp.cuda.runtime.memGetInfo()[0] < needed:
            too_large.append(shape)
            continue
        offsets = OFFSETS[names[i // len(MODES) % len(names)]]
        case = Case(shape, dtype, MODES[i % len(MODES)], offsets)
        failures += case.failures(run(cuda, case))
        ran += 1
        del case
    free_blocks()
    fail_with(failures, ran)
    if too_large:
        warnings.warn(f"not enough free memory for {too_large}", stacklevel=1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_split_and_long_shapes(dtype):
    shapes = [*ODD_ONES, *SPLIT, *LARGE]
    check_all((s, dtype, m, o) for s, m, o in product(shapes, MODES, OFFSETS))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_shapes_in_memory_of_their_own(dtype, monkeypatch):
    """A selection for compute-sanitizer: every path, few elements, every array an allocation."""
    monkeypatch.setattr(Field, "MARGIN", 0)
    shapes = [*LAYOUTS, *ODD_ONES, (2, 2, 31360), (3000, 64, 1), (700, 8, 49)]
    shapes = shapes[:2] if TINY else shapes
    with allocating_with(None):
        check_all((s, dtype, m, o) for s, m, o in product(shapes, MODES[::3], ("aligned", "mixed")))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_numpy_on_the_host(dtype):
    """GPU and NumPy backend against float64 by NumPy, and against each other."""
    failures, shapes = [], covering(300_000)
    for i, shape in enumerate(shapes):
        case = Case(shape, dtype, MODES[i % len(MODES)], seed=i)
        got, twin = run(cuda, case), case.on_host()
        expected = run(numpy_backend, twin)
        here = SimpleNamespace(**{name: to_host(value) for name, value in vars(got).items()})
        failures += twin.failures(here)
        failures += [f"NumPy backend: {line}" for line in twin.failures(expected)]
        for name in ("mean", "invstd"):
            limit = 2 * PER_CHANNEL[dtype.name] * np.maximum(1, np.abs(getattr(expected, name)))
            if not (np.abs(getattr(here, name) - getattr(expected, name)) <= limit).all():
                failures.append(f"{case.label}: {name} differs from the NumPy backend's")
    fail_with(failures, len(shapes))


def to_host(value):
    if isinstance(value, BackwardSums):
        return BackwardSums(*map(copy_to_host, value))
    return copy_to_host(value) if hasattr(value, "shape") else value


# ---- masks ---------------------------------------------------------------------------------------


def masked_failures(case):
    """What of a case of kernel_cases.py is off on the device."""
    f, n = case.forward, max(case.count, 1)  # which leaves the kink
    found = kernel_cases._run(cuda, case, cp.asarray, cp)
    got = {name: to_host(value) for name, value in found.items()}
    got["running"] = [copy_to_host(state) for state in found["running"]]
    kept = got["y"].astype(np.float64) > 0 if case.activation else None
    b, relative = case.backward(kept), PER_CHANNEL[case.x.dtype.name]
    state = (f.mean / 2, (1 + f.var * n / max(n - 1, 1)) / 2) if case.count else (0, 1)
    wanted = {
        "mean": (got["mean"], f.mean, relative),
        "var": (got["var"], f.var, relative),
        "running mean": (got["running"][0], state[0], relative),
        "running var": (got["running"][1], state[1], relative),
        "y": (got["y"], f.y, TOLERANCE[case.x.dtype.name]),
        "dx": (got["dx"], b.dx, TOLERANCE[case.x.dtype.name]),
    }
    bad = [name for name, (a, e, limit) in wanted.items() if not off(a, e) <= limit]
    if got["relu_bits"] is not None and (got["relu_bits"] != np.packbits(kept)).any():
        bad.append("relu_bits")
    nothing = np.broadcast_to(~case.valid, case.x.shape)
    tensors = ("y", "dx", "dresidual") if case.needs_dresidual else ("y", "dx")
    for name in tensors:
        memory = got[name].view(f"u{case.x.itemsize}")
        bad += [f"{name} where masked"] if memory[nothing].any() else []
    return [f"{case.x.dtype} {case.x.shape}, {case.count} valid: {', '.join(bad)}"] if bad else []


def off(got, expected):
    got, expected = got.astype(np.float64), np.asarray(expected, np.float64)
    return (np.abs(got - expected) / np.maximum(1, np.abs(expected))).max()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_shapes_in_every_mask(dtype):
    """NaN and Inf where masked; for compute-sanitizer, too."""
    shapes = [*LAYOUTS, (5, 6, 24), (7, 258, 2), (3000, 64, 1), (700, 8, 49)]
    failures, cases = [], list(product(shapes[:2] if TINY else shapes, kernel_cases.MASKS))
    for i, (shape, kind) in enumerate(cases):
        mask = kernel_cases.mask_of(kind, shape, i)
        failures += masked_failures(kernel_cases.Case(shape, dtype, MODES[i % 4], i, mask=mask))
    fail_with(failures, len(cases))


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_far_from_zero(dtype, ratio):
    failures = []
    for shape in LAYOUTS:
        values = np.random.default_rng(3).standard_normal(shape)
        if dtype.itemsize == 2:
            ratio = min(ratio, 100)  # beyond, the stored values are constants
            values /= 64
        values += ratio * values.std(axis=(0, 2), keepdims=True)
        case = Case(shape, dtype, "plain", x=stored(values, dtype))
        failures += case.failures(run(cuda, case))
    fail_with(failures, len(LAYOUTS))


def stored(values, dtype):
    return values.astype(np.float32).astype(dtype) if dtype != np.float64 else values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_outlier_comes_first(dtype):
    failures = []
    for shape in (*LAYOUTS, *SPLIT):
        values = np.random.default_rng(4).standard_normal(shape)
        values[0, :, 0] = 1e4
        case = Case(shape, dtype, "plain", x=stored(values, dtype))
        failures += case.failures(run(cuda, case))
    fail_with(failures, len(LAYOUTS) + len(SPLIT))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_have_no_variance(dtype):
    for value, shape in product(
        (0.0, 1.0, -3.1, 1234.567, 6e4, 1e-3), (*LAYOUTS, (700, 8, 49), (3000, 3, 1))
    ):
        x = stored(np.full(shape, value), dtype)
        moments = cuda.batch_moments(cp.asarray(x))
        mean, var, _ = cuda.finalize_moments(moments, 1e-5)
        assert not copy_to_host(moments.m2).any(), (value, shape)
        assert not copy_to_host(var).any(), (value, shape)
        assert (copy_to_host(mean) == float(x.flat[0])).all(), (value, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_channel(bad, dtype):
    for shape, mode in product(LAYOUTS, MODES):
        clean = Case(shape, dtype, mode)
        x, channel = copy_to_host(clean.x), 1
        x[-1, channel, shape[2] // 2] = bad
        expected = run(cuda, clean)
        # not another Case: the same dy
        clean.x[...] = cp.asarray(x)
        got = run(cuda, clean)
        others = np.arange(shape[1]) != channel
        for name in ("mean", "var", "dweight", "dbias"):
            a, b = (copy_to_host(getattr(result, name)) for result in (got, expected))
            assert (a[others] == b[others]).all(), (shape, mode, name)
        for name in ("y", "dx"):
            a, b = (copy_to_host(getattr(result, name)) for result in (got, expected))
            assert (a[:, others] == b[:, others]).all(), (shape, mode, name)
        assert np.isnan(copy_to_host(got.var)[channel])
        assert np.isnan(copy_to_host(got.y)[:, channel].astype(np.float32)).all(), (shape, mode)


def test_denormal_float16_values_count():
    """They are ordinary float32 numbers."""
    values = np.random.default_rng(5).integers(-1000, 1000, (64, 8, 9)) * 2.0**-24
    x = values.astype(np.float16)
    mean, var, invstd = cuda.finalize_moments(cuda.batch_moments(cp.asarray(x)), 1e-30)
    y = copy_to_host(cuda.normalize(cp.asarray(x), Transform(mean, invstd))).astype(np.float64)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(copy_to_host(var), wide.var(axis=(0, 2)), rtol=1e-5)
    centred = wide - wide.mean(axis=(0, 2), keepdims=True)
    exact = centred / np.sqrt(wide.var(axis=(0, 2), keepdims=True) + 1e-30)
    np.testing.assert_allclose(y, exact, atol=2e-3)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.name in ("float32", "bfloat16")], ids=str)
def test_denormal_values_of_float32_and_bfloat16_count_as_zero(dtype, capsys):
    """CuPy compiles with -ftz=true. Results stay within one smallest normal number of the exact.

    bfloat16 has the exponents of float32, in which it is computed.
    """
    smallest = float(np.finfo(np.float32).tiny)
    x = (np.random.default_rng(6).integers(1, 100, (64, 8, 9)) * 2.0**-133).astype(dtype)
    moments = cuda.batch_moments(cp.asarray(x))
    mean, exact = copy_to_host(moments.mean), x.astype(np.float64).mean(axis=(0, 2))
    with capsys.disabled():
        print(f" mean of denormals: {mean[0]:.3g}, exact {exact[0]:.3g} ", end="")
    assert (np.abs(mean - exact) <= smallest).all()
    assert (copy_to_host(moments.m2) <= x.size * smallest**2).all()
    x = np.random.default_rng(7).standard_normal((64, 8, 9)).astype(dtype)
    weight = cp.full(8, 1e-38, dtype=cp.float32)  # y is denormal
    mean, _, invstd = cuda.finalize_moments(cuda.batch_moments(cp.asarray(x)), 1e-5)
    y = copy_to_host(cuda.normalize(cp.asarray(x), Transform(mean, invstd, weight))).astype(
        np.float64
    )
    centred = x.astype(np.float64) - copy_to_host(mean)[:, None]
    exact = centred * copy_to_host(invstd)[:, None] * 1e-38
    assert (np.abs(y - exact) <= 5 * smallest).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 5, 0), (0, 2, 1)])
def test_empty_batches(shape, dtype):
    x, c = cp.empty(shape, dtype), shape[1]
    payload = cp.ones(2 * c)
    moments = cuda.batch_moments(x, payload=payload)
    running = [cp.full(c, 3, dtype=parameter_dtype(dtype)) for _ in range(2)]
    mean, var, invstd = cuda.finalize_moments(moments, 1e-5, running=tuple(running), factor=0.1)
    assert moments.count == 0
    assert not any(copy_to_host(a).any() for a in (payload, moments.mean, mean, var))
    assert all((copy_to_host(state) == 3).all() for state in running)
    assert cuda.normalize(x, Transform(mean, invstd)).shape == shape
    sums = cuda.backward_reduce(x, x, Transform(mean, invstd), payload=payload)
    assert not any(copy_to_host(a).any() for a in (payload, *sums))
    dweight = cp.ones(c, parameter_dtype(dtype))
    dx = cuda.backward_input(x, x, Transform(mean, invstd), sums=sums, local=sums, dweight=dweight)
    assert dx.shape == shape
    assert (copy_to_host(dweight) == 1).all()


# ---- messages, forms, arguments ------------------------------------------------------------------


def close(got, expected, tolerance):
    got, expected = copy_to_host(got).astype(np.float64), np.asarray(expected, np.float64)
    return bool((np.abs(got - expected) <= tolerance * np.maximum(1, np.abs(expected))).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics(dtype):
    rng = np.random.default_rng(5)
    for factor, count in product((0.0, 0.1, 1.0), (1, 2, 1000)):
        values = rng.standard_normal(300), rng.uniform(0, 9, 300)
        values[1][0] = -1e-9
        states = [rng.uniform(0, 2, 300).astype(parameter_dtype(dtype)) for _ in range(2)]
        ours = [cp.asarray(state) for state in states]
        moments = Moments(count, *map(cp.asarray, values))
        got = cuda.finalize_moments(moments, 1e-3, running=tuple(ours), factor=factor)
        expected = numpy_backend.finalize_moments(
            Moments(count, *values), 1e-3, running=tuple(states), factor=factor
        )
        tolerance = 1e-6 if dtype != np.float64 else 1e-13
        for a, b in zip((*got, *ours), (*expected, *states), strict=True):
            assert close(a, b, tolerance), (factor, count)


def test_strided_parameters_and_statistics():
    memory = cp.ones((2, 5, 2), np.float32)
    running = (memory[0, :, 0], memory[1, :, 0])
    moments = Moments(4, cp.zeros(5), cp.zeros(5))
    plainly.finalize_moments(moments, 1e-5, running=running, factor=1.0)
    assert not copy_to_host(memory[:, :, 0]).any()
    assert copy_to_host(memory[:, :, 1]).all()
    x = np.random.default_rng(1).standard_normal((3, 5, 49)).astype(np.float32)
    weight = np.linspace(0.5, 1.5, 10, dtype=np.float32)
    mean, invstd = np.full(10, 0.25), np.full(10, 2.0)
    on_device = [cp.asarray(a)[::2] for a in (mean, invstd, weight)]
    y = plainly.normalize(cp.asarray(x), Transform(*on_device))
    assert close(
        y, numpy_backend.normalize(x, Transform(mean[::2], invstd[::2], weight[::2])), 1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_messages_of_three_ranks(dtype):
    """Partial batches, an empty one too, written into messages, added up, and read back."""
    shapes, exact = ((3, 6, 49), (0, 6, 49), (1, 6, 49), (70, 6, 49)), dtype == np.float64
    rng = np.random.default_rng(8)
    parts_ = [stored(rng.standard_normal(s) + 3 * i, dtype) for i, s in enumerate(shapes)]
    size = 6 if exact else 12
    total, count, all_local = cp.zeros(size), 0, []
    for part in parts_:
        message = cp.full(16 + size + 3, np.nan)
        local = cuda.batch_moments(cp.asarray(part), payload=message[16 : 16 + size])
        around = copy_to_host(message)
        assert np.isnan(around[:16]).all()
        assert np.isnan(around[16 + size :]).all()
        total, count = total + message[16 : 16 + size], count + local.count
        all_local.append(local)
    pooled, form = Moments(count, total[:6], total[6:]), "pooled"
    if exact:
        second = cp.zeros(6)
        for local in all_local:
            payload = cp.full(6, np.nan)
            cuda.recentre_moments(local, total, count, payload)
            second += payload
        pooled, form = Moments(count, total, second), "recentred"
    mean, var, invstd = cuda.finalize_moments(pooled, 1e-5, form=form)
    whole = np.concatenate([part.astype(np.float64) for part in parts_])
    tolerance = 1e-13 if exact else 1e-6
    assert close(mean, whole.mean(axis=(0, 2)), tolerance)
    assert close(var, whole.var(axis=(0, 2)), tolerance)
    assert close(invstd, 1 / np.sqrt(copy_to_host(var) + 1e-5), 1e-12)


def finished(finish_forward, case):
    """The results of a forward of float64 data after its second message."""
    xp, c, y = case.xp, case.shape[1], case.field(case.offsets[3])
    relu_bits = xp.full((y.size + 7) // 8, 0xAA, dtype=xp.uint8) if case.needs_bits else None
    running = xp.full(c, 0.3), xp.full(c, 0.7)
    statistics = finish_forward(
        Moments(case.count, case.mean * case.count, case.var * case.count), "recentred",
        case.x, y, case.weight, case.bias, case.eps, relu=case.activation is not None,
        residual3=case.residual, relu_bits=relu_bits, running=running, factor=0.3,
    )  # fmt: skip
    return [*statistics, *running, y, *([] if relu_bits is None else [relu_bits])]


@pytest.mark.parametrize("margin", [Field.MARGIN, 0])
def test_small_shapes_of_float64_after_the_second_message(margin, monkeypatch):
    """One kernel does what two do; with margin 0 every array is an allocation."""
    monkeypatch.setattr(Field, "MARGIN", margin)
    with nullcontext() if margin else allocating_with(None):
        shapes = [*LAYOUTS, *ODD_ONES, (2, 2, 31360), (3000, 64, 1)]
        for shape, mode, offsets in product(shapes, MODES, ("aligned", "mixed")):
            case = Case(shape, np.dtype(np.float64), mode, OFFSETS[offsets])
            one, two = (finished(f, case) for f in (cuda.finish_forward, in_two_launches))
            for a, b in zip(one, two, strict=True):
                assert close(a, copy_to_host(b), 1e-12), case.label
            assert not any(int(field.broken()) for field in case.fields), case.label


def test_backward_sums_go_into_the_message():
    for shape in ((33, 6, 49), (4, 2, 10007), (3000, 64, 1)):
        case = Case(shape, np.dtype(np.float32), "relu")
        payload = cp.full(2 * shape[1], np.nan)
        transform = Transform(case.mean, case.invstd, case.weight, case.bias)
        sums = cuda.backward_reduce(case.dy, case.x, transform, relu=True, payload=payload)
        assert (copy_to_host(payload) == copy_to_host(cp.concatenate(sums))).all()


def test_pooled_sums_shape_dx_and_local_ones_the_parameter_gradients():
    case = Case((3, 5, 49), np.dtype(np.float32), "plain")
    twin, results = case.on_host(), []
    numbers = np.random.default_rng(9).standard_normal((2, 2, 5))
    for backend, on, xp in ((plainly, case, cp), (numpy_backend, twin, np)):
        pooled, local = (BackwardSums(*map(xp.asarray, pair)) for pair in numbers)
        gradients = [xp.ones(10, np.float32)[::2], xp.ones(5, np.float32)]
        mean, invstd = xp.asarray(twin.mean), xp.asarray(twin.invstd)
        dx = backend.backward_input(
            on.dy,
            on.x,
            Transform(mean, invstd, on.weight, on.bias),
            sums=pooled,
            count=1000,
            local=local,
            dweight=gradients[0],
            dbias=gradients[1],
        )
        results.append((dx, *gradients))
    for got, expected in zip(*results, strict=True):
        assert close(got, expected, 1e-6)


def test_without_weight_and_bias():
    for dtype, activation in product(DTYPES, (None, "relu")):
        x = stored(np.random.default_rng(1).standard_normal((3, 32, 49)), dtype)
        mean, invstd = np.full(32, 0.5), np.full(32, 2.0)
        transform = Transform(cp.asarray(mean), cp.asarray(invstd))
        y = cuda.normalize(cp.asarray(x), transform, relu=activation is not None)
        expected = numpy_backend.normalize(x, Transform(mean, invstd), relu=activation is not None)
        assert close(y, expected.astype(np.float64), 2 * TOLERANCE[dtype.name]), dtype


def test_outputs_may_be_their_inputs():
    for shape in LAYOUTS:
        case = Case(shape, np.dtype(np.float32), "residual relu", OFFSETS["all by one"])
        expected = run(cuda, case)
        transform = Transform(expected.mean, expected.invstd, case.weight, case.bias)
        y, dx, relu_bits = case.residual.copy(), case.dy.copy(), cp.empty_like(expected.relu_bits)
        options = {"relu": True, "relu_bits": relu_bits}
        cuda.normalize(case.x, transform, residual3=y, out3=y, **options)
        cuda.backward_input(
            dx, case.x, transform, sums=expected.sums, count=case.count, out3=dx, **options
        )
        assert close(y, copy_to_host(expected.y), 1e-6), shape
        assert close(dx, copy_to_host(expected.dx), 1e-6), shape


def test_public_primitives_take_the_cuda_backend():
    x = np.random.default_rng(2).standard_normal((8, 5, 49)).astype(np.float32)
    mean, var, invstd = F.finalize_moments(F.batch_moments(cp.asarray(x)), 1e-5)
    assert all(isinstance(a, cp.ndarray) and a.dtype == np.float64 for a in (mean, var, invstd))
    assert close(F.normalize(cp.asarray(x), mean, invstd), numpy_backend.normalize(
        x, Transform(copy_to_host(mean), copy_to_host(invstd))), 1e-5)  # fmt: skip


# ---- determinism, scratch, compiling -------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits_and_counters_return_to_zero(dtype):
    clear_caches()
    for shape, mode in product((*SPLIT, *LAYOUTS), MODES):
        case = Case(shape, dtype, mode)
        first, second = run(cuda, case), run(cuda, case)
        for name in ("mean", "var", "y", "dx", "dweight", "dbias", "relu_bits", "dresidual"):
            a, b = (getattr(result, name) for result in (first, second))
            assert a is None or copy_to_host(a).tobytes() == copy_to_host(b).tobytes(), name
    assert launch._kept.scratch, "no shape was split over blocks"
    for _, counters in launch._kept.scratch.values():
        assert not copy_to_host(counters).any()


def test_one_launch_after_the_second_message_gives_the_bits_of_two():
    """Of float64 data over several ranks: finalized in every block, written by one."""
    failures, ran = [], 0
    for shape, mode in product([*LAYOUTS, *SPLIT], MODES):
        case = Case(shape, np.dtype(np.float64), mode)
        mean, var, _ = cuda.finalize_moments(cuda.batch_moments(case.x), case.eps)
        moments = Moments(case.count, mean * case.count, var * case.count)
        results = []
        for finish_forward in (cuda.finish_forward, in_two_launches):
            y, running = case.field(0), (cp.full(shape[1], 0.3), cp.full(shape[1], 0.7))
            relu_bits = cp.zeros((y.size + 7) // 8, cp.uint8) if case.needs_bits else None
            statistics = finish_forward(
                moments,
                "recentred",
                case.x,
                y,
                case.weight,
                case.bias,
                case.eps,
                relu=case.activation is not None,
                residual3=case.residual,
                relu_bits=relu_bits,
                running=running,
                factor=0.3,
            )
            results.append([*statistics, *running, y, *([] if relu_bits is None else [relu_bits])])
        same = [bool((a == b).all()) for a, b in zip(*results, strict=True)]
        failures += [] if all(same) else [f"{case.label}: {same}"]
        ran += 1
    fail_with(failures, ran)


def test_nothing_is_compiled_or_planned_twice(monkeypatch):
    case = Case((3, 32, 49), np.dtype(np.float32), "residual relu")
    run(cuda, case)
    planned = launch.tensor_launch.cache_info().misses
    monkeypatch.setattr(source, "compile_module", None)
    run(cuda, case)
    assert launch.tensor_launch.cache_info().misses == planned


_FIRST_STEP = """
import json, sys, time
import numpy as np
import cupy
import cupybn
from cupybn.backends.cuda import source

compile_module, spent = source.compile_module, []

def timed(*module):
    began = time.perf_counter()
    compiled = compile_module(*module)
    spent.append(time.perf_counter() - began)
    return compiled

source.compile_module = timed
dtype = sys.argv[1]
if dtype == "bfloat16":
    import ml_dtypes
    dtype = ml_dtypes.bfloat16
x = np.random.default_rng(0).standard_normal((32, 64, 28, 28)).astype(np.float32).astype(dtype)
x = cupy.asarray(x)
layer = cupybn.BatchNorm2d(64, dtype="float64" if x.dtype == "float64" else None, device="cuda")
cupy.cuda.Device().synchronize()
began = time.perf_counter()
layer.backward(layer(x))
cupy.cuda.Device().synchronize()
print(json.dumps({"step": time.perf_counter() - began, "compile": sum(spent), "n": len(spent)}))
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_step_of_a_process_compiles_fast(dtype, tmp_path, capsys):
    """Nothing cached. The aim is 1 s of compiling; slower processors get twice that."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    process = subprocess.run(
        [sys.executable, "-c", _FIRST_STEP, dtype.name],
        env=os.environ | {"CUPY_CACHE_DIR": str(tmp_path), "PYTHONPATH": path},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    spent = json.loads(process.stdout.splitlines()[-1])
    with capsys.disabled():
        print(
            f" {dtype}: {spent['n']} modules compiled in {spent['compile']:.2f} s, "
            f"first step {spent['step']:.2f} s ",
            end="",
        )
    assert spent["n"] == 3
    assert spent["compile"] < 2


# ---- more than 2^31 elements ---------------------------------------------------------------------

HUGE = {
    "one channel, ragged rows": ((2049, 1, 2**20 + 1), "plain"),
    "one channel, one row": ((1, 1, 2**31 + 9), "relu"),
    "many channels, rows": ((131, 256, 2**16), "plain"),
    "many channels, runs": ((171_400, 256, 49), "relu"),
    "columns": ((2**25 + 3, 64, 1), "relu"),
    "columns, relu_bits": ((2**25 + 3, 64, 1), "residual relu"),
    "ragged rows, relu_bits": ((2049, 1, 2**20 + 1), "residual relu"),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(HUGE))
def test_more_than_2_31_elements(name):
    shape, mode = HUGE[name]
    assert prod(shape) > 2**31
    tensors = 6 if "residual" in mode else 4
    free_blocks()
    needed, free = 2 * tensors * prod(shape) + 16 * 8 * PART, cp.cuda.runtime.memGetInfo()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 20} MiB of device memory, {free >> 20} are free")
    case = Case(shape, np.dtype(np.float16), mode)
    failures = case.failures(run(cuda, case))
    del case
    free_blocks()
    fail_with(failures, 1)
