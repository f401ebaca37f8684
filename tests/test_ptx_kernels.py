"""What the machine for PTX shows of the kernels beside results, which test_kernels.py compares."""

from __future__ import annotations

import mmap
import re

import fake_cupy
import numpy as np
import pytest
from conftest import DTYPES
from cuda_tools import need
from cuda_variants import masked_variants, variants
from kernel_cases import Case, host_kernels, run, there
from ptx.launch import missing

from cupybn.backends import cuda
from cupybn.backends.cuda import primitives, source
from cupybn.statistics import BackwardSums, Moments, Transform

if missing() is None:
    from ptx import nvrtc, program
    from ptx.launch import Module, PtxError, compile_module, setting

pytestmark = [pytest.mark.timeout(900), pytest.mark.ptx]
ARCHITECTURES = ("compute_75", "compute_80", "compute_90", "compute_120")
SIXTEEN = [d for d in DTYPES if d.itemsize == 2]


@pytest.fixture(autouse=True)
def _tools():
    need(missing())


# ---- conversions ---------------------------------------------------------------------------------

CONVERSIONS = """
extern "C" __global__ void wide(float* y, const scalar_t* x) {
  i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  y[i] = widen(x[i]);
}
extern "C" __global__ void thin(scalar_t* y, const float* x) {
  i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  narrow(x[i], y[i]);
}
"""
BITS = np.arange(1 << 16, dtype=np.uint16)


def float32_near(dtype):
    """All that a 16-bit value can be, what lies in the middle of two, and beside both."""
    with np.errstate(invalid="ignore"):
        exact = BITS.view(dtype).astype(np.float32)
    finite = np.sort(exact[np.isfinite(exact)]).astype(np.float64)
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    low = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0xEFFF, 0xF000)
    values = [exact, middle, *((upper | bits).view(np.float32) for bits in low)]
    values += [np.nextafter(middle, np.float32(to)) for to in (np.inf, -np.inf)]
    values = np.concatenate(values)
    return np.pad(values, (0, -values.size % 256))


@np.errstate(all="ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_conversions_by_every_pattern(dtype, architecture):
    text = f"#define SCALAR {dtype.name}\n" + source.paste("numeric.cuh") + CONVERSIONS
    module = compile_module(text, architecture=architecture)
    with setting(shuffle=False, races=False):
        y = np.empty(BITS.size, np.float32)
        module.get_function("wide")((BITS.size // 256,), (256,), (y, BITS))
        x = float32_near(dtype)
        thin = np.empty(x.size, np.uint16)
        module.get_function("thin")((x.size // 256,), (256,), (thin, x))
    exact = BITS.view(dtype).astype(np.float32)
    number = ~np.isnan(exact)
    assert np.array_equal(y.view(np.uint32)[number], exact.view(np.uint32)[number])
    assert np.isnan(y[~number]).all()
    expected, number = x.astype(dtype), ~np.isnan(x)
    assert np.array_equal(thin[number], expected.view(np.uint16)[number])
    assert np.isnan(thin.view(dtype)[~number].astype(np.float32)).all()


# ---- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_of_every_architecture_is_known(dtype, architecture):
    """No instruction in it has no meaning here."""
    for variant in variants(dtype.name):
        module = compile_module(variant.source, architecture=architecture)
        assert all(module.get_function(name) for name in variant.kernels)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_architectures_give_the_same_bits(dtype, architecture):
    """Their PTX differs, in conversions most; results may not."""
    results = []
    for build in (compile_module, lambda text, _: compile_module(text, architecture=architecture)):
        with host_kernels(build):
            found = []
            for shape in ((3, 32, 49), (3, 3, 49), (65, 24, 1), (2, 3, 784), (700, 8, 49)):
                got = vars(run(cuda, Case(shape, dtype, "residual relu")))
                found += [
                    np.asarray(got[name]).tobytes() for name in ("y", "dx", "mean", "relu_bits")
                ]
        results.append(found)
    assert results[0] == results[1]


# ---- masks ---------------------------------------------------------------------------------------


def of_masks(variant):
    """Instructions of a module that come from the files for masks, and its kernels' parameters."""
    kernels = program.read(nvrtc.compile_text(variant.source))
    places = [place.rpartition("/")[2] for found in kernels.values() for place in found.places]
    ours = [place for place in places if place.startswith(("mask.cuh", "masked_moments.cuh"))]
    return ours, {name: len(found.parameters) for name, found in kernels.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_mask_there_is_no_instruction_for_it(dtype):
    """Nor a parameter more; tests/test_traffic.py sees that no byte more moves, either."""
    plain = {(v.kernels, v.defines): of_masks(v) for v in variants(dtype.name)}
    assert not any(instructions for instructions, _ in plain.values())
    found = 0
    for variant in masked_variants(dtype.name):
        instructions, parameters = of_masks(variant)
        found += len(instructions)
        before = plain[variant.kernels, variant.defines[1:]][1]
        more = {name: count - before[name] for name, count in parameters.items()}
        assert more == {name: 2 if name == "batch_moments" else 1 for name in more}
    assert found > 100


# ---- kernels that no pass of test_kernels.py launches --------------------------------------------


def test_recentre_moments():
    rng = np.random.default_rng(0)
    mean, m2, weighted = rng.standard_normal((3, 300))
    payload = np.full(300, np.nan)
    with host_kernels(compile_module):
        local = Moments(7, there(mean), there(m2))
        cuda.recentre_moments(local, there(weighted), 20, there(payload))
    assert np.allclose(payload, m2 + 7 * (mean - weighted / 20) ** 2, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_of_rows_by_the_element(dtype, monkeypatch):
    """The module is there for pairs of tensors; alone, a tensor is read in vectors."""
    original, built = primitives.tensor_launch, []

    def by_element(kernel, shape, dtype, device, some, every, *more):
        return original(kernel, shape, dtype, device, dtype.itemsize, 0, *more)

    def build(text, kernels):
        built.append(text)
        return compile_module(text, kernels)

    monkeypatch.setattr(primitives, "tensor_launch", by_element)
    for shape in ((3, 5, 784), (2, 3, 20011)):
        case = Case(shape, dtype, "plain")
        with host_kernels(build):
            moments = cuda.batch_moments(there(case.x))
        mean, m2 = moments.mean.memory, moments.m2.memory
        assert np.allclose(mean, case.forward.mean, rtol=1e-5, atol=1e-6)
        assert np.allclose(m2 / case.count, case.forward.var, rtol=1e-5)
    choices = ("RAGGED_VECTORS 0", "ROWS 1", "VECTOR 1")
    assert all(all(f"#define {choice}\n" in text for choice in choices) for text in built)


# ---- planted faults ------------------------------------------------------------------------------

SPLIT = {
    "rows": (4, 2, 10007),
    "runs": (700, 8, 49),
    "columns": (3000, 64, 1),
    "one ragged column": (400003, 1, 1),
    "ragged columns": (3001, 65, 1),
}


def outcome(dtype, shape, edit):
    """Bits of a forward and backward by kernels whose PTX `edit` has changed; or the fault."""

    def build(text, kernels):
        return Module(edit(nvrtc.compile_text(text)))

    with host_kernels(build):
        try:
            got = vars(run(cuda, Case(shape, dtype, "plain")))
        except PtxError as error:
            return str(error)
    return [np.asarray(got[name]).tobytes() for name in ("mean", "var", "y", "dx", "dweight")]


def without(pattern, number):
    """Takes the instruction that matches out of the text, if it has so many."""
    count = 0

    def edit(ptx):
        nonlocal count
        found = list(re.finditer(rf"^\s*(?:@!?%p\d+ )?{pattern}[^;]*;\n", ptx, re.M))
        here, count = number - count, count + len(found)
        if not 0 <= here < len(found):
            return ptx
        edit.there = True
        return ptx[: found[here].start()] + ptx[found[here].end() :]

    edit.there = False
    return edit


def places(ptx, pattern):
    """The lines of the sources that the instructions counted by `without` come from."""
    return [
        place.rpartition("/")[2]
        for found in program.read(ptx).values()
        for text, place in zip(found.texts, found.places, strict=True)
        if re.match(rf"(@!?%p\d+ )?{pattern}", text)
    ]


def missed(pattern):
    """Places of such instructions; and those whose lack is a fault in one layout at least."""
    every, found = set(), set()
    for shape in SPLIT.values():
        texts = []
        outcome(np.dtype(np.float32), shape, lambda ptx: texts.append(ptx) or ptx)  # noqa: B023
        for number, place in enumerate(p for ptx in texts for p in places(ptx, pattern)):
            edit = without(pattern, number)
            fault = isinstance(outcome(np.dtype(np.float32), shape, edit), str)
            assert edit.there
            every.add(place)
            if fault:
                found.add(place)
    return every, found


@pytest.mark.parametrize(
    ("pattern", "places", "idle"),
    # The last barrier of block_sum only makes it safe to call twice in a row.
    [("membar.gl", 2, 0), ("bar.sync", 10, 1), ("bar.warp.sync", 1, 0)],
)
def test_every_barrier_and_fence_is_missed(pattern, places, idle):
    """Each is taken away in turn, and a fault is reported even if the results are right."""
    every, found = missed(re.escape(pattern))
    assert len(every) >= places
    assert len(every - found) <= idle, every - found


CHANGES = {
    "a shuffle without a lane": (r"(shfl\.sync[^;]*), (?:-1|%r\d+);", r"\1, 0x7fffffff;"),
    "a vector one element too far": (r"(ld\.global\.v4\.\w+ [^;]*\[%rd\d+)\]", r"\1+4]"),
    "a vector behind the array": (r"(ld\.global\.v4\.\w+ [^;]*\[%rd\d+)\]", r"\1+4194304]"),
    "a store behind the array": (r"(st\.global\.v4\.\w+ \t?\[%rd\d+)\]", r"\1+4194304]"),
    "a store before the array": (r"(st\.global\.v4\.\w+ \t?\[%rd\d+)\]", r"\1+-4194304]"),
    "shared memory too far": (r"(st\.shared\.\w+ \t?\[%r\d+)\]", r"\1+40000]"),
    "a barrier for some": (r"bar\.sync \t?0;", "setp.ne.u32 %x, %tid.x, 7;\n@%x bar.sync 0;"),
    "an early end": (r"bar\.sync \t?0;", "setp.eq.u32 %x, %tid.x, 7;\n@%x ret;\nbar.sync 0;"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("layout", SPLIT)
def test_a_changed_instruction_is_a_fault(layout, name):
    if layout == "columns" and "shuffle" in name:
        return  # there is one, but not for as few members of a channel
    pattern, to = CHANGES[name]
    changed = 0

    def edit(ptx):
        nonlocal changed
        found, n = re.subn(pattern, to, ptx)
        changed += n
        return found

    found = outcome(np.dtype(np.float32), SPLIT[layout], edit)
    assert isinstance(found, str) or not changed, found
    assert changed or layout == "rows"  # whose rows are not whole vectors


# ---- more than 2**31 elements --------------------------------------------------------------------


def large(shape, dtype):
    """Memory that is there when it is touched, and 0."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    return np.frombuffer(pages, np.uint8)[:size].view(dtype).reshape(shape)


def some_blocks(total, seed=0):
    """The first, the last and others."""
    rng = np.random.default_rng(seed)
    return sorted({*range(3), *range(total - 3, total), *rng.integers(0, total, 3).tolist()})


LARGE = {
    "rows": ((2, 3, 400_000_008), False),
    "ragged rows": ((2, 3, 400_000_003), False),
    "ragged rows, flat": ((2, 3, 400_000_003), True),
    "runs": ((2, 9_000_000, 120), True),
    "columns": ((40_000_000, 64, 1), True),
    "ragged runs": ((800_000_001, 3, 1), True),
}
NOISE = 200_000


@pytest.fixture
def short_slices(monkeypatch):
    """A device that holds 16 times as many blocks: each runs through less of a large tensor."""
    more = fake_cupy.Device.attributes | {"MultiProcessorCount": 16 * 132}
    monkeypatch.setattr(fake_cupy.Device, "attributes", more)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", [*SIXTEEN, np.dtype(np.float32)], ids=str)
def test_more_than_2_to_31_elements(name, dtype, short_slices):
    """Every access is in bounds, and what was written is right, where the blocks are."""
    shape, relu = LARGE[name]
    n, c, length = shape
    total = n * c * length
    assert total > 2**31
    rng = np.random.default_rng(1)
    x, dy, y, dx = (large(shape, dtype) for _ in range(4))
    relu_bits = large(-(-total // 8), np.uint8) if relu else None
    residual = large(shape, dtype) if relu else None
    for begin in (0, 2**31 - NOISE // 2, total - NOISE):
        for tensor in (x, dy) + ((residual,) if relu else ()):
            values = rng.standard_normal(NOISE).astype(np.float32)
            tensor.reshape(-1)[begin : begin + NOISE] = values.astype(dtype)
    per_channel = np.full if c > 1000 else lambda c, value: value + 0.1 * rng.random(c)
    mean, invstd = per_channel(c, 0.5), per_channel(c, 2.0)
    weight, bias = (per_channel(c, v).astype(np.float32) for v in (1.5, 0.25))
    transform = Transform(*map(there, (mean, invstd, weight, bias)))
    with host_kernels(compile_module), setting(blocks=some_blocks, races=False):
        options = {"relu": relu, "relu_bits": there(relu_bits)}
        cuda.normalize(there(x), transform, residual3=there(residual), out3=there(y), **options)
        sums = BackwardSums(*(there(np.zeros(c)) for _ in range(2)))
        options["sums"], options["count"] = sums, n * length
        cuda.backward_input(there(dy), there(x), transform, out3=there(dx), **options)
        cuda.batch_moments(there(x))
        cuda.backward_reduce(there(dy), there(x), transform, relu=relu, relu_bits=there(relu_bits))
    written = 0
    for begin in (0, 2**31 - NOISE // 2, total - NOISE):
        part = slice(begin, begin + NOISE)
        channel = np.arange(begin, begin + NOISE) // length % c
        scale = invstd[channel] * weight[channel]
        flat = {k: a.reshape(-1)[part].astype(np.float64) for k, a in
                (("x", x), ("y", y), ("dy", dy), ("dx", dx))}  # fmt: skip
        exact = (flat["x"] - mean[channel]) * scale + bias[channel]
        if relu:
            exact = np.maximum(exact + residual.reshape(-1)[part].astype(np.float64), 0)
        ran = flat["y"] != 0
        written += ran.sum()
        tolerance = 1e-5 if dtype.itemsize == 4 else 1e-2
        assert (np.abs(flat["y"] - exact) <= tolerance * np.maximum(1, np.abs(exact)))[ran].all()
        ran &= flat["dx"] != 0
        exact = flat["dy"] * scale
        assert (np.abs(flat["dx"] - exact) <= tolerance * np.maximum(1, np.abs(exact)))[ran].all()
        if relu:
            bits = np.unpackbits(relu_bits[begin // 8 : -(-(begin + NOISE) // 8)])[begin % 8 :][
                :NOISE
            ]
            assert (bits.astype(bool) == (flat["y"] > 0)).all()
    assert written > 1000


MASKED = {name: shape for name, (shape, _) in LARGE.items() if "flat" not in name}
MASKED["as many positions"] = (3, 1, 800_000_008)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_more_than_2_to_31_elements(name, short_slices):
    """The same with a mask: what it puts out is 0, whatever lies there; all else is right."""
    (n, c, length), dtype = MASKED[name], np.dtype(np.float16)
    total, rng = n * c * length, np.random.default_rng(2)
    x, dy, y, dx = (large((n, c, length), dtype).reshape(-1) for _ in range(4))
    mask = large((n, length), np.uint8)
    parts = [slice(begin, begin + NOISE) for begin in (0, 2**31 - NOISE // 2, total - NOISE)]
    valid = []
    for part in parts:
        i = np.arange(part.start, part.stop)
        positions = i // (c * length) * length + i % length
        mask.reshape(-1)[np.unique(positions)] = rng.integers(0, 2, len(np.unique(positions))) * 9
        valid.append(positions)
    valid = [mask.reshape(-1)[positions] != 0 for positions in valid]
    for part, counts in zip(parts, valid, strict=True):
        for tensor in (x, dy):
            tensor[part] = np.where(counts, rng.standard_normal(NOISE), np.nan)
        y[part] = dx[part] = 7
    mean, invstd = np.full(c, 0.5), np.full(c, 2.0)
    weight, bias = (np.full(c, value, np.float32) for value in (1.5, 0.25))
    transform = Transform(*map(there, (mean, invstd, weight, bias)))
    on = {"mask": there(mask)}
    x3, dy3, y3, dx3 = (there(a.reshape(n, c, length)) for a in (x, dy, y, dx))
    with host_kernels(compile_module), setting(blocks=some_blocks, races=False):
        cuda.normalize(x3, transform, relu=False, residual3=None, relu_bits=None, out3=y3, **on)
        sums = BackwardSums(*(there(np.zeros(c)) for _ in range(2)))
        options = {"relu": False, "relu_bits": None, **on}
        cuda.backward_input(dy3, x3, transform, sums=sums, count=100, out3=dx3, **options)
        cuda.batch_moments(x3, count=100, **on)
        cuda.backward_reduce(dy3, x3, transform, **options)
    ran, put_out = 0, 0
    for part, counts in zip(parts, valid, strict=True):
        for result, exact in ((y, (x[part].astype(float) - 0.5) * 3 + 0.25), (dx, dy[part] * 3.0)):
            found, written = result[part].astype(float), result[part] != 7
            expected = np.where(counts, exact, 0)[written]
            assert (np.abs(found[written] - expected) <= 1e-2 * np.maximum(1, abs(expected))).all()
            ran, put_out = ran + written.sum(), put_out + (written & ~counts).sum()
    assert ran > 1000
    assert put_out > 300


def test_an_offset_of_32_bits_would_be_found():
    """The test above can fail: the same kernel with an offset that wraps."""
    text = """extern "C" __global__ void f(unsigned char* y, long long step) {
        int i = static_cast<int>(blockIdx.x * step);
        y[i + static_cast<int>(threadIdx.x)] = 1;
    }"""
    y = large(2**31 + 2**20, np.uint8)
    kernel = compile_module(text).get_function("f")
    with setting(blocks=some_blocks, races=False), pytest.raises(PtxError, match="out of bounds"):
        kernel((2**11 + 1,), (32,), (y, np.int64(2**20)))
