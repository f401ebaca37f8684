// As normalize.cuh, for shapes in which one byte of bits can belong to two rows: a thread owns eight
// consecutive values, of whatever rows, and so a whole byte.
#pragma once
#include "numeric.cuh"
#include "mask.cuh"

template <typename Load>
__device__ __forceinline__ void normalize_byte(scalar_t* y, unsigned char* relu_bits,
                                               const scalar_t* x, const scalar_t* residual,
                                               const unsigned char* mask, bool relu, i64 n, i64 c,
                                               i64 l, Load load) {
  i64 size = n * c * l;
  i64 byte = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  unsigned bits = 0;
  for (int j = 0; j < 8; ++j) {
    i64 i = byte * 8 + j;
    bool active = i < size;
    Affine affine = Affine::of(load(active, i));
    acc_t value = affine.apply(widen(load_if(active, x + i)));
    if (residual) value += widen(load_if(active, residual + i));
    scalar_t out;
    bool counts = is_valid(active, mask, i / l / c * l + i % l);
    narrow(counts ? activate(value, relu) : acc_t(0), out);
    store_if(active, y + i, out);
    bits = bits << 1 | (active ? bit_of(out) : 0u);
  }
  store_if(byte * 8 < size, relu_bits + byte, static_cast<unsigned char>(bits));
}
