"""The machine for PTX itself: instructions mean what they should, and planted faults are found."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from cuda_tools import need
from ptx import nvrtc
from ptx.launch import missing

if missing() is None:
    from ptx import machine, program
    from ptx.launch import Module, PtxError, compile_module, counting, run, setting

pytestmark = pytest.mark.timeout(900)  # the first launch compiles the machine


@pytest.fixture(autouse=True)
def _tools():
    need(missing())


def kernel(text: str, name: str):
    return compile_module(text).get_function(name)


def assembled(body: str, parameters: int = 1, shared: int = 0):
    """A kernel `f` of PTX, whose parameters are 64 bits wide; %a0, %a1 ... hold them."""
    names = [f"f_param_{i}" for i in range(parameters)]
    declared = ",\n".join(f".param .u64 {name}" for name in names)
    loads = "".join(f"ld.param.u64 %a{i}, [{name}];\n" for i, name in enumerate(names))
    variable = f".shared .align 16 .b8 some[{shared}];\n" if shared else ""
    text = f".visible .entry f(\n{declared}\n)\n{{\n{variable}{loads}{body}\nret;\n}}\n"
    return Module(text).get_function("f")


# ---- instructions --------------------------------------------------------------------------------


def computed(instruction, *operands, to="u64", of="u64"):
    """The results of an instruction; operands are arrays of lanes, 64 bits each, or numbers."""
    arrays = [np.atleast_1d(x) for x in operands if not isinstance(x, str)]
    n = len(arrays[0])
    words = [np.zeros(32, np.uint64) for _ in arrays]
    for word, array in zip(words, arrays, strict=True):
        raw = array.astype(array.dtype).view(f"u{array.itemsize}")
        word[:n] = raw
    loads, names = [], []
    for i, x in enumerate(operands):
        if isinstance(x, str):
            names.append(x)
            continue
        at = len(loads)
        loads.append(f"add.s64 %b{i}, %a{at + 1}, %o;\nld.global.u64 %v{i}, [%b{i}];")
        names.append(f"%v{i}")
    body = "mov.u32 %t, %tid.x;\nmul.wide.u32 %o, %t, 8;\n" + "\n".join(loads)
    body += (
        f"\n{instruction} %d, {', '.join(names)};\nadd.s64 %c, %a0, %o;\nst.global.u64 [%c], %d;"
    )
    out = np.zeros(32, np.uint64)
    assembled(body, 1 + len(words))((1,), (32,), (out, *words))
    return out[:n]


INTEGERS = np.array([0, 1, 2, 5, 31, 32, 63, 64, 100, 2**15, 2**31 - 1, 2**31, 2**32 - 1,
                     2**40 + 7, 2**63, 2**64 - 1], np.uint64)  # fmt: skip


def signed(x, bits):
    x = int(x) & ((1 << bits) - 1)
    return x - (1 << bits) if x >> (bits - 1) else x


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


PLAIN = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": truncated,
    "rem": lambda a, b: a - truncated(a, b) * b,
}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("kind", ["u", "s"])
@pytest.mark.parametrize("name", PLAIN)
def test_integers(name, kind, bits):
    pairs = [(a, b) for a in INTEGERS for b in INTEGERS[1:] if int(b) % (1 << bits)]
    mask = (1 << bits) - 1
    for begin in range(0, len(pairs), 32):
        both = np.array(pairs[begin : begin + 32], np.uint64) & np.uint64(mask)
        a, b = np.ascontiguousarray(both.T)
        got = computed(f"{name}.{kind}{bits}", a, b)
        number = (lambda x: signed(x, bits)) if kind == "s" else int
        expected = [PLAIN[name](number(x), number(y)) & mask for x, y in zip(a, b, strict=True)]
        assert got.tolist() == expected


def test_wide_and_fused_products():
    a, b = (np.array(x, np.uint64) for x in ([3, 2**32 - 1, 2**31], [5, 7, 2**31]))
    assert computed("mul.wide.u32", a, b).tolist() == [15, 7 * (2**32 - 1), 2**62]
    assert computed("mul.wide.s32", a, b).tolist() == [15, 2**64 - 7, 2**62]
    assert computed("mad.lo.s32", a, b, a).tolist() == [18, (7 * (2**32 - 1) - 1) % 2**32, 2**31]
    assert computed("mul.hi.u32", a, b).tolist() == [0, 6, 2**30]
    short = np.array([3, 2**16 - 1], np.uint64)
    assert computed("mul.wide.u16", short, short).tolist() == [9, (2**16 - 1) ** 2]


def test_bits():
    a = np.array([0xF0F0, 0x80000001, 0xFFFFFFFF], np.uint64)
    assert computed("shl.b32", a, "4").tolist() == [0xF0F00, 0x10, 0xFFFFFFF0]
    assert computed("shl.b32", a, "32").tolist() == [0, 0, 0]
    assert computed("shr.u32", a, "4").tolist() == [0xF0F, 0x8000000, 0xFFFFFFF]
    assert computed("shr.s32", a, "40").tolist() == [0, 0xFFFFFFFF, 0xFFFFFFFF]
    assert computed("bfe.u32", a, "4", "8").tolist() == [0x0F, 0, 0xFF]
    assert computed("bfe.s32", a, "28", "4").tolist() == [0, 0xFFFFFFF8, 0xFFFFFFFF]
    assert computed("bfi.b32", a, a, "8", "8").tolist() == [0xF0F0, 0x80000101, 0xFFFFFFFF]
    c, d = np.array([0xD1C2B384], np.uint64), np.array([0x44332211], np.uint64)
    assert computed("prmt.b32", c, d, str(0x2301)).tolist() == [0xC2D184B3]
    assert computed("prmt.b32", c, d, str(0x7C58)).tolist() == [0x440022FF]  # signs of 4 and 0
    assert computed("popc.b32", a).tolist() == [8, 2, 32]
    assert computed("not.b32", a).tolist() == [0xFFFF0F0F, 0x7FFFFFFE, 0]
    assert computed("cvt.s64.s32", a).tolist() == [0xF0F0, 2**64 - 2**31 + 1, 2**64 - 1]
    assert computed("cvt.u16.u32", a).tolist() == [0xF0F0, 1, 0xFFFF]


@np.errstate(all="ignore")
@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_float32(ftz):
    rng = np.random.default_rng(0)
    x, y, z = rng.integers(0, 2**32, (3, 4096), np.uint32).view(np.float32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1e38, 1.17549435e-38])
    x[: special.size], y[: special.size] = special, special[::-1]
    y[100:200] = np.float32(1e-20) * x[100:200]

    def flushed(a):
        tiny = np.float32(2.0**-126)
        return np.where(np.abs(a) < tiny, np.copysign(np.float32(0), a), a) if ftz else a

    def check(name, values, exact):
        for begin in range(0, x.size, 32):
            part = slice(begin, begin + 32)
            got = computed(f"{name}{ftz}.f32", *(v[part] for v in values))
            expected = flushed(exact(*(flushed(v[part]) for v in values)).astype(np.float32))
            bits = np.where(np.isnan(expected), 0x7FFFFFFF, expected.view(np.uint32))
            assert got.tolist() == bits.tolist(), name

    for values, begin in ((x, 0), (y, 0), (z, 0)):
        values[begin:200:7] = np.float32(1e-39)
    x, y, z = x[:256], y[:256], z[:256]
    check("add", (x, y), np.add)
    check("sub", (x, y), np.subtract)
    check("mul", (x, y), np.multiply)
    check("div.rn", (x, y), np.divide)
    check("rcp.rn", (x,), lambda a: np.float32(1) / a)
    check("sqrt.rn", (x,), np.sqrt)


def test_fma_rounds_once():
    a = np.array([1 + 2.0**-30])
    assert computed("fma.rn.f64", a, a, -np.ones(1)).view(np.float64) == 2.0**-29 + 2.0**-60
    a = np.array([1 + 2.0**-15], np.float32)
    got = computed("fma.rn.f32", a, a, -np.ones(1, np.float32)).astype(np.uint32)
    assert got.view(np.float32) == np.float32(2.0**-14 + 2.0**-30)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_comparisons_with_nan(kind):
    dtype = np.dtype(f"f{int(kind[1:]) // 8}")
    a = np.array([1, 2, 3, np.nan], dtype)
    b = np.array([2, 2, 2, 2], dtype)
    tables = {"lt": 0b0001, "le": 0b0011, "gt": 0b0100, "ge": 0b0110, "eq": 0b0010, "ne": 0b0101}
    tables |= {f"{name}u": bits | 0b1000 for name, bits in tables.items()}
    tables |= {"num": 0b0111, "nan": 0b1000}
    for name, bits in tables.items():
        got = computed(f"setp.{name}.{kind}", a, b).tolist()
        assert got == [bits >> i & 1 for i in range(4)], name


def test_the_branches_are_in_the_order_of_the_table():
    """machine.arithmetic against program.ARITHMETIC."""
    text = Path(machine.__file__).read_text(encoding="utf-8")
    found = re.findall(r"if op == (\d+):\n\s+each\(r, m, ins, f\.(\w+)\)", text)
    assert [(int(code), name) for code, name in found] == list(enumerate(program.ARITHMETIC[:-1]))


def test_an_unknown_instruction_is_named():
    with pytest.raises(program.UnknownInstruction, match=r"tanh\.approx\.f32 %f1, %f2"):
        assembled("tanh.approx.f32 %f1, %f2;")
    with pytest.raises(program.UnknownInstruction, match=r"ld\.local\.u32"):
        assembled("ld.local.u32 %f1, [%a0];")


# ---- warps ---------------------------------------------------------------------------------------

SHUFFLES = r"""
extern "C" __global__ void shuffles(int* out, int width) {
    int me = threadIdx.x, *row = out + 4 * me;
    row[0] = __shfl_sync(~0u, me, me + 3, width);
    row[1] = __shfl_xor_sync(~0u, me, 5, width);
    row[2] = __shfl_down_sync(~0u, me, 3, width);
    row[3] = __shfl_up_sync(~0u, me, 3, width);
}
extern "C" __global__ void votes(unsigned* out) {
    int odd = threadIdx.x % 2;
    unsigned half = threadIdx.x % 32 < 16 ? 0xffff : 0xffff0000;
    unsigned all = __ballot_sync(~0u, odd);
    unsigned any = __any_sync(~0u, 0) + 2 * __any_sync(~0u, odd);
    unsigned every = __all_sync(~0u, 1) + 2 * __all_sync(~0u, odd);
    unsigned mine = __ballot_sync(half, threadIdx.x % 32 > 11);
    if (threadIdx.x == 0) out[0] = all, out[1] = any, out[2] = every, out[3] = mine;
}
extern "C" __global__ void indices(int* out) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = 1000 * block + thread;
}
"""
ORDERS = {"in order": {"shuffle": False}, "shuffled": {}, "split": {"split": True}}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [32, 8])
def test_shuffle(width, order):
    out = np.full((64, 4), -1, np.int32)
    with setting(**ORDERS[order]):
        kernel(SHUFFLES, "shuffles")((1,), (64,), (out, np.int32(width)))
    me = np.arange(64)
    first, last = me // width * width, me // width * width + width - 1
    want = [
        first + (me + 3) % width,
        np.where(me ^ 5 <= last, me ^ 5, me),
        np.where(me + 3 <= last, me + 3, me),
        np.where(me - 3 >= first, me - 3, me),
    ]
    assert np.array_equal(out, np.stack(want, 1))


@pytest.mark.parametrize("order", ORDERS)
def test_votes(order):
    out = np.zeros(4, np.uint32)
    with setting(**ORDERS[order]):
        kernel(SHUFFLES, "votes")((1,), (96,), (out,))
    assert [hex(v) for v in out] == [hex(v) for v in (0xAAAAAAAA, 2, 1, 0xF000)]


def test_indices():
    out = np.full(2 * 3 * 2 * 60, -1, np.int32)
    kernel(SHUFFLES, "indices")((2, 3, 2), (5, 4, 3), (out,))
    assert np.array_equal(out, np.add.outer(1000 * np.arange(12), np.arange(60)).ravel())


SUM = r"""
template <class T> __device__ T warp_sum(T v) {
    for (int bits = 16; bits; bits >>= 1) v += __shfl_xor_sync(MASK, v, bits);
    return v;
}
template <class T> __device__ T block_sum(T v) {
    __shared__ T part[32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    FIRST_BARRIER
    v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : T(0);
    if (threadIdx.x < 32) v = warp_sum(v);
    LAST_BARRIER
    return v;
}
extern "C" __global__ void __launch_bounds__(256) sums(
        double* out, const float* x, long long n, double* partial, unsigned* counter) {
    double sum = 0;
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        sum += x[i];
    sum = block_sum(sum);
    __shared__ bool last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        RELEASE_FENCE
        ARRIVE
    }
    LOOK_BARRIER
    if (!last) return;
    ACQUIRE_FENCE
    sum = block_sum(threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0.0);
    if (threadIdx.x == 0) *out = sum;
}
"""
SOUND = {
    "MASK": "~0u",
    "FIRST_BARRIER": "__syncthreads();",
    "LAST_BARRIER": "__syncthreads();",
    "RELEASE_FENCE": "__threadfence();",
    "ARRIVE": "last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;",
    "LOOK_BARRIER": "__syncthreads();",
    "ACQUIRE_FENCE": "__threadfence();",
}


def sound_sum(text=SUM, **changes):
    for word, meaning in (SOUND | changes).items():
        text = text.replace(word, meaning)
    return text


def summed(blocks=7, **changes):
    """The sum of 5003 numbers and what it should be, by SUM with these words in it."""
    text = sound_sum(**changes)
    x = np.random.default_rng(0).standard_normal(5003).astype(np.float32)
    out, partial, counter = np.full(1, np.nan), np.full(blocks, np.nan), np.zeros(1, np.uint32)
    arguments = out, x, np.int64(x.size), partial, counter
    kernel(text, "sums")((blocks,), (128,), arguments)
    assert counter[0] == 0
    return out[0], x.astype(np.float64).sum()


@pytest.mark.parametrize("order", ORDERS)
def test_a_reduction_over_blocks(order):
    with setting(**ORDERS[order]):
        found = {summed()[0] for _ in range(3)}
    assert len(found) == 1
    assert found.pop() == pytest.approx(summed()[1], abs=1e-9)


@pytest.mark.parametrize(
    ("word", "meaning", "message"),
    [
        ("RELEASE_FENCE", "", "another block wrote, without a fence, an atomic"),
        ("ACQUIRE_FENCE", "", "another block wrote, without an atomic .* and a fence of its own"),
        ("ARRIVE", "last = blockIdx.x == gridDim.x - 1;", "another block wrote, without a fence"),
        ("FIRST_BARRIER", "", "race in shared memory|shared memory that nobody wrote"),
        ("LOOK_BARRIER", "", "race in shared memory|shared memory that nobody wrote"),
        ("MASK", "0x7fffffffu", "mask lacks the lane itself|a lane that is not in its mask"),
        ("FIRST_BARRIER", "if (threadIdx.x < 96) __syncthreads();", "divergent barrier"),
        ("MASK", "(threadIdx.x & 1 ? ~0u : ~2u)", "different masks"),
    ],
)
def test_a_planted_fault_in_a_reduction_is_named(word, meaning, message):
    """Whatever the order in which blocks and warps took turns."""
    for seed in range(5):
        with setting(seed=seed), pytest.raises(PtxError, match=message):
            summed(**{word: meaning})


THRICE = r"""
extern "C" __global__ void thrice(double* out) {
    double a = block_sum(double(threadIdx.x)), b = block_sum(1.0), c = block_sum(2.0);
    if (threadIdx.x == 0) out[0] = a, out[1] = b, out[2] = c;
}
"""


def test_a_missing_barrier_between_two_uses_of_a_table():
    sound, faulty = sound_sum() + THRICE, sound_sum(LAST_BARRIER="") + THRICE
    out = np.full(3, np.nan)
    kernel(sound, "thrice")((1,), (128,), (out,))
    assert out.tolist() == [128 * 127 / 2, 128, 256]
    for order in ORDERS.values():
        with setting(**order), pytest.raises(PtxError, match="race in shared memory"):
            kernel(faulty, "thrice")((1,), (128,), (out,))


def test_fence_and_atomic_may_stand_on_both_sides_of_a_barrier():
    """All threads fence before the barrier, one arrives behind it; or one fences behind it."""
    store = "partial[blockIdx.x] = sum; } __threadfence(); __syncthreads(); if (!threadIdx.x) {"
    for fence in (store, store.replace("__threadfence(); __syn", "__syn") + "__threadfence();"):
        text = SUM.replace("partial[blockIdx.x] = sum;\n        RELEASE_FENCE", fence)
        text = sound_sum(text)
        x = np.ones(1000, np.float32)
        out, partial, counter = np.full(1, np.nan), np.full(7, np.nan), np.zeros(1, np.uint32)
        kernel(text, "sums")((7,), (128,), (out, x, np.int64(1000), partial, counter))
        assert out[0] == 1000


def test_two_launches_take_turns():
    """As on two streams: with a counter for each they are right, with one for both they are not."""
    function = kernel(sound_sum(), "sums")
    x = np.ones(20000, np.float32)

    def together(counters, partials):
        outs = [np.full(1, np.nan) for _ in range(2)]
        sizes = 20000, 10000
        run(*(
            function.start((9,), (128,), (out, x, np.int64(n), partial, counter))
            for out, n, partial, counter in zip(outs, sizes, partials, counters, strict=True)
        ))  # fmt: skip
        return [out[0] for out in outs]

    counters = [np.zeros(1, np.uint32) for _ in range(2)]
    partials = [np.zeros(9) for _ in range(2)]
    assert together(counters, partials) == [20000, 10000]
    try:
        wrong = together([counters[0]] * 2, [partials[0]] * 2) != [20000, 10000]
    except PtxError:  # two blocks took themselves for the last, or used what was not told them
        wrong = True
    assert wrong


# ---- planted faults ------------------------------------------------------------------------------

FAULTS = r"""#line 1 "faults.cu"
extern "C" __global__ void ended(float* y, int n) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    y[threadIdx.x] = 1;
}
extern "C" __global__ void branches(float* y, int n) {
    y += 64 * blockIdx.x;
    if (threadIdx.x < 32) {
        __syncthreads();
        y[threadIdx.x] = 1;
    } else {
        y[threadIdx.x] = 2;
        __syncthreads();
    }
}
extern "C" __global__ void some_lanes(float* y, int n) {
    if (threadIdx.x % 32 < 4) y[threadIdx.x] = __shfl_xor_sync(~0u, y[threadIdx.x], 1);
    __syncthreads();
}
extern "C" __global__ void outside_mask(float* y, int n) { __syncwarp(1u); }
extern "C" __global__ void of_other_lane(float* y, int n) {
    if (threadIdx.x % 32 < 4) y[threadIdx.x] = __shfl_xor_sync(0xfu, y[threadIdx.x], 4);
}
extern "C" __global__ void past_end(float* y, int n) {
    y[n + threadIdx.x] = 0;
}
extern "C" __global__ void before_begin(float* y, int n) {
    if (threadIdx.x == 5) y[0] = y[threadIdx.x - 6];
}
extern "C" __global__ void past_shared(float* y, int n) {
    __shared__ float some[64], more[64];
    more[threadIdx.x] = some[threadIdx.x] = 1;
    if (threadIdx.x == 0) some[n] = 1;
    y[64 * blockIdx.x + threadIdx.x] = more[threadIdx.x] + some[threadIdx.x];
}
extern "C" __global__ void past_dynamic(float* y, int n) {
    extern __shared__ float chosen[];
    chosen[n] = 1;
}
extern "C" __global__ void crooked(float* y, int n) {
    *(float4*)(y + n) = float4{1, 2, 3, 4};
}
extern "C" __global__ void crooked_shared(float* y, int n) {
    __shared__ float some[64];
    some[threadIdx.x] = 0;
    __syncthreads();
    float4 v = *(float4*)(some + n);
    if (threadIdx.x == 0) y[0] = v.x + v.y + v.z + v.w;
}
extern "C" __global__ void same_element(float* y, int n) { y[0] = threadIdx.x; }
extern "C" __global__ void same_block_element(float* y, int n) {
    if (threadIdx.x == 0) y[0] = blockIdx.x;
}
extern "C" __global__ void within_block(float* y, int n) {
    if (blockIdx.x > 0) return;
    y[threadIdx.x] = 1;
    y[64 + threadIdx.x] = y[threadIdx.x ^ 32];
}
extern "C" __global__ void within_warp(float* y, int n) {
    __shared__ float some[64];
    some[threadIdx.x] = threadIdx.x;
    y[64 * blockIdx.x + threadIdx.x] = some[threadIdx.x ^ 1];
}
extern "C" __global__ void uninitialised(float* y, int n) {
    __shared__ float some[64];
    if (threadIdx.x < 63) some[threadIdx.x] = 1;
    __syncthreads();
    y[64 * blockIdx.x + threadIdx.x] = some[63 - threadIdx.x];
}
extern "C" __global__ void for_ever(float* y, int n) {
    while (atomicAdd((unsigned*)y, 0u) != 77u) {}
}
"""
FLOAT = 16


def line_of(text: str) -> int:
    """FAULTS starts with the directive that numbers the next line 1."""
    return FAULTS[: FAULTS.index(text)].count("\n")


@pytest.mark.parametrize(
    ("name", "n", "message", "line"),
    [
        ("ended", 0, r"a barrier that threads wait at .* they have exited, block \(\d, 0, 0\)", ""),
        ("branches", 0, "divergent barrier", ""),
        ("some_lanes", 0, "waits for lanes of its mask which do not come", ""),
        ("outside_mask", 0, "whose mask lacks the lane itself", ""),
        ("of_other_lane", 0, "a shuffle reads a lane that is not in its mask", ""),
        ("past_end", 120, r"out of bounds, block \(\d, 0, 0\), thread ..?,", "y[n + threadIdx.x]"),
        ("before_begin", 0, "out of bounds.* thread 5,", "y[threadIdx.x - 6]"),
        ("past_shared", 64, "shared memory out of bounds, .* thread 0,", "some[n] = 1"),
        ("past_dynamic", 16, "shared memory out of bounds", "chosen[n] = 1"),
        ("crooked", 1, "a misaligned access", "*(float4*)(y"),
        ("crooked_shared", 1, "a misaligned access to shared", "*(float4*)(some"),
        ("same_element", 0, "what a thread of this block wrote", "y[0] = threadIdx"),
        ("same_block_element", 0, "what another block wrote", "y[0] = blockIdx"),
        ("within_block", 0, "what a thread of this block wrote", "y[threadIdx.x ^ 32]"),
        ("within_warp", 0, "race in shared memory: it reads", "some[threadIdx.x ^ 1]"),
        ("uninitialised", 0, "shared memory that nobody wrote", "some[63 - threadIdx.x]"),
        ("for_ever", 0, "did not end in", ""),
    ],
)
def test_a_planted_fault_is_named_with_its_line(name, n, message, line):
    y = np.zeros(128 + FLOAT, np.float32)
    y = y[-y.ctypes.data % 64 // 4 :][:128]
    for order in ORDERS.values():
        with setting(**order, uninitialised=True, limit=100_000), pytest.raises(PtxError) as error:
            kernel(FAULTS, name)((2,), (64,), (y, np.int32(n)), shared_mem=64)
        assert re.match(f"{name}: .*{message}", str(error.value))
        assert not line or f"faults.cu:{line_of(line)}: " in str(error.value)
    out = np.full((64, 4), -1, np.int32)
    kernel(SHUFFLES, "shuffles")((1,), (64,), (out, np.int32(32)))  # all is well again
    assert (out >= 0).all()


# ---- copies --------------------------------------------------------------------------------------

COPY = r"""
extern "C" __global__ void copied(float* y, const float* x, int given) {
    __shared__ __align__(16) float some[256];
    unsigned to = (unsigned)__cvta_generic_to_shared(some + 4 * threadIdx.x);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(x + 4 * threadIdx.x), "r"(given) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
    WAIT
    BARRIER
    for (int i = 0; i < 4; i++) y[4 * threadIdx.x + i] = some[(4 * threadIdx.x + i + 4) % 256];
}
"""
WAIT = 'asm volatile("cp.async.wait_group 0;" ::: "memory");'


def copied(wait=WAIT, barrier="__syncthreads();", given=16, size=256):
    x, y = np.arange(size, dtype=np.float32), np.full(256, np.nan, np.float32)
    text = COPY.replace("WAIT", wait).replace("BARRIER", barrier)
    kernel(text, "copied")((1,), (64,), (y, x, np.int32(given)))
    return np.roll(y, 4)


@pytest.mark.parametrize("order", ORDERS)
def test_copies_that_are_waited_for(order):
    with setting(**ORDERS[order]):
        assert copied().tolist() == list(range(256))
        assert copied(WAIT.replace("wait_group 0", "wait_all")).tolist() == list(range(256))
        assert not copied(given=0).any()  # of nothing, zeros


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wait": ""}, "a cp.async still writes"),
        ({"wait": WAIT.replace("group 0", "group 1")}, "a cp.async still writes"),
        ({"barrier": ""}, "race in shared memory: it reads|a cp.async still writes"),
        ({"size": 252}, "out of bounds"),
        ({"given": 0, "size": 252}, "out of bounds"),
    ],
)
def test_a_planted_fault_of_a_copy_is_named(options, message):
    for order in ORDERS.values():
        with setting(**order), pytest.raises(PtxError, match=message):
            copied(**options)


def test_copies_are_counted_as_loads():
    for given in (16, 0):
        with counting() as launches:
            copied(given=given)
        loads = sum(access.bytes for access in launches[0].loads)
        assert loads == 64 * given


# ---- launches ------------------------------------------------------------------------------------

ARGUMENTS = r'extern "C" __global__ void f(float* y, long long n, float a) { if (y) y[0] = n * a; }'


def test_arguments_are_checked():
    function = kernel(ARGUMENTS, "f")
    y = np.zeros(1, np.float32)
    function((1,), (1,), (y, np.int64(3), np.float32(0.5)))
    assert y[0] == 1.5
    function((1,), (1,), (np.uintp(0), 3, np.float32(2)))
    with pytest.raises(PtxError, match="out of bounds"):  # of no array of this launch
        function((1,), (1,), (y.ctypes.data, 3, np.float32(2)))
    for wrong in [(y, np.int32(3), np.float32(2)), (y, 3, 2.0), (y, 3), (np.int32(0), 3, y)]:
        with pytest.raises(TypeError, match="f"):
            function((1,), (1,), wrong)


@pytest.mark.parametrize(
    ("grid", "block", "shared"),
    [((0,), (32,), 0), ((1, 65536), (32,), 0), ((1,), (1025,), 0), ((1,), (64, 32), 0),
     ((1,), (32,), 49153)],
)  # fmt: skip
def test_launch_limits(grid, block, shared):
    with pytest.raises(PtxError, match=r"invalid configuration|shared memory"):
        kernel(ARGUMENTS, "f")(grid, block, (np.uintp(0), 3, np.float32(2)), shared_mem=shared)


def test_launch_bounds_hold():
    nothing = np.uintp(0)
    with pytest.raises(PtxError, match="takes 256 threads"):
        kernel(sound_sum(), "sums")((1,), (288,), (nothing, nothing, 0, nothing, nothing))


def test_a_compile_error_names_the_line():
    with pytest.raises(nvrtc.CompileError, match=r"cuda/thing\.cu\(12\): error"):
        kernel('#line 11 "cuda/thing.cu"\nextern "C" __global__ void f() {\n  nonsense();\n}', "f")


# ---- traffic -------------------------------------------------------------------------------------

STRIDED = r"""
extern "C" __global__ void strided(float* y, const float* x, long long n, long long step) {
    long long stride = gridDim.x * blockDim.x;
    #pragma unroll 1  // lanes that begin in the middle of a longer round would go apart
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        y[i] = x[i * step];
}"""


@pytest.mark.parametrize(("step", "offset"), [(1, 0), (1, 3), (4, 0), (7, 1), (9, 0)])
def test_traffic_equals_address_enumeration(step, offset):
    n, blocks, threads = 1000, 3, 64
    buffer = np.arange(n * step + offset + 64, dtype=np.float32)
    x = buffer[offset : offset + n * step]
    y = np.full(n, np.nan, np.float32)
    with counting() as launches:
        kernel(STRIDED, "strided")((blocks,), (threads,), (y, x, n, step))
    assert np.array_equal(y, x[::step])
    (launch,) = launches
    loads = {address: a for (address, _), a in zip(launch.memory, launch.loads, strict=True)}
    stores = {address: a for (address, _), a in zip(launch.memory, launch.stores, strict=True)}
    for access, base, stride in [
        (loads[x.ctypes.data], x.ctypes.data, 4 * step),
        (stores[y.ctypes.data], y.ctypes.data, 4),
    ]:
        i = np.arange(n)
        sector = (base + i * stride) // 32
        block = i // threads % blocks
        assert access.lanes == n
        assert access.bytes == 4 * n
        assert access.instructions == -(-n // 32)
        assert access.sectors == len(set(zip(i // 32, sector, strict=True)))
        assert access.block_sectors == len(set(zip(block, sector, strict=True)))
    assert not any(loads[y.ctypes.data])
    assert not any(stores[x.ctypes.data])
    assert sorted(launch.memory) == sorted((a.ctypes.data, a.nbytes) for a in (x, y))
