// CUDA C++ as g++ reads it: put in front of a kernel's text by build.py.
//
// NVIDIA's own headers come first: their half types work on the host, and they would trip over
// the words redefined below. Only what the kernels use stands here; a missing word is a compile
// error, never a silent difference.
#pragma once
#include <algorithm>
#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "runtime.h"

#undef __global__
#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __shared__ static  // build.py adds the poison, and gives `extern __shared__` its memory
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (hostcuda::current->index)
#define blockIdx hostcuda::block_index
#define blockDim hostcuda::block_size
#define gridDim hostcuda::grid_size
constexpr int warpSize = hostcuda::WARP;

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// Where a kernel waits is part of the message when it hangs, hence the file and line.
#define HOSTCUDA_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(HOSTCUDA_HERE) { hostcuda::barrier(false, "__syncthreads", file, line); }
inline int __syncthreads_or(int p, HOSTCUDA_HERE) {
    return hostcuda::barrier(p, "__syncthreads_or", file, line) != 0;
}
inline int __syncthreads_and(int p, HOSTCUDA_HERE) {
    return hostcuda::barrier(p, "__syncthreads_and", file, line) == hostcuda::thread_count;
}
inline int __syncthreads_count(int p, HOSTCUDA_HERE) {
    return hostcuda::barrier(p, "__syncthreads_count", file, line);
}
inline void __syncwarp(unsigned mask = ~0u, HOSTCUDA_HERE) {
    hostcuda::warp_operation(mask, 0, "__syncwarp", file, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, HOSTCUDA_HERE) {
    return hostcuda::ballot(mask, p, "__ballot_sync", file, line);
}
inline int __any_sync(unsigned mask, int p, HOSTCUDA_HERE) {
    return hostcuda::ballot(mask, p, "__any_sync", file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, HOSTCUDA_HERE) {
    return hostcuda::ballot(mask, !p, "__all_sync", file, line) == 0;
}

// A lane whose source lies outside its segment of `width` lanes keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = warpSize, HOSTCUDA_HERE) {
    int from = (hostcuda::current->lane & -width) | (source & (width - 1));
    return hostcuda::exchange(mask, v, from, "__shfl_sync", file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = warpSize, HOSTCUDA_HERE) {
    int lane = hostcuda::current->lane, from = lane ^ bits;
    if (from > (lane | (width - 1))) from = lane;
    return hostcuda::exchange(mask, v, from, "__shfl_xor_sync", file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = warpSize, HOSTCUDA_HERE) {
    int lane = hostcuda::current->lane, from = lane + (int)delta;
    if (from > (lane | (width - 1))) from = lane;
    return hostcuda::exchange(mask, v, from, "__shfl_down_sync", file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = warpSize, HOSTCUDA_HERE) {
    int lane = hostcuda::current->lane, from = lane - (int)delta;
    if (from < (lane & -width)) from = lane;
    return hostcuda::exchange(mask, v, from, "__shfl_up_sync", file, line);
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __trap() { hostcuda::fail("__trap()"); }

// Integers only, on purpose: float atomics add in an order that changes from run to run.
template <class T, class U>
T atomicAdd(T* p, U v) {
    static_assert(std::is_integral_v<T>, "no float atomics");
    T old = *p;
    *p = old + (T)v;
    return old;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
    unsigned old = *p;
    *p = old >= limit ? 0 : old + 1;
    return old;
}
template <class T>
T atomicExch(T* p, T v) {
    static_assert(std::is_integral_v<T>, "no float atomics");
    std::swap(*p, v);
    return v;
}
template <class T, class U>
T atomicCAS(T* p, U compare, U v) {
    T old = *p;
    if (old == (T)compare) *p = (T)v;
    return old;
}

#define HOSTCUDA_LOAD(name) \
    template <class T> T name(const T* p) { return *p; }
HOSTCUDA_LOAD(__ldg) HOSTCUDA_LOAD(__ldcs) HOSTCUDA_LOAD(__ldcg) HOSTCUDA_LOAD(__ldca)
HOSTCUDA_LOAD(__ldlu) HOSTCUDA_LOAD(__ldcv)
#define HOSTCUDA_STORE(name) \
    template <class T> void name(T* p, T v) { *p = v; }
HOSTCUDA_STORE(__stcs) HOSTCUDA_STORE(__stcg) HOSTCUDA_STORE(__stwb) HOSTCUDA_STORE(__stwt)

inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
inline double rsqrt(double a) { return 1 / std::sqrt(a); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a ? __builtin_clz((unsigned)a) : 32; }
template <class To, class From>
To hostcuda_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float a) { return hostcuda_bits<unsigned>(a); }
inline int __float_as_int(float a) { return hostcuda_bits<int>(a); }
inline float __uint_as_float(unsigned a) { return hostcuda_bits<float>(a); }
inline float __int_as_float(int a) { return hostcuda_bits<float>(a); }
inline long long __double_as_longlong(double a) { return hostcuda_bits<long long>(a); }
inline double __longlong_as_double(long long a) { return hostcuda_bits<double>(a); }

// The hook of cuda/memory.cuh: every lane of a warp calls it equally often, `active` or not.
// What is misaligned fails here, since an x86 would do it: a GPU does not.
inline void cupybn_host_access(const void* address, int bytes, bool store, bool active) {
    if (active && (uintptr_t)address % bytes) hostcuda::fail("misaligned access");
#ifdef HOSTCUDA_COUNT
    hostcuda::count_access(address, bytes, store, active);
#endif
}
