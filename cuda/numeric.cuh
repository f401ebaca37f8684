// Storage and arithmetic types, and the per-channel coefficients. SCALAR is the storage type. Arithmetic
// and parameters are float, or double for double data. Statistics are double.
#pragma once
#include "memory.cuh"

// NVIDIA's headers have these types too, but with all their arithmetic take 10 to 20 ms to compile.
struct float16 {
  unsigned short bits;

  __device__ __forceinline__ operator float() const {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
  }
};

struct bfloat16 {
  unsigned short bits;

  __device__ __forceinline__ operator float() const {
    float wide;
    asm("mov.b32 %0, {0, %1};" : "=f"(wide) : "h"(bits));
    return wide;
  }
};

using scalar_t = SCALAR;

template <typename T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
using acc_t = Accumulate<scalar_t>::type;
using param_t = acc_t;

__device__ __forceinline__ acc_t widen(scalar_t v) { return static_cast<acc_t>(v); }

// Round to nearest even.
__device__ __forceinline__ void narrow(float v, float& out) { out = v; }
__device__ __forceinline__ void narrow(double v, double& out) { out = v; }

__device__ __forceinline__ void narrow(float v, float16& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
}

__device__ __forceinline__ void narrow(float v, bfloat16& out) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#else
  unsigned bits = __float_as_uint(v);
  bits += 0x7fff + (bits >> 16 & 1);  // half of the last kept bit, less 1 if that bit is 0: ties go to even
  out.bits = v != v ? 0x7fff : bits >> 16;
#endif
}

// Two adjacent elements at once, in one instruction where the architecture has it.
template <typename T> __device__ __forceinline__ void narrow(acc_t v, acc_t w, T* pair) {
  narrow(v, pair[0]);
  narrow(w, pair[1]);
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void narrow(float v, float w, float16* pair) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(w), "f"(v));
  memcpy(pair, &both, sizeof(both));
}

__device__ __forceinline__ void narrow(float v, float w, bfloat16* pair) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(w), "f"(v));
  memcpy(pair, &both, sizeof(both));
}
#endif

template <int N> __device__ __forceinline__ Pack<scalar_t, N> narrowed(const acc_t (&values)[N]) {
  Pack<scalar_t, N> pack;
#pragma unroll
  for (int j = 0; j + 1 < N; j += 2) narrow(values[j], values[j + 1], pack.v + j);
  if (N % 2) narrow(values[N - 1], pack.v[N - 1]);
  return pack;
}

// Adds up a thread's sums, pairwise. Not in double, which some devices add 64 times as slowly: each sum
// has few values and is as exact as these.
template <int N> __device__ __forceinline__ acc_t total(const acc_t (&values)[N]) {
  acc_t sums[N];
#pragma unroll
  for (int j = 0; j < N; ++j) sums[j] = values[j];
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// not fmax, which would turn NaN into 0
__device__ __forceinline__ acc_t activate(acc_t y, bool relu) { return relu && y < 0 ? 0 : y; }

// One of the ReLU bits.
__device__ __forceinline__ unsigned bit_of(scalar_t y) { return widen(y) > 0 ? 1u : 0u; }

// The statistics and parameters of one channel.
struct Channel {
  double mean, invstd, weight, bias;
};

struct Parameters {
  const param_t* weight;  // null: 1
  const param_t* bias;    // null: 0

  __device__ __forceinline__ void load(bool active, i64 c, Channel& channel) const {
    channel.weight = load_or(active, weight, c, param_t(1));
    channel.bias = load_or(active, bias, c, param_t(0));
  }
};

struct ChannelArrays {
  const double* mean;
  const double* invstd;
  Parameters parameters;

  __device__ __forceinline__ Channel load(bool active, i64 c) const {
    Channel channel{load_if(active, mean + c), load_if(active, invstd + c), 1, 0};
    parameters.load(active, c, channel);
    return channel;
  }
};

// (x - mean) * invstd * weight + bias, computed as (x - high) * scale + shift. `high` is the mean rounded
// to acc_t. The remainder goes into `shift`, in double, so that no digit of the mean is lost.
struct Affine {
  acc_t high, scale, shift;

  static __device__ __forceinline__ double low(double mean) {
    return mean - static_cast<double>(static_cast<acc_t>(mean));
  }

  static __device__ __forceinline__ Affine of(const Channel& channel) {
    double scale = channel.invstd * channel.weight;
    return {static_cast<acc_t>(channel.mean), static_cast<acc_t>(scale),
            static_cast<acc_t>(channel.bias - low(channel.mean) * scale)};
  }

  __device__ __forceinline__ acc_t apply(acc_t x) const { return at(x - high); }
  __device__ __forceinline__ acc_t at(acc_t deviation) const { return fused(deviation, scale, shift); }
};
