// For the backward kernels: the part of dy that passes the activation, the coefficients of dx, and the
// gradients of the parameters. What passes a ReLU is read from the bits that forward wrote, or, without
// bits, recomputed from x.
#pragma once
#include "numeric.cuh"
#include "geometry.cuh"

// The bits of a vector; its first element's is bit V - 1. Bit i of the tensor is bit 7 - i % 8 of its
// byte. A vector of a ragged row may span two bytes. Bits from V on are undefined.
__device__ __forceinline__ unsigned load_bits(const unsigned char* relu_bits, const Slot& slot) {
  i64 byte = slot.offset / 8;
  int begin = slot.offset % 8;
  unsigned bits = load_if(slot.active, relu_bits + byte);
  bits <<= 8;
  if (Walk::RAGGED && Walk::CHANNELS == 1) {
    bits |= load_if(slot.active && begin + V > 8, relu_bits + byte + 1);
  }
  return bits >> (16 - V - begin);
}

// Bit 0 is the bit of one element, and 1 if `relu_bits` is null.
__device__ __forceinline__ unsigned load_bit(const unsigned char* relu_bits, const Slot& slot) {
  unsigned char none = 0xff;
  return load_or(slot.active, relu_bits, slot.offset / 8, none) >> (7 - slot.offset % 8);
}

// Whether dy passes: with `again` by y recomputed from x, else by `bits` (all ones without a ReLU).
__device__ __forceinline__ bool passes(acc_t x, const Affine& affine, bool again, unsigned bits, int j) {
  return again ? affine.apply(x) > 0 : (bits >> (V - 1 - j) & 1u) != 0;
}

__device__ __forceinline__ acc_t passing(acc_t dy, acc_t x, const Affine& affine, bool again,
                                         unsigned bits, int j) {
  return passes(x, affine, again, bits, j) ? dy : acc_t(0);
}

// Applies the ReLU's backward to dy of a vector, given x - high. One branch serves all elements.
template <typename AffineOf>
__device__ __forceinline__ void pass(acc_t (&dy)[V], const acc_t (&deviation)[V], bool again,
                                     unsigned bits, AffineOf affine_of) {
  if (again) {
#pragma unroll
    for (int j = 0; j < V; ++j) dy[j] = affine_of(j).at(deviation[j]) > 0 ? dy[j] : acc_t(0);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) dy[j] = bits >> (V - 1 - j) & 1u ? dy[j] : acc_t(0);
  }
}

// dx = (dy - sum_dy * share - (x - mean) * invstd^2 * sum_dy_xmu * share) * invstd * weight,
// computed as (d + (x - high) * slope + offset) * scale.
struct Gradient {
  Affine affine;
  acc_t slope, offset;

  // The sums are functions, so that they are not loaded together: that would cost registers.
  template <typename Dy, typename DyXmu>
  static __device__ __forceinline__ Gradient of(const Channel& channel, Dy sum_dy, DyXmu sum_dy_xmu,
                                                double share) {
    Gradient gradient{Affine::of(channel), 0, 0};
    double slope = sum_dy_xmu() * channel.invstd * channel.invstd * share;
    double offset = Affine::low(channel.mean) * slope - sum_dy() * share;
    gradient.slope = static_cast<acc_t>(-slope);
    gradient.offset = static_cast<acc_t>(offset);
    return gradient;
  }
};

// Adds to dweight or dbias, either of which may be null.
__device__ __forceinline__ void add_at(bool active, param_t* array, i64 c, double value) {
  store_at(active, array, c, load_or(active, array, c, param_t(0)) + static_cast<param_t>(value));
}
