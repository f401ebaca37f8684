// The whole forward of one rank, for tiles of x that fit into a block's shared memory: x is read once.
// Writes the statistics of the batch, the running statistics, y and the bits of y > 0.
#include "memory.cuh"
#include "numeric.cuh"
#include "geometry.cuh"
#include "reduce.cuh"
#include "resident.cuh"
#include "moments.cuh"
#include "finalize.cuh"
#include "normalize.cuh"

// What a channel needs besides its sums, loaded while the copies of x are in flight.
struct Known {
  double pivot;
  param_t weight, bias, mean, var;  // mean and var: running statistics
};

extern "C" __global__ void __launch_bounds__(RESIDENT_THREADS, RESIDENT_BLOCKS)
local_forward(scalar_t* y, unsigned char* relu_bits, double* mean, double* invstd,
              param_t* running_mean, param_t* running_var, const scalar_t* x,
              const scalar_t* residual, const param_t* weight, const param_t* bias, double eps,
              double factor, i64 relu, i64 n, i64 c, i64 l, i64 slice_length, i64 tile_channels,
              i64 line_samples, i64 kept_begin) {
  constexpr int UNROLL = 2;
  constexpr int DEPTH = 8;
  const Shape shape{n, c, l, slice_length, tile_channels, line_samples};
  Walk walk(shape, blockIdx.x, 0, 0), ahead = walk, again = walk;
  Places to(kept_begin, walk), from = to, kept = to;
  auto fetch = [&] {
    if (ahead.left > 0) {
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        Slot slot = ahead.next();
        copy_if(slot.active, to.take(), x + slot.offset);
      }
    }
    end_batch();
  };
#pragma unroll 1
  for (int i = 0; i < DEPTH; ++i) fetch();

  __shared__ Known known[TABLE_CHANNELS];
  const Statistics out{mean, nullptr, invstd, running_mean, running_var};
  const Parameters parameters{weight, bias};
  fill_table(known, walk, c, [&](bool active, i64 channel) {
    Channel own{0, 0, 1, 0};
    parameters.load(active, channel, own);
    Running old = load_running(active, channel, out);
    return Known{static_cast<double>(widen(load_if(active, x + channel * l))),
                 static_cast<param_t>(own.weight), static_cast<param_t>(own.bias),
                 static_cast<param_t>(old.mean), static_cast<param_t>(old.var)};
  });
  ThreadMoments<UNROLL> moments;
#pragma unroll 1
  while (walk.left > 0) {
    Slot slot[UNROLL];
    Pack<scalar_t, V> pack[UNROLL];
    batches_left<DEPTH - 1>();
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      slot[u] = walk.next();
      pack[u] = load_pack_if<V>(slot[u].active, from.take());
    }
    fetch();
    if (!moments.started) moments.start(pack, slot);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) moments.add(pack[u], slot[u]);
  }
  Known known_of[Walk::CHANNELS];
  pick(known_of, known, walk);
  double pivot_of[Walk::CHANNELS];
#pragma unroll
  for (int j = 0; j < Walk::CHANNELS; ++j) pivot_of[j] = known_of[j].pivot;
  Pair own[Walk::CHANNELS];
  moments.about(pivot_of, own);
  const auto sums = sum_block(own, walk);

  __shared__ Affine table[TABLE_CHANNELS];
  fill_table(table, walk, c, [&](bool active, i64 channel) {
    const MomentSums settings{nullptr, nullptr, static_cast<double>(n * l), eps, factor};
    int i = active ? channel - walk.first_channel() : 0;
    Pair about_pivot = sum_of(sums, i);
    double shift = about_pivot.a / settings.count, spread = about_pivot.b - about_pivot.a * shift;
    Channel found = keep(active, true, channel, known[i].pivot + shift,
                         variance_of(spread, settings.count), {known[i].mean, known[i].var},
                         settings, out);
    found.weight = known[i].weight, found.bias = known[i].bias;
    return Affine::of(found);
  });
  Affine affine[Walk::CHANNELS];
  pick(affine, table, walk);
#pragma unroll 1
  while (again.left > 0) {
    Slot slot[UNROLL];
    Pack<scalar_t, V> pack[UNROLL], added[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      slot[u] = again.next();
      pack[u] = load_pack_if<V>(slot[u].active, kept.take());
    }
    if (residual) load_slots(added, residual, slot);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      acc_t values[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        values[j] = affine[Walk::CHANNELS == 1 ? 0 : j].apply(widen(pack[u].v[j]));
        if (residual) values[j] += widen(added[u].v[j]);
        values[j] = activate(values[j], relu);
      }
      Pack<scalar_t, V> out = narrowed(values);
      store_pack_if<V>(slot[u].active, y + slot[u].offset, out);
      if (relu_bits) store_bits(relu_bits, slot[u], out);
    }
  }
}
