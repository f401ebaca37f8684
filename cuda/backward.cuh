// What both backward kernels do with dy: the part which the activation let through. Behind a ReLU
// that is read from the bits which forward wrote, or, without a mask, computed again from x.
#pragma once
#include "numeric.cuh"
#include "geometry.cuh"

// The bits of one vector, element 0 the highest of V. They may lie across two bytes.
__device__ __forceinline__ unsigned load_mask(const unsigned char* mask, const slot_t& slot) {
  i64 begin = slot.offset + slot.first(), end = slot.offset + slot.last() - 1;
  unsigned high = load_if(slot.active, mask + begin / 8);
  unsigned low = high;
  if (slot_t::ragged) {
    bool two = slot.active && begin / 8 != end / 8;
    unsigned next = load_if(two, mask + end / 8);
    if (two) low = next;
  }
  // bit i of the tensor is bit 7 - i % 8 of its byte
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    i64 i = slot.offset + j;
    unsigned byte = !slot_t::ragged || i / 8 == begin / 8 ? high : low;
    bits = bits << 1 | (byte >> (7 - (i & 7)) & 1u);
  }
  return bits;
}

// `bits` counts, all ones where there was no ReLU, unless y is computed again.
__device__ __forceinline__ acc_t passing(acc_t dy, acc_t x, const Affine& affine, bool again,
                                         unsigned bits, int j) {
  bool kept = again ? affine.apply(x) > 0 : (bits >> (V - 1 - j) & 1u) != 0;
  return kept ? dy : acc_t(0);
}
