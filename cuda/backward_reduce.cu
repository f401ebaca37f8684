// The sums of dy and dy * (x - mean) per channel, after the activation's backward: this rank's sums, and
// a copy of them in the message. One launch: a channel's last slice adds the partial sums.
#include "memory.cuh"
#include "numeric.cuh"
#include "geometry.cuh"
#include "reduce.cuh"
#include "backward.cuh"

extern "C" __global__ void __launch_bounds__(MAX_THREADS, SUMMING_BLOCKS)
backward_reduce(double* sum_dy, double* sum_dy_xmu, double* message_dy, double* message_dy_xmu,
                double* partials, unsigned* counters, const scalar_t* dy, const scalar_t* x,
                const unsigned char* relu_bits, const double* mean, const double* invstd,
                const param_t* weight, const param_t* bias,
                MASKED(const unsigned char* mask,) i64 relu, i64 n, i64 c, i64 l,
                i64 slice_length, i64 tile_channels, i64 line_samples, i64 group_slices) {
  constexpr int UNROLL = PATCHY ? 1 : 2;
  const Shape shape{n, c, l, slice_length, tile_channels, line_samples};
  const bool stored = relu && relu_bits, again = relu && !relu_bits;
  const Parameters parameters{again ? weight : nullptr, again ? bias : nullptr};
  Walk walk(shape, blockIdx.x, blockIdx.y, misalignment_of(x));
  __shared__ Affine table[MAX_TILE_CHANNELS];
  Affine affine[Walk::CHANNELS];
  acc_t of_dy[V] = {}, of_dy_xmu[V] = {};
  auto affine_of = [&](int j) { return affine[Walk::CHANNELS == 1 ? 0 : j]; };
  bool first = true;
#pragma unroll 1
  do {
    Slot slot[UNROLL];
    Pack<scalar_t, V> pack_x[UNROLL], pack_dy[UNROLL];
    unsigned bits[UNROLL];
    Valid valid[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) slot[u] = walk.next();
    load_slots(pack_x, x, slot);
    load_slots(pack_dy, dy, slot);
    load_valid(valid, mask, slot, walk);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) bits[u] = stored ? load_bits(relu_bits, slot[u]) : ~0u;
    if (first) {  // while the loads of the first vectors are in flight
      fill_table(table, walk, c, [&](bool active, i64 channel) {
        Channel own{load_if(active, mean + channel), load_if(active && again, invstd + channel), 1,
                    0};
        parameters.load(active, channel, own);
        return Affine::of(own);
      });
      pick(affine, table, walk);
      first = false;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (!slot[u].active) continue;
      acc_t deviation[V], d[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        deviation[j] = (valid[u][j] ? widen(pack_x[u].v[j]) : acc_t(0)) - affine_of(j).high;
        d[j] = valid[u][j] ? widen(pack_dy[u].v[j]) : acc_t(0);
      }
      if (relu) pass(d, deviation, again, bits[u], affine_of);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        of_dy[j] += d[j];
        of_dy_xmu[j] = fused(d[j], deviation[j], of_dy_xmu[j]);
      }
    }
  } while (walk.left > 0);

  Pair pairs[Walk::CHANNELS];
  constexpr bool rows = Walk::CHANNELS == 1;
#pragma unroll
  for (int j = 0; j < Walk::CHANNELS; ++j) {
    pairs[j] = {rows ? total(of_dy) : of_dy[j], rows ? total(of_dy_xmu) : of_dy_xmu[j]};
  }
  auto pair_of = [&](const Single& single) {
    const Slot& slot = single.slot;
    const Affine& own = table[single.channel];
    bool counts = is_valid(slot.active, mask, slot.position);
    acc_t value = widen(load_if(slot.active, x + slot.offset));
    unsigned bits = load_bit(stored ? relu_bits : nullptr, slot);
    acc_t d = passing(widen(load_if(slot.active, dy + slot.offset)), value, own, again, bits, V - 1);
    if (!counts) return Pair{0, 0};
    return Pair{d, static_cast<double>(d) * (value - own.high)};
  };
  reduce_tile(pairs, walk, shape, Scratch{partials, counters, group_slices}, pair_of,
              [&](bool active, i64 channel, Pair sums) {
    double low = Affine::low(load_if(active, mean + channel));
    double about_mean = sums.b - low * sums.a;
    store_if(active, sum_dy + channel, sums.a);
    store_if(active, sum_dy_xmu + channel, about_mean);
    store_at(active, message_dy, channel, sums.a);
    store_at(active, message_dy_xmu, channel, about_mean);
  });
}
