// ThreadMoments over the valid values only. If the mask bytes can differ within a vector, each channel of
// a thread has a pivot and a count of its own, from its first valid values.
#pragma once
#include "numeric.cuh"
#include "reduce.cuh"

template <int UNROLL> struct MaskedMoments {
  static constexpr bool rows = Walk::CHANNELS == 1;
  static constexpr int COUNTS = MASK_LOADS == ONE_BYTE ? 1 : Walk::CHANNELS;
  using packs_t = Pack<scalar_t, V>[UNROLL];
  using slots_t = Slot[UNROLL];
  using valid_t = Valid[UNROLL];

  acc_t pivot[Walk::CHANNELS] = {}, sum[V] = {}, square[V] = {};
  int count[COUNTS] = {};  // valid values; one count if the channels share the mask bytes

  __device__ __forceinline__ int& count_of(int channel) { return count[COUNTS == 1 ? 0 : channel]; }

  __device__ __forceinline__ void begin(const packs_t&, const slots_t&) {}

  __device__ __forceinline__ void add(const packs_t& x, const slots_t&, const valid_t& valid) {
    bool missing = false;
#pragma unroll
    for (int c = 0; c < COUNTS; ++c) missing = missing || count[c] == 0;
    if (missing) start(x, valid);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        bool counts = valid[u][j];
        acc_t deviation = counts ? widen(x[u].v[j]) - pivot[rows ? 0 : j] : acc_t(0);
        sum[j] += deviation;
        square[j] = fused(deviation, deviation, square[j]);
        if (rows || j < COUNTS) count_of(rows ? 0 : j) += counts ? 1 : 0;
      }
    }
  }

  __device__ __forceinline__ void start(const packs_t& x, const valid_t& valid) {
    if (rows) {
      Pack<scalar_t, V> row = x[0];
      Valid of_row = valid[0];
#pragma unroll
      for (int u = 1; u < UNROLL; ++u) {
        bool earlier = of_row.any();
        row = earlier ? row : x[u];
        of_row = earlier ? of_row : valid[u];
      }
      pivot[0] = near<V>([&](int j) { return row.v[j]; }, [&](int j) { return of_row[j]; });
      return;
    }
#pragma unroll
    for (int j = 0; j < Walk::CHANNELS; ++j) {
      acc_t found = near<UNROLL>([&](int u) { return x[u].v[j]; }, [&](int u) { return valid[u][j]; });
      pivot[j] = count_of(j) == 0 ? found : pivot[j];
    }
  }

  // A value near the valid ones: exactly the first of them if all are equal.
  template <int SIZE, typename ValueOf, typename IsValid>
  static __device__ __forceinline__ acc_t near(ValueOf value_of, IsValid valid) {
    scalar_t first{};
#pragma unroll
    for (int i = SIZE - 1; i >= 0; --i) first = valid(i) ? value_of(i) : first;
    acc_t deviation = 0;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      deviation += valid(i) ? widen(value_of(i)) - widen(first) : acc_t(0);
    }
    return widen(first) + deviation / SIZE;
  }

  __device__ __forceinline__ void about(const double (&shared)[Walk::CHANNELS],
                                        Pair (&own)[Walk::CHANNELS]) {
#pragma unroll
    for (int c = 0; c < Walk::CHANNELS; ++c) {
      double n = count_of(c), s = rows ? total(sum) : sum[c], q = rows ? total(square) : square[c];
      double shift = static_cast<double>(pivot[c]) - shared[c];
      own[c] = {s + n * shift, q + shift * (2 * s + n * shift)};
      if (count_of(c) == 0) own[c] = {0, 0};
    }
  }
};
