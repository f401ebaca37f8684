// What both backward kernels do with dy: the part which the activation let through. Behind a ReLU
// that is read from the bits which forward wrote, or, without a mask, computed again from x.
#pragma once
#include "numeric.cuh"
#include "geometry.cuh"

// The bits of one vector, that of element 0 at V - 1. Bit i of the tensor is bit 7 - i % 8 of its byte;
// the vector may lie across two. What is above those V bits means nothing.
__device__ __forceinline__ unsigned load_mask(const unsigned char* mask, const slot_t& slot) {
  i64 byte = slot.offset >> 3;  // rounds down where element 0 lies before the tensor
  int begin = slot.offset & 7;
  unsigned bits = load_if(slot.active && begin + slot.first() < 8, mask + byte);
  bits <<= 8;
  if (slot_t::ragged) bits |= load_if(slot.active && begin + slot.last() > 8, mask + byte + 1);
  return bits >> (16 - V - begin);
}

// `bits` counts, all ones where there was no ReLU, unless y is computed again.
__device__ __forceinline__ acc_t passing(acc_t dy, acc_t x, const Affine& affine, bool again,
                                         unsigned bits, int j) {
  bool kept = again ? affine.apply(x) > 0 : (bits >> (V - 1 - j) & 1u) != 0;
  return kept ? dy : acc_t(0);
}
