// dx = (dy - sum_dy / n - (x - mean) * invstd^2 * sum_dy_xmu / n) * invstd * weight, with the sums over
// all ranks. Null sums mean constant statistics: dx = dy * invstd * weight. The kernel also adds the
// gradients of weight and bias, which come from this rank's sums. `share` is 1 / n.
#include "memory.cuh"
#include "numeric.cuh"
#include "geometry.cuh"
#include "backward.cuh"

struct Sums {
  const double* dy;  // both may be null
  const double* dy_xmu;
};

// Where dy passes: everywhere (no ReLU), where a bit is set, or where y, recomputed from x, is above 0.
enum Passing { ALL, BY_BITS, AGAIN };

// Only the first slice of each channel adds.
__device__ __forceinline__ void add_parameter_gradients(const Walk& walk, i64 channels,
                                                        param_t* dweight, param_t* dbias,
                                                        const Sums& local, const double* invstd) {
  each_channel(walk, channels, [&](bool own, i64 c, int) {
    bool active = own && walk.slice == 0;
    double of_weight = load_or(active, local.dy_xmu, c, 0.0) * load_if(active, invstd + c);
    double of_bias = load_or(active, local.dy, c, 0.0);
    add_at(active, dweight, c, of_weight);
    add_at(active, dbias, c, of_bias);
  });
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, WRITING_BLOCKS)
backward_input(scalar_t* dx, scalar_t* dresidual, param_t* dweight, param_t* dbias,
               const scalar_t* dy, const scalar_t* x, const unsigned char* relu_bits,
               const double* mean, const double* invstd, const param_t* weight, const param_t* bias,
               const double* sum_dy, const double* sum_dy_xmu, const double* local_dy,
               const double* local_dy_xmu, MASKED(const unsigned char* mask,) double share, i64 relu, i64 n, i64 c, i64 l,
               i64 slice_length, i64 tile_channels, i64 line_samples) {
  constexpr int UNROLL = PATCHY ? 1 : 2;
  const Shape shape{n, c, l, slice_length, tile_channels, line_samples};
  const ChannelArrays arrays{mean, invstd, {weight, bias}};
  const Sums sums{sum_dy, sum_dy_xmu}, local{local_dy, local_dy_xmu};
  int by = relu ? relu_bits ? BY_BITS : AGAIN : ALL;
  keep_ready(by);
  int centred = sum_dy != nullptr, needs_x = centred || by == AGAIN, both = dresidual != nullptr;
  keep_ready(both);
  keep_ready(centred);
  keep_ready(needs_x);
  // in reverse order: what the reduction read last may still be in L2
  Walk walk(shape, gridDim.x - 1 - blockIdx.x, gridDim.y - 1 - blockIdx.y, misalignment_of(dy));
  __shared__ Gradient table[MAX_TILE_CHANNELS];
  Gradient gradient[Walk::CHANNELS];
  auto gradient_of = [&](int j) { return gradient[Walk::CHANNELS == 1 ? 0 : j]; };
  bool first = true;
#pragma unroll 1
  do {
    Slot slot[UNROLL];
    Pack<scalar_t, V> pack_x[UNROLL], pack_dy[UNROLL];
    unsigned bits[UNROLL];
    Valid valid[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) slot[u] = walk.next();
    load_slots<false>(pack_dy, dy, slot);
    load_slots<false>(pack_x, x, slot, needs_x);
    load_valid(valid, mask, slot, walk);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) bits[u] = by == BY_BITS ? load_bits(relu_bits, slot[u]) : ~0u;
    if (first) {  // while the loads of the first vectors are in flight
      fill_table(table, walk, c, [&](bool active, i64 channel) {
        return Gradient::of(
            arrays.load(active, channel), [&] { return load_or(active, sums.dy, channel, 0.0); },
            [&] { return load_or(active, sums.dy_xmu, channel, 0.0); }, share);
      });
      pick(gradient, table, walk);
      add_parameter_gradients(walk, c, dweight, dbias, local, invstd);
      first = false;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      i64 offset = slot[u].offset;
      acc_t deviation[V], d[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        deviation[j] = widen(pack_x[u].v[j]) - gradient_of(j).affine.high;
        d[j] = valid[u][j] ? widen(pack_dy[u].v[j]) : acc_t(0);
      }
      if (by != ALL) pass(d, deviation, by == AGAIN, bits[u], [&](int j) { return gradient_of(j).affine; });
      if (both) store_pack_if<V>(slot[u].active, dresidual + offset, narrowed(d));
      if (centred) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          d[j] = fused(deviation[j], gradient_of(j).slope, d[j]) + gradient_of(j).offset;
        }
      }
#pragma unroll
      for (int j = 0; j < V; ++j) {
        d[j] = valid[u][j] ? d[j] * gradient_of(j).affine.scale : acc_t(0);
      }
      store_pack_if<V>(slot[u].active, dx + offset, narrowed(d));
    }
  } while (walk.left > 0);

  each_single(walk, [&](const Single& single) {
    const Slot& slot = single.slot;
    const Gradient& own = table[single.channel];
    acc_t value = widen(load_if(slot.active && needs_x, x + slot.offset));
    unsigned bits = load_bit(by == BY_BITS ? relu_bits : nullptr, slot);
    acc_t d = passing(widen(load_if(slot.active, dy + slot.offset)), value, own.affine, by == AGAIN, bits,
                      V - 1);
    bool counts = is_valid(slot.active, mask, slot.position);
    scalar_t passed, input;
    narrow(counts ? d : acc_t(0), passed);
    if (sum_dy) d = fused(value - own.affine.high, own.slope, d) + own.offset;
    narrow(counts ? d * own.affine.scale : acc_t(0), input);
    store_if(slot.active, dx + slot.offset, input);
    store_at(slot.active, dresidual, slot.offset, passed);
  });
}
