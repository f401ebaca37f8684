// The sums of one thread about its own pivot, a value near its data. In float, the error of such sums
// depends on the spread of the data and not on their mean. They are then shifted, in double, to a pivot
// that all threads, blocks and slices of a channel share; the shifted sums can be added.
//
// The shared pivot is the channel's first value. In double that is enough, even if it is an outlier: one
// value at distance d from the mean makes the variance at least d^2 / count, so shifting by d costs a
// relative error of at most count * 2^-53. In float it would not be enough, hence a pivot per thread.
#pragma once
#include "numeric.cuh"
#include "reduce.cuh"

template <int UNROLL> struct ThreadMoments {
  static constexpr bool rows = Walk::CHANNELS == 1;
  using packs_t = Pack<scalar_t, V>[UNROLL];
  using slots_t = Slot[UNROLL];

  acc_t pivot[Walk::CHANNELS] = {}, sum[V] = {}, square[V] = {};
  int count = 0;  // vectors
  bool started = false;

  __device__ __forceinline__ acc_t pivot_of(int j) const { return pivot[rows ? 0 : j]; }

  // Averages deviations from a first value, not values: constant data give that value exactly.
  __device__ __forceinline__ void start(const packs_t& x, const slots_t& slot) {
    if (rows) {
      Pack<scalar_t, V> row = x[0];
      started = slot[0].active;
#pragma unroll
      for (int u = 1; u < (Walk::RAGGED ? UNROLL : 1); ++u) {
        if (!started) row = x[u];  // the first that is active
        started = started || slot[u].active;
      }
      if (started) start_row(row);
    } else if (slot[0].active) {
      start_columns(x, slot);
    }
  }

  __device__ __forceinline__ void start_row(const Pack<scalar_t, V>& x) {
    acc_t first = widen(x.v[0]), deviation = 0;
#pragma unroll
    for (int j = 1; j < V; ++j) deviation += widen(x.v[j]) - first;
    pivot[0] = first + deviation / V;
  }

  __device__ __forceinline__ void start_columns(const packs_t& x, const slots_t& slot) {
    started = true;
    acc_t n = 1;
#pragma unroll
    for (int u = 1; u < UNROLL; ++u) n += slot[u].active ? 1 : 0;
    acc_t share = 1 / n;
#pragma unroll
    for (int j = 0; j < Walk::CHANNELS; ++j) {
      acc_t first = widen(x[0].v[j]), deviation = 0;
#pragma unroll
      for (int u = 1; u < UNROLL; ++u) {
        acc_t other = widen(x[u].v[j]);
        deviation += slot[u].active ? other - first : 0;
      }
      pivot[j] = first + deviation * share;
    }
  }

  __device__ __forceinline__ void add(const Pack<scalar_t, V>& x, const Slot& slot) {
    if (!slot.active) return;
    count += 1;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      acc_t deviation = widen(x.v[j]) - pivot_of(j);
      sum[j] += deviation;
      square[j] = fused(deviation, deviation, square[j]);
    }
  }

  // Takes a thread's first vectors. If none is active, no later one is, except in ragged rows.
  __device__ __forceinline__ void begin(const packs_t& x, const slots_t& slot) {
    if (!(rows && Walk::RAGGED)) start(x, slot);
  }

  __device__ __forceinline__ void add(const packs_t& x, const slots_t& slot, const Valid*) {
    if (rows && Walk::RAGGED && !started) start(x, slot);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) add(x[u], slot[u]);
  }

  // The sums of x - shared and (x - shared)^2: over all elements, or over element j of the vectors.
  __device__ __forceinline__ void about(const double (&shared)[Walk::CHANNELS],
                                        Pair (&own)[Walk::CHANNELS]) const {
    double n = rows ? count * V : count;
#pragma unroll
    for (int c = 0; c < Walk::CHANNELS; ++c) {
      double s = rows ? total(sum) : sum[c], q = rows ? total(square) : square[c];
      double shift = static_cast<double>(pivot[c]) - shared[c];
      own[c] = {s + n * shift, q + shift * (2 * s + n * shift)};
      if (count == 0) own[c] = {0, 0};
    }
  }
};
