// y = activation((x - mean) * invstd * weight + bias + residual), and the mask of y > 0 in the bit
// order of numpy.packbits over the C-ordered (N, C, L).
#include "memory.cuh"
#include "numeric.cuh"
#include "geometry.cuh"

#if RELU
// not fmax: that would turn NaN into 0
__device__ __forceinline__ acc_t activate(acc_t y) { return y < 0 ? 0 : y; }
#else
__device__ __forceinline__ acc_t activate(acc_t y) { return y; }
#endif

__device__ __forceinline__ unsigned bit_of(scalar_t y) { return widen(y) > 0 ? 1u : 0u; }

#if FLAT
// Where bytes of the mask and rows do not fit together: a thread owns eight values, wherever they
// lie, and no two threads meet in a byte.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
normalize(scalar_t* y, unsigned char* mask, const scalar_t* x, const scalar_t* residual,
          const double* mean, const double* invstd, const param_t* weight, const param_t* bias,
          i64 n, i64 c, i64 l, i64 span, i64 group, i64 fold) {
  const ChannelArrays arrays{mean, invstd, weight, bias};
  i64 size = n * c * l;
  i64 byte = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  unsigned bits = 0;
  for (int j = 0; j < 8; ++j) {
    i64 i = byte * 8 + j;
    bool active = i < size;
    Affine affine = Affine::of(arrays.load(active, i / l % c));
    acc_t value = affine.apply(widen(load_if(active, x + i)));
    if (RESIDUAL) value += widen(load_if(active, residual + i));
    scalar_t out;
    narrow(activate(value), out);
    store_if(active, y + i, out);
    bits = bits << 1 | (active ? bit_of(out) : 0u);
  }
  store_if(byte * 8 < size, mask + byte, static_cast<unsigned char>(bits));
}
#else

constexpr int UNROLL = RESIDUAL ? 2 : 4;

// A byte of the mask is eight values: of one vector, or of neighbouring lanes, whose first stores it.
__device__ __forceinline__ void store_mask(unsigned char* mask, const slot_t& slot,
                                           const Pack<scalar_t, V>& y) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) bits = bits << 1 | (slot.has(j) ? bit_of(y.v[j]) : 0u);
#pragma unroll
  for (int width = V; width < 8; width *= 2) {
    bits = bits << width | __shfl_down_sync(0xffffffffu, bits, width / V);
  }
  bool first = slot.active && slot.offset % 8 == 0;
  store_if(first, mask + slot.offset / 8, static_cast<unsigned char>(bits));
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
normalize(scalar_t* y, unsigned char* mask, const scalar_t* x, const scalar_t* residual,
          const double* mean, const double* invstd, const param_t* weight, const param_t* bias,
          i64 n, i64 c, i64 l, i64 span, i64 group, i64 fold) {
  const Shape shape{n, c, l, span, group, fold};
  const ChannelArrays arrays{mean, invstd, weight, bias};
  // backwards: what the reduction read last may still be in the cache
  Walk walk(shape, gridDim.x - 1 - blockIdx.x, gridDim.y - 1 - blockIdx.y, skew_of(x));
  __shared__ Affine table[MAX_GROUP];
  fill_table(table, walk, c, [&](bool active, i64 channel) {
    return Affine::of(arrays.load(active, channel));
  });
  Affine affine[Walk::CHANNELS];
  pick(affine, table, walk);

  for (i64 rounds = walk.rounds(UNROLL); rounds > 0; --rounds) {
    slot_t slot[UNROLL];
    Pack<scalar_t, V> pack[UNROLL], added[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      slot[u] = walk.next();
      pack[u] = load_slot(x, slot[u], shape.size());
      if (RESIDUAL) added[u] = load_slot(residual, slot[u], shape.size());
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        acc_t value = affine[Walk::CHANNELS == 1 ? 0 : j].apply(widen(pack[u].v[j]));
        if (RESIDUAL) value += widen(added[u].v[j]);
        narrow(activate(value), pack[u].v[j]);
      }
      store_slot(y, slot[u], pack[u]);
#if MASK
      store_mask(mask, slot[u], pack[u]);
#endif
    }
  }
}
#endif
