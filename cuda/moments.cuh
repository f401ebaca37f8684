// Sums of one thread about its own pivot. About a pivot of float data and in float they are as good
// as the data's spread, whatever the mean; in double they are then shifted to a pivot which all
// threads, blocks and slices of a channel share, and simply add up.
//
// The shared pivot is the channel's first value. In double that is enough, outlier or not: one value
// at distance d from the mean makes the variance at least d^2 / count, so that shifting by d costs
// at most a relative error of count * 2^-53. In float it would not be, hence the pivot per thread.
#pragma once
#include "numeric.cuh"
#include "reduce.cuh"

template <int UNROLL> struct ThreadMoments {
  static constexpr bool rows = Walk::CHANNELS == 1;
  using packs_t = Pack<scalar_t, V>[UNROLL];
  using slots_t = slot_t[UNROLL];

  acc_t pivot[Walk::CHANNELS] = {}, sum[V] = {}, square[V] = {};
  int count = 0;  // rows: values; runs: vectors
  int cut = V;    // runs: elements of the one ragged vector
  bool started = false;

  __device__ __forceinline__ acc_t pivot_of(int j) const { return pivot[rows ? 0 : j]; }

  // Deviations from a first value are averaged, not the values: constants give that value exactly.
  __device__ __forceinline__ void start(const packs_t& x, const slots_t& slot) {
    if (rows) {
      Pack<scalar_t, V> row = x[0];
      slot_t own = slot[0];
#pragma unroll
      for (int u = slot_t::ragged ? UNROLL - 1 : 0; u > 0; --u) {
        if (slot[0].active || !slot[u].active) continue;  // the first that is active
        row = x[u];
        own = slot[u];
      }
      if (own.active) start_row(row, own);
    } else if (slot[0].active) {
      start_columns(x, slot);
    }
  }

  __device__ __forceinline__ void start_row(const Pack<scalar_t, V>& x, const slot_t& slot) {
    started = true;
    acc_t first = 0, deviation = 0;
#pragma unroll
    for (int j = V - 1; j >= 0; --j) {
      if (slot.has(j)) first = widen(x.v[j]);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (slot.has(j)) deviation += widen(x.v[j]) - first;
    }
    pivot[0] = first + deviation / (slot.last() - slot.first());
  }

  __device__ __forceinline__ void start_columns(const packs_t& x, const slots_t& slot) {
    started = true;
#pragma unroll
    for (int j = 0; j < Walk::CHANNELS; ++j) {
      acc_t first = widen(x[0].v[j]), deviation = 0, n = 1;
#pragma unroll
      for (int u = 1; u < UNROLL; ++u) {
        if (slot[u].has(j)) deviation += widen(x[u].v[j]) - first, n += 1;
      }
      pivot[j] = first + deviation * (1 / n);
    }
  }

  __device__ __forceinline__ void add(const Pack<scalar_t, V>& x, const slot_t& slot) {
    if (!slot.active) return;
    count += rows ? slot.last() - slot.first() : 1;
    if (!rows && slot_t::ragged && !slot.whole()) cut = slot.last();
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (!slot.has(j)) continue;
      acc_t deviation = widen(x.v[j]) - pivot_of(j);
      sum[j] += deviation;
      square[j] = fused(deviation, deviation, square[j]);
    }
  }

  // The sums of x - shared and (x - shared)^2, element j of the vectors.
  __device__ __forceinline__ Pair about(double shared, int j) const {
    double n = rows ? (j == 0 ? count : 0) : count - (j >= cut ? 1 : 0);
    if (count == 0) return {0, 0};
    double shift = static_cast<double>(pivot_of(j)) - shared, s = sum[j];
    return {s + n * shift, square[j] + shift * (2 * s + n * shift)};
  }
};
