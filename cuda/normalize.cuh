// y of one block, and the mask of y > 0 in the bit order of numpy.packbits over the C-ordered
// (N, C, L). What the statistics of a channel are says `load(active, channel)`.
#pragma once
#include "numeric.cuh"
#include "geometry.cuh"

// Vectors across the ends of rows have two rows in one byte of the mask: that is for normalize_flat.
constexpr bool OWNS_BYTES = !(Walk::RAGGED && Walk::CHANNELS == 1);

// A byte of the mask is eight values: of one vector, or of neighbouring lanes, whose first stores it.
template <int WIDTH>
__device__ __forceinline__ void store_mask(unsigned char* mask, const Slot& slot,
                                           const Pack<scalar_t, WIDTH>& y) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) bits = bits << 1 | (slot.active ? bit_of(y.v[j]) : 0u);
#pragma unroll
  for (int width = WIDTH; width < 8; width *= 2) {
    bits = bits << width | __shfl_down_sync(0xffffffffu, bits, width / WIDTH);
  }
  bool first = slot.active && slot.offset % 8 == 0;
  store_if(first, mask + slot.offset / 8, static_cast<unsigned char>(bits));
}

template <int UNROLL, typename Load>
__device__ __forceinline__ void normalize_tile(Walk& walk, scalar_t* y, unsigned char* mask,
                                               const scalar_t* x, const scalar_t* residual,
                                               bool relu, const Shape& shape, Load load) {
  __shared__ Affine table[MAX_TILE_CHANNELS];
  fill_table(table, walk, shape.c, [&](bool active, i64 channel) {
    return Affine::of(load(active, channel));
  });
  Affine affine[Walk::CHANNELS];
  pick(affine, table, walk);

  while (walk.left > 0) {
    Slot slot[UNROLL];
    Pack<scalar_t, V> pack[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) slot[u] = walk.next();
    load_slots(pack, x, slot);
#pragma unroll
    for (int half = 0; half < UNROLL; half += UNROLL / 2) {
      Pack<scalar_t, V> added[UNROLL / 2] = {};
      if (residual) load_slots(added, residual, slot + half);
#pragma unroll
      for (int u = 0; u < UNROLL / 2; ++u) {
        Pack<scalar_t, V>& out = pack[half + u];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          acc_t value = affine[Walk::CHANNELS == 1 ? 0 : j].apply(widen(out.v[j]));
          if (residual) value += widen(added[u].v[j]);
          narrow(activate(value, relu), out.v[j]);
        }
        const Slot& to = slot[half + u];
        store_pack_if<V>(to.active, y + to.offset, out);
        if (OWNS_BYTES && mask) store_mask(mask, to, out);
      }
    }
  }

  each_single(walk, [&](const Single& single) {
    const Slot& slot = single.slot;
    acc_t value = table[single.channel].apply(widen(load_if(slot.active, x + slot.offset)));
    value += widen(load_or(slot.active, residual, slot.offset, scalar_t{}));
    Pack<scalar_t, 1> out;
    narrow(activate(value, relu), out.v[0]);
    store_if(slot.active, y + slot.offset, out.v[0]);
    if (OWNS_BYTES && mask) store_mask(mask, slot, out);
  });
}
