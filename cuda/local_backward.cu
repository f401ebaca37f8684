// The whole backward of one rank, for tiles of x and dy that both fit into a block's shared memory: they
// are read once. Writes dx and dresidual, and adds the gradients of weight and bias. `share` is 1 / n,
// or 0 for constant statistics.
#include "memory.cuh"
#include "numeric.cuh"
#include "geometry.cuh"
#include "reduce.cuh"
#include "resident.cuh"
#include "backward.cuh"

extern "C" __global__ void __launch_bounds__(RESIDENT_THREADS, RESIDENT_BLOCKS)
local_backward(scalar_t* dx, scalar_t* dresidual, param_t* dweight, param_t* dbias,
               const scalar_t* dy, const scalar_t* x, const unsigned char* relu_bits,
               const double* mean, const double* invstd, const param_t* weight, const param_t* bias,
               double share, i64 relu, i64 n, i64 c, i64 l, i64 slice_length, i64 tile_channels,
               i64 line_samples, i64 kept_begin, i64 kept_vectors) {
  constexpr int UNROLL = 2;
  constexpr int DEPTH = 4;
  constexpr bool rows = Walk::CHANNELS == 1;
  const Shape shape{n, c, l, slice_length, tile_channels, line_samples};
  const ChannelArrays arrays{mean, invstd, {weight, bias}};
  const bool stored = relu && relu_bits, recomputed = relu && !relu_bits;
  Walk walk(shape, blockIdx.x, 0, 0), ahead = walk, again = walk;
  const i64 to_dy = kept_vectors * V;  // from x to dy in shared memory
  Places to(kept_begin, walk), from = to, kept = to;
  auto fetch = [&] {
    if (ahead.left > 0) {
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        Slot slot = ahead.next();
        scalar_t* place = to.take();
        copy_if(slot.active, place, x + slot.offset);
        copy_if(slot.active, place + to_dy, dy + slot.offset);
      }
    }
    end_batch();
  };
#pragma unroll 1
  for (int i = 0; i < DEPTH; ++i) fetch();

  __shared__ Gradient table[TABLE_CHANNELS];
  Gradient gradient[Walk::CHANNELS];
  fill_table(table, walk, c, [&](bool active, i64 channel) {
    return Gradient{Affine::of(arrays.load(active, channel)), 0, 0};
  });
  pick(gradient, table, walk);
  acc_t of_dy[V] = {}, of_dy_xmu[V] = {};
#pragma unroll 1
  while (walk.left > 0) {
    Slot slot[UNROLL];
    unsigned bits[UNROLL];
    scalar_t* place[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      slot[u] = walk.next();
      place[u] = from.take();
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) bits[u] = stored ? load_bits(relu_bits, slot[u]) : ~0u;
    batches_left<DEPTH - 1>();
    fetch();
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      Pack<scalar_t, V> pack_x = load_pack_if<V>(slot[u].active, place[u]);
      Pack<scalar_t, V> pack_dy = load_pack_if<V>(slot[u].active, place[u] + to_dy);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Affine& own = gradient[rows ? 0 : j].affine;
        acc_t value = widen(pack_x.v[j]);
        if (!passes(value, own, recomputed, bits[u], j)) pack_dy.v[j] = scalar_t{};
        acc_t d = widen(pack_dy.v[j]);
        of_dy[j] += d;
        of_dy_xmu[j] = fused(d, value - own.high, of_dy_xmu[j]);
      }
      if (relu) store_shared_if(slot[u].active, place[u] + to_dy, pack_dy);
    }
  }
  Pair own[Walk::CHANNELS];
#pragma unroll
  for (int j = 0; j < Walk::CHANNELS; ++j) {
    own[j] = {rows ? total(of_dy) : of_dy[j], rows ? total(of_dy_xmu) : of_dy_xmu[j]};
  }
  const auto sums = sum_block(own, walk);

  fill_table(table, walk, c, [&](bool active, i64 channel) {
    Channel found = arrays.load(active, channel);
    Pair sum = sum_of(sums, active ? channel - walk.first_channel() : 0);
    double about_mean = sum.b - Affine::low(found.mean) * sum.a;
    return Gradient::of(found, [&] { return sum.a; }, [&] { return about_mean; }, share);
  });
  pick(gradient, table, walk);
  each_channel(walk, c, [&](bool active, i64 channel, int) {  // nothing below needs these
    double low = Affine::low(load_if(active, mean + channel));
    Pair sum = sum_of(sums, active ? channel - walk.first_channel() : 0);
    add_at(active, dweight, channel, (sum.b - low * sum.a) * load_if(active, invstd + channel));
    add_at(active, dbias, channel, sum.a);
  });
#pragma unroll 1
  while (again.left > 0) {
    Slot slot[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      slot[u] = again.next();
      scalar_t* place = kept.take();
      Pack<scalar_t, V> pack_x = load_pack_if<V>(slot[u].active, place);
      Pack<scalar_t, V> pack_dy = load_pack_if<V>(slot[u].active, place + to_dy);
      acc_t inputs[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Gradient& own = gradient[rows ? 0 : j];
        acc_t d = widen(pack_dy.v[j]);
        if (share != 0) {
          d = fused(widen(pack_x.v[j]) - own.affine.high, own.slope, d) + own.offset;
        }
        inputs[j] = d * own.affine.scale;
      }
      store_pack_if<V>(slot[u].active, dx + slot[u].offset, narrowed(inputs));
      if (dresidual) store_pack_if<V>(slot[u].active, dresidual + slot[u].offset, pack_dy);
    }
  }
}
