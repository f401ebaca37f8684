// y of one block, and the bits of y > 0, in the bit order of numpy.packbits over the C-contiguous
// (N, C, L) tensor. `load(active, channel)` returns a channel's statistics and parameters.
#pragma once
#include "numeric.cuh"
#include "geometry.cuh"

// In ragged rows one byte of bits can belong to two rows: normalize_flat handles those.
constexpr bool OWNS_BYTES = !(Walk::RAGGED && Walk::CHANNELS == 1);

// A byte has the bits of eight values, of one vector or of adjacent lanes; the first lane stores it.
template <int WIDTH>
__device__ __forceinline__ void store_bits(unsigned char* relu_bits, const Slot& slot,
                                           const Pack<scalar_t, WIDTH>& y) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) bits = bits << 1 | (slot.active ? bit_of(y.v[j]) : 0u);
#pragma unroll
  for (int width = WIDTH; width < 8; width *= 2) {
    bits = bits << width | __shfl_down_sync(0xffffffffu, bits, width / WIDTH);
  }
  bool first = slot.active && slot.offset % 8 == 0;
  store_if(first, relu_bits + slot.offset / 8, static_cast<unsigned char>(bits));
}

template <typename Load>
__device__ __forceinline__ void normalize_tile(Walk& walk, scalar_t* y, unsigned char* relu_bits,
                                               const scalar_t* x, const scalar_t* residual,
                                               const unsigned char* mask, bool relu,
                                               const Shape& shape, Load load) {
  constexpr int UNROLL = PATCHY ? 1 : Walk::CHANNELS == 8 || (MASK_LOADS != UNMASKED && V == 8) ? 2 : 4;
  __shared__ Affine table[MAX_TILE_CHANNELS];
  Affine affine[Walk::CHANNELS];
  int adds = residual != nullptr, clips = relu, writes_bits = relu_bits != nullptr;
  keep_ready(adds);
  keep_ready(clips);
  keep_ready(writes_bits);
  bool first = true;
#pragma unroll 1
  do {
    Slot slot[UNROLL];
    Pack<scalar_t, V> pack[UNROLL], added[UNROLL];
    Valid valid[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) slot[u] = walk.next();
    load_slots(pack, x, slot);
    if (adds) load_slots(added, residual, slot);
    load_valid(valid, mask, slot, walk);
    if (first) {  // while the loads of the first vectors are in flight
      fill_table(table, walk, shape.c, [&](bool active, i64 channel) {
        return Affine::of(load(active, channel));
      });
      pick(affine, table, walk);
      first = false;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      acc_t values[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        values[j] = affine[Walk::CHANNELS == 1 ? 0 : j].apply(widen(pack[u].v[j]));
      }
      if (adds) {
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] += widen(added[u].v[j]);
      }
      if (clips) {
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] = activate(values[j], true);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) values[j] = valid[u][j] ? values[j] : acc_t(0);
      Pack<scalar_t, V> out = narrowed(values);
      store_pack_if<V>(slot[u].active, y + slot[u].offset, out);
      if (OWNS_BYTES && writes_bits) store_bits(relu_bits, slot[u], out);
    }
  } while (walk.left > 0);

  each_single(walk, [&](const Single& single) {
    const Slot& slot = single.slot;
    acc_t value = table[single.channel].apply(widen(load_if(slot.active, x + slot.offset)));
    value += widen(load_or(slot.active, residual, slot.offset, scalar_t{}));
    bool counts = is_valid(slot.active, mask, slot.position);
    Pack<scalar_t, 1> out;
    narrow(counts ? activate(value, relu) : acc_t(0), out.v[0]);
    store_if(slot.active, y + slot.offset, out.v[0]);
    if (OWNS_BYTES && relu_bits) store_bits(relu_bits, slot, out);
  });
}
