// What backward kernels do with dy: the part which the activation let through. Behind a ReLU that is
// read from the bits which forward wrote, or, without them, computed again from x. And what dx is made
// of, and the gradients of the parameters.
#pragma once
#include "numeric.cuh"
#include "geometry.cuh"

// The bits of a vector, that of its first element at V - 1. Bit i of the tensor is bit 7 - i % 8 of its
// byte; a vector of a ragged row may lie across two. What is above those bits means nothing.
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

// The bit of one element, set where there are none.
__device__ __forceinline__ unsigned load_bit(const unsigned char* relu_bits, const Slot& slot) {
  unsigned char none = 0xff;
  return load_or(slot.active, relu_bits, slot.offset / 8, none) >> (7 - slot.offset % 8);
}

// `bits` counts, all ones where there was no ReLU, unless y is computed again.
__device__ __forceinline__ bool passes(acc_t x, const Affine& affine, bool again, unsigned bits, int j) {
  return again ? affine.apply(x) > 0 : (bits >> (V - 1 - j) & 1u) != 0;
}

__device__ __forceinline__ acc_t passing(acc_t dy, acc_t x, const Affine& affine, bool again,
                                         unsigned bits, int j) {
  return passes(x, affine, again, bits, j) ? dy : acc_t(0);
}

// dy of a vector behind a ReLU, with x - high: one branch for all of its elements.
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

// dx = (dy - sum_dy * share - (x - mean) * invstd^2 * sum_dy_xmu * share) * invstd * weight, as
// (d + (x - high) * slope + offset) * scale.
struct Gradient {
  Affine affine;
  acc_t slope, offset;

  // The sums are functions: loads that go out together here cost registers.
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

// Adds to an array of the parameters' gradients, which may be null.
__device__ __forceinline__ void add_at(bool active, param_t* array, i64 c, double value) {
  store_at(active, array, c, load_or(active, array, c, param_t(0)) + static_cast<param_t>(value));
}
