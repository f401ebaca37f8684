"""The host build itself: CUDA's words mean what they should, and planted faults are found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cuda_tools import need
from hostcuda.build import HostKernelError, host_module, missing, sanitized, seed
from hostcuda.toolchain import CompileError
from hostcuda.traffic import counting

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

HERE = Path(__file__).resolve().parent
VARIANTS = ["plain", "shuffle", "count", "portable"]
C_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}


@pytest.fixture(autouse=True)
def _tools():
    need(missing())


def test_without_tools_tests_skip_or_fail(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert missing.__wrapped__() == "no g++"
    monkeypatch.delenv("CUPYBN_REQUIRE_CUDA_TOOLS", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no g\+\+"):
        need("no g++")
    monkeypatch.setenv("CUPYBN_REQUIRE_CUDA_TOOLS", "1")
    with pytest.raises(pytest.fail.Exception, match=r"no g\+\+"):
        need("no g++")
    need(None)


def kernel(source: str, name: str, variant: str | None = "plain"):
    return host_module(source, [name], variant=variant).get_function(name)


def sums(c_type: str, variant: str = "plain"):
    return kernel(SUM.replace("LAST_BARRIER", "__syncthreads();"), f"sums<{c_type}>", variant)


def line_of(text: str) -> int:
    """Of the planted faults: FAULTS starts with the directive that numbers the next line 1."""
    return FAULTS[: FAULTS.index(text)].count("\n")


def dtype_named(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(bfloat16 or pytest.skip("no ml_dtypes"))
    return np.dtype(name)


SUM = r"""
template <class T> __device__ T warp_sum(T v) {
    for (int bits = 16; bits; bits >>= 1) v += __shfl_xor_sync(~0u, v, bits);
    return v;
}
template <class T> __device__ T block_sum(T v) {
    __shared__ T part[32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : T(0);
    if (threadIdx.x < 32) v = warp_sum(v);
    LAST_BARRIER
    return v;
}
template <class T>
__global__ void __launch_bounds__(256) sums(double* out, const T* x, long long n, double* partial,
                                            unsigned* counter) {
    double sum = 0;
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        sum += float(x[i]);
    sum = block_sum(sum);
    __shared__ bool last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence();
        last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    sum = block_sum(threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0.0);
    if (threadIdx.x == 0) *out = sum;
}
"""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", C_TYPES)
def test_reduction(dtype, variant):
    """Shuffles, shared memory, and a last block that adds the partials and resets the counter."""
    x = np.random.default_rng(0).standard_normal(5003).astype(dtype_named(dtype))
    run = sums(C_TYPES[dtype], variant)
    out, partial, counter = np.full(1, np.nan), np.full(7, np.nan), np.zeros(1, np.uint32)
    results = []
    for _ in range(2):
        run((7,), (128,), (out, x, np.int64(x.size), partial, counter))
        results.append(out[0])
    assert results[0] == results[1]
    assert counter[0] == 0
    assert results[0] == pytest.approx(x.astype(np.float64).sum(), abs=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_round_as_numpy(dtype):
    """Conversions to the bit, denormals, infinities and NaN included."""
    to = dtype_named(dtype)
    half = C_TYPES[dtype]
    source = f"""
    extern "C" __global__ void rounded(unsigned short* bits, float* back, const float* x, int n) {{
        for (int i = threadIdx.x; i < n; i += blockDim.x) {{
            {half} h = x[i];
            bits[i] = *(unsigned short*)&h;
            back[i] = float(h * {half}(2.0f) + h);
        }}
    }}"""
    random = np.random.default_rng(1)
    x = random.integers(0, 2**32, 20000, np.uint32).view(np.float32)
    small = random.standard_normal(5000) * 2.0 ** random.integers(-26, 16, 5000)
    x = np.concatenate([x, small.astype(np.float32), np.float32([0, -0.0, np.inf, -np.inf])])
    bits, back = np.zeros(x.size, np.uint16), np.zeros(x.size, np.float32)
    kernel(source, "rounded")((1,), (64,), (bits, back, x, np.int32(x.size)))
    with np.errstate(all="ignore"):
        want = x.astype(to)
        numbers = ~np.isnan(x)
        assert np.array_equal(bits[numbers], want.view(np.uint16)[numbers])
        assert np.isnan(bits.view(to)[~numbers].astype(np.float32)).all()
        assert np.array_equal(back, (want * to.type(2) + want).astype(np.float32), equal_nan=True)


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
    out[0] = __ballot_sync(~0u, odd);
    out[1] = __any_sync(~0u, 0) + 2 * __any_sync(~0u, odd);
    out[2] = __all_sync(~0u, 1) + 2 * __all_sync(~0u, odd);
    unsigned mine = __ballot_sync(half, threadIdx.x % 32 > 11);
    if (threadIdx.x % 32 == 0) out[3] = mine;
    out[4] = __syncthreads_count(odd);
    out[5] = __syncthreads_or(threadIdx.x == 70) + 2 * __syncthreads_or(0);
    out[6] = __syncthreads_and(1) + 2 * __syncthreads_and(threadIdx.x != 70);
}
extern "C" __global__ void indices(int* out) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = 1000 * block + thread;
}
"""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("width", [32, 8])
def test_shuffle(width, variant):
    out = np.full((64, 4), -1, np.int32)
    kernel(SHUFFLES, "shuffles", variant)((1,), (64,), (out, np.int32(width)))
    me = np.arange(64)
    first, last = me // width * width, me // width * width + width - 1
    want = [
        first + (me + 3) % width,
        np.where(me ^ 5 <= last, me ^ 5, me),
        np.where(me + 3 <= last, me + 3, me),
        np.where(me - 3 >= first, me - 3, me),
    ]
    assert np.array_equal(out, np.stack(want, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_votes(variant):
    out = np.zeros(7, np.uint32)
    kernel(SHUFFLES, "votes", variant)((1,), (96,), (out,))
    assert [hex(v) for v in out] == [hex(v) for v in (0xAAAAAAAA, 2, 1, 0xF000, 48, 1, 1)]


def test_indices():
    out = np.full(2 * 3 * 2 * 60, -1, np.int32)
    kernel(SHUFFLES, "indices")((2, 3, 2), (5, 4, 3), (out,))
    assert np.array_equal(out, np.add.outer(1000 * np.arange(12), np.arange(60)).ravel())


MEMORY = r"""
struct Pair { float a; int b; };
extern "C" __global__ void fresh(float* out, Pair pair) {
    __shared__ float fixed[4];
    extern __shared__ __align__(16) float chosen[];
    float before = fixed[0] + chosen[0];
    __syncthreads();
    fixed[0] = chosen[0] = pair.a;
    if (threadIdx.x == 0) out[blockIdx.x] = before;
    if (threadIdx.x == 0) out[gridDim.x + blockIdx.x] = pair.b;
}
"""


def test_shared_memory_starts_as_nan_in_every_block():
    out = np.zeros(6, np.float32)
    pair = np.array((1.5, 7), [("a", np.float32), ("b", np.int32)])[()]
    kernel(MEMORY, "fresh")((3,), (32,), (out, pair), shared_mem=64)
    assert np.isnan(out[:3]).all()
    assert np.array_equal(out[3:], [7, 7, 7])


ARGUMENTS = r'extern "C" __global__ void f(float* y, long long n, float a) { if (y) y[0] = n * a; }'


def test_arguments_are_checked():
    run = kernel(ARGUMENTS, "f")
    y = np.zeros(1, np.float32)
    run((1,), (1,), (y, np.int64(3), np.float32(0.5)))
    assert y[0] == 1.5
    run((1,), (1,), (np.uintp(0), 3, np.float32(2)))
    run((1,), (1,), (y.ctypes.data, 3, np.float32(2)))
    assert y[0] == 6
    for wrong in [(y, np.int32(3), np.float32(2)), (y, 3, 2.0), (y, 3), (np.int32(0), 3, y)]:
        with pytest.raises(TypeError, match="f"):
            run((1,), (1,), wrong)


@pytest.mark.parametrize(
    ("grid", "block", "shared"),
    [((0,), (32,), 0), ((1, 65536), (32,), 0), ((1,), (1025,), 0), ((1,), (64, 32), 0),
     ((1,), (32,), 49153)],
)  # fmt: skip
def test_launch_limits(grid, block, shared):
    with pytest.raises(HostKernelError, match=r"invalid configuration|shared memory"):
        kernel(ARGUMENTS, "f")(grid, block, (np.uintp(0), 3, np.float32(2)), shared_mem=shared)


def test_compile_error_names_the_line():
    with pytest.raises(CompileError, match=r"cuda/thing\.cu:12:\d+: error"):
        kernel('#line 11 "cuda/thing.cu"\nextern "C" __global__ void f() {\n  nonsense();\n}', "f")


def test_launches_from_threads_take_turns():
    """Ranks that are threads share the scheduler and the static shared memory."""
    run = sums("float")
    outs = np.full((4, 1), np.nan)

    def work(rank: int) -> None:
        x, partial = np.full(1000, rank, np.float32), np.zeros(20)
        for _ in range(20):
            run((20,), (64,), (outs[rank], x, 1000, partial, np.zeros(1, np.uint32)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(outs[:, 0], np.arange(4) * 1000)


# --- planted faults --------------------------------------------------------------------------

FAULTS = r"""#line 1 "faults.cu"
extern "C" __global__ void ended(float* y) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    y[0] = 1;
}
extern "C" __global__ void branches(float* y) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}
extern "C" __global__ void some_lanes(float* y) {
    if (threadIdx.x % 32 < 4) y[0] = __shfl_xor_sync(~0u, 1.0f, 1);
    __syncwarp();
}
extern "C" __global__ void outside_mask(float* y) { __syncwarp(1u); }
extern "C" __global__ void past_end(float* y, int n) {
    y[n + threadIdx.x] = 0;
}
template <class T> __device__ void fill(T* y, int n) {
    __shared__ T some[64];
    T* p = some + (threadIdx.x > 1000);
    asm volatile("" : "+r"(p));
    p[n] = 1;
    y[0] = p[0];
}
extern "C" __global__ void past_shared(float* y, int n) { fill(y, n); }
extern "C" __global__ void past_dynamic(float* y, int n) {
    extern __shared__ float some[];
    some[n] = 1;
}
extern "C" __global__ void crooked(float* y, int n) {
    *(float4*)(y + n) = float4{1, 2, 3, 4};
}
extern "C" __global__ void calls_less(float* y) {
    if (threadIdx.x != 5) cupybn_host_access(y, 4, true, false);
}
extern "C" __global__ void misaligned(float* y) {
    cupybn_host_access(y + threadIdx.x / 40, 16, false, true);
}
extern "C" __global__ void calls_crossed(float* y, const float* x) {
    cupybn_host_access(threadIdx.x % 2 ? x : y, 4, false, true);
}
"""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ended", r"divergent barrier in kernel ended, block \([01],0,0\); thread \(0,0,0\) of "
                  r"warp 0, lane 0: __syncthreads at faults.cu:3; thread \(40,0,0\) of warp 1"),
        ("branches", r"divergent barrier .* at faults.cu:\d+; .* at faults.cu:\d+"),
        ("some_lanes", r"divergent warp operation .* __shfl_xor_sync at faults.cu:\d+ for mask"),
        ("outside_mask", r"a lane outside its own mask in kernel outside_mask"),
        ("misaligned", r"misaligned access .* block \([01],0,0\); thread \(\d+,0,0\) of warp 1"),
    ],
)  # fmt: skip
def test_planted_fault_is_named(name, message, variant):
    y = np.zeros(128, np.float32)
    y = y[-y.ctypes.data % 256 // 4 :]
    with pytest.raises(HostKernelError, match=message):
        kernel(FAULTS, name, variant)((2,), (64,), (y,))
    out = np.full((64, 4), -1, np.int32)
    kernel(SHUFFLES, "shuffles", variant)((1,), (64,), (out, np.int32(32)))  # all is well again
    assert (out >= 0).all()


THRICE = r"""
extern "C" __global__ void thrice(double* out) {
    double a = block_sum(double(threadIdx.x)), b = block_sum(1.0), c = block_sum(2.0);
    if (threadIdx.x == 0) out[0] = a, out[1] = b, out[2] = c;
}
"""


def _sums_with(barrier: str, first_seed: int, variant: str) -> list[bool]:
    """Whether `block_sum` called three times in a row is right, for some seeds."""
    source = SUM.replace("LAST_BARRIER", barrier) + THRICE
    run = kernel(source, "thrice", variant)
    seed(first_seed)
    right = []
    for _ in range(10):
        out = np.full(3, np.nan)
        run((1,), (128,), (out,))
        right.append(out.tolist() == [128 * 127 / 2, 128, 256])
    return right


def test_planted_missing_barrier_shows_in_shuffled_order():
    assert all(_sums_with("", 0, "plain"))  # in order nothing is wrong: that is why one shuffles
    assert not all(_sums_with("", 0, "shuffle"))
    assert all(_sums_with("__syncthreads();", 0, "shuffle"))


def test_shuffled_order_follows_the_seed():
    assert _sums_with("", 5, "shuffle") == _sums_with("", 5, "shuffle")


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("past_end", 90, ("heap-buffer-overflow", "WRITE of size 4", "y[n + threadIdx.x]")),
        ("past_shared", 64, ("global-buffer-overflow", "WRITE of size 4", "p[n] = 1")),
        ("past_dynamic", 16, ("heap-buffer-overflow", "WRITE of size 4", "some[n] = 1")),
        ("crooked", 1, ("misaligned address", "requires 16 byte alignment", "*(float4*)")),
        (None, 1, ()),
    ],
)
def test_planted_bad_access_is_reported_at_its_line(name, n, message):
    code = f"""
import numpy as np
from test_hostcuda import FAULTS, SHUFFLES, host_module
names = {["past_end", "past_shared", "past_dynamic", "crooked"]}
faults = host_module(FAULTS, names)
shuffles = host_module(SHUFFLES, ["shuffles", "votes"])
shuffles.get_function("shuffles")((4,), (64,), (np.zeros((64, 4), np.int32), np.int32(32)))
shuffles.get_function("votes")((4,), (64,), (np.zeros(7, np.uint32),))
y = np.zeros(100, np.float32)
if {name!r}:
    faults.get_function({name!r})((1,), (32,), (y, np.int32({n})), shared_mem=64)
"""
    env = sanitized() | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == (name is None), done.stderr
    if name:
        *words, fault = message
        for text in [*words, f"faults.cu:{line_of(fault)}"]:
            assert text in done.stderr


# --- traffic ---------------------------------------------------------------------------------

STRIDED = r"""
extern "C" __global__ void strided(float* y, const float* x, long long n, long long step) {
    for (long long i0 = blockIdx.x * blockDim.x; i0 < n; i0 += gridDim.x * blockDim.x) {
        long long i = i0 + threadIdx.x;
        bool on = i < n;
        cupybn_host_access(x + i * step, 4, false, on);
        float v = on ? x[i * step] : 0;
        cupybn_host_access(y + i, 4, true, on);
        if (on) y[i] = v;
    }
}"""


@pytest.mark.parametrize(("step", "offset"), [(1, 0), (1, 3), (4, 0), (7, 1), (9, 0)])
def test_traffic_equals_address_enumeration(step, offset):
    n, blocks, threads = 1000, 3, 64
    buffer = np.arange(n * step + offset + 64, dtype=np.float32)
    x = buffer[offset : offset + n * step]
    y = np.full(n, np.nan, np.float32)
    with counting() as launches:
        kernel(STRIDED, "strided", "count")((blocks,), (threads,), (y, x, n, step))
    assert np.array_equal(y, x[::step])
    (launch,) = launches
    for access, base, stride in [
        (launch.loads[1], x.ctypes.data, 4 * step),
        (launch.stores[0], y.ctypes.data, 4),
    ]:
        i = np.arange(n)
        sector = (base + i * stride) // 32
        block = i // threads % blocks
        assert access.lanes == n
        assert access.bytes == 4 * n
        assert access.instructions == -(-n // 32)
        assert access.sectors == len(set(zip(i // 32, sector, strict=True)))
        assert access.block_sectors == len(set(zip(block, sector, strict=True)))
    rest = [*launch.loads[:1], *launch.loads[2:], *launch.stores[1:]]
    assert not any(any(access) for access in rest)
    addresses = [y.ctypes.data, x.ctypes.data]
    assert launch.memory == [*zip(addresses, [y.nbytes, x.nbytes], strict=True), (0, 0), (0, 0)]


def test_traffic_refuses_lanes_out_of_step():
    y, x = np.zeros(4, np.float32), np.zeros(4, np.float32)
    with pytest.raises(HostKernelError, match=r"differ in how often.* store 4 bytes: 1 and 0"):
        kernel(FAULTS, "calls_less", "count")((1,), (32,), (y,))
    with pytest.raises(HostKernelError, match="different arrays at once"):
        kernel(FAULTS, "calls_crossed", "count")((1,), (32,), (y, x))
