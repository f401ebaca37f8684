// Mean and m2 per channel, and the sums for the message; with one rank, which waits for no message, the
// statistics of the batch. One launch: a channel's last slice adds the partial sums.
#include "memory.cuh"
#include "numeric.cuh"
#include "geometry.cuh"
#include "reduce.cuh"
#include "moments.cuh"
#include "masked_moments.cuh"
#include "finalize.cuh"

// A message has `weighted`, count * mean, and `about_zero`, m2 + count * mean^2 (float64 data: `weighted`
// only). Either may be null. If `invstd` is given, the statistics are final and `m2` is null.
extern "C" __global__ void __launch_bounds__(MAX_THREADS, SUMMING_BLOCKS)
batch_moments(double* mean, double* m2, double* weighted, double* about_zero, double* invstd,
              param_t* running_mean, param_t* running_var, double* partials, unsigned* counters,
              const scalar_t* x, MASKED(const unsigned char* mask, double count,) double eps, double factor, i64 n, i64 c, i64 l, i64 slice_length,
              i64 tile_channels, i64 line_samples, i64 group_slices) {
  constexpr int UNROLL = MASK_LOADS != UNMASKED && V == 8 ? 2 : 4;
  const Shape shape{n, c, l, slice_length, tile_channels, line_samples};
  Walk walk(shape, blockIdx.x, blockIdx.y, misalignment_of(x));
  __shared__ double pivots[MAX_TILE_CHANNELS];
  MASKED(MaskedMoments<UNROLL> moments);
#ifndef MASK
  ThreadMoments<UNROLL> moments;
#endif
  bool first = true;
#pragma unroll 1
  do {
    Slot slot[UNROLL];
    Pack<scalar_t, V> pack[UNROLL];
    Valid valid[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) slot[u] = walk.next();
    load_slots(pack, x, slot);
    load_valid(valid, mask, slot, walk);
    if (first) {  // while the loads of the first vectors are in flight
      MASKED(i64 position = any_valid(mask, n * l);)
      const scalar_t* pivot = x MASKED(+ position / l * c * l + position % l);
      fill_table(pivots, walk, c, [&](bool active, i64 channel) {
        return static_cast<double>(widen(load_if(active, pivot + channel * l)));
      });
      moments.begin(pack, slot);
      first = false;
    }
    moments.add(pack, slot, valid);
  } while (walk.left > 0);

  double pivot_of[Walk::CHANNELS];
  pick(pivot_of, pivots, walk);
  Pair own[Walk::CHANNELS];
  moments.about(pivot_of, own);

  auto pair_of = [&](const Single& single) {
    double value = widen(load_if(single.slot.active, x + single.slot.offset));
    bool counts = is_valid(single.slot.active, mask, single.slot.position);
    double deviation = counts ? value - pivots[single.channel] : 0;
    return Pair{deviation, deviation * deviation};
  };
  reduce_tile(own, walk, shape, Scratch{partials, counters, group_slices}, pair_of,
              [&](bool active, i64 channel, Pair sums) {
#ifndef MASK
    double count = static_cast<double>(n * l);
#endif
    double pivot = pivots[active ? channel - walk.first_channel() : 0];
    double shift = sums.a / count;
    double center = pivot + shift, spread = sums.b - sums.a * shift;
    if (invstd) {
      const MomentSums settings{nullptr, nullptr, count, eps, factor};
      const Statistics out{mean, nullptr, invstd, running_mean, running_var};
      Running old = load_running(active, channel, out);
      keep(active, true, channel, center, variance_of(spread, count), old, settings, out);
      return;
    }
    double weight = count * center;
    store_if(active, mean + channel, center);
    store_if(active, m2 + channel, spread);
    store_at(active, weighted, channel, weight);
    store_at(active, about_zero, channel, fma(weight, center, spread));
  });
}
