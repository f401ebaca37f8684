// Which elements of an (N, C, L) tensor a block and a thread work on, in vectors of V elements.
//
// Rows: a block owns one channel and a slice of the vectors of its N rows.
// Runs: a block owns `group` neighbouring channels, a run of group * L elements in every sample, and
// a slice of the samples; a thread owns one vector of the run and walks down the samples, so that
// each of its V elements stays in one channel. L == 1 is the plain case of columns. Where a sample is
// no whole number of vectors, `fold` samples make one line, and all channels are one run.
//
// With RAGGED, vectors may lie across the ends of a row or of the tensor: elements outside
// [first, last) are not the block's. `left` counts down what is left to the block, in all threads
// alike: they take the same number of rounds.
#pragma once
#include "memory.cuh"

constexpr int MAX_THREADS = 256;
constexpr int MAX_GROUP = 256;
struct Shape {
  i64 n, c, l;
  i64 span;   // vectors of a channel (rows) or lines (runs) in a slice
  i64 group;  // channels of a block
  i64 fold;   // samples in a line

  __device__ i64 size() const { return n * c * l; }
};

template <int V, bool RAGGED> struct Slot {
  static constexpr bool ragged = RAGGED;
  i64 offset;  // of element 0, which lies before the row or the tensor where first > 0
  int first_, last_;
  bool active;

  __device__ __forceinline__ int first() const { return RAGGED ? first_ : 0; }
  __device__ __forceinline__ int last() const { return RAGGED ? last_ : V; }
  __device__ __forceinline__ bool whole() const { return active && last() - first() == V; }
  __device__ __forceinline__ bool has(int j) const {
    return active && (!RAGGED || (j >= first_ && j < last_));
  }
};

template <int V_, bool RAGGED_> struct Rows {
  static constexpr int V = V_;
  static constexpr bool RAGGED = RAGGED_;
  static constexpr int CHANNELS = 1;  // that the elements of one vector can belong to
  using slot_t = Slot<V, RAGGED>;

  i64 base, k, slots, left, length, row_pitch, step_k, step_base;
  i64 tile, slice;
  int skew;

  // `skew`: elements from the last vector boundary in memory to the tensor, the same for all tensors
  __device__ Rows(const Shape& shape, i64 tile, i64 slice, int skew)
      : length(shape.l), row_pitch(shape.c * shape.l), tile(tile), slice(slice), skew(skew) {
    slots = RAGGED ? (length + V - 2) / V + 1 : length / V;
    i64 begin = slice * shape.span;
    left = shape.n * slots - begin;
    if (left > shape.span) left = shape.span;
    i64 index = begin + threadIdx.x;
    k = index % slots;
    base = index / slots * row_pitch + tile * length;
    int threads = blockDim.x, short_slots = slots > threads ? threads + 1 : slots;
    step_k = threads % short_slots;
    step_base = threads / short_slots * row_pitch;
  }

  __device__ __forceinline__ slot_t next() {
    slot_t slot{base + k * V, 0, V, threadIdx.x < left};
    if (RAGGED) {
      i64 start = k * V - ((base + skew) & (V - 1));
      slot.offset = base + start;
      slot.first_ = start < 0 ? -start : 0;
      slot.last_ = length - start < V ? length - start : V;
      slot.active = slot.active && slot.first_ < slot.last_;
    }
    left -= blockDim.x;
    base += step_base;
    k += step_k;
    if (k >= slots) {
      k -= slots;
      base += row_pitch;
    }
    return slot;
  }

  __device__ __forceinline__ i64 first_channel() const { return tile; }
  __device__ __forceinline__ int group() const { return 1; }
  __device__ __forceinline__ void channels(int (&own)[CHANNELS]) const { own[0] = 0; }
};

template <int V_, bool RAGGED_> struct Runs {
  static constexpr int V = V_;
  static constexpr bool RAGGED = RAGGED_;
  static constexpr int CHANNELS = V;
  using slot_t = Slot<V, RAGGED>;

  i64 left, offset, step, total;
  i64 tile, slice, all_channels;
  int slots, lanes, k, lane, length, group_, fold;
  bool on;

  __device__ Runs(const Shape& shape, i64 tile, i64 slice, int)
      : total(shape.size()), tile(tile), slice(slice), all_channels(shape.c), length(shape.l),
        group_(shape.group), fold(shape.fold) {
    slots = group_ * fold * length / V;
    lanes = blockDim.x / slots;
    k = threadIdx.x % slots;
    lane = threadIdx.x / slots;
    i64 rest = all_channels - tile * group_;
    on = lane < lanes && k * V < (rest < group_ ? rest : group_) * fold * length;
    i64 begin = slice * shape.span;
    left = shape.n - begin * fold;  // samples: no 64-bit division
    if (left > shape.span * fold) left = shape.span * fold;
    i64 pitch = fold * all_channels * length;
    offset = (begin + lane) * pitch + tile * group_ * length + k * V;
    step = lanes * pitch;
  }

  __device__ __forceinline__ slot_t next() {
    slot_t slot{offset, 0, V, on && lane * fold < left};
    if (RAGGED) {
      slot.last_ = total - offset < V ? total - offset : V;
      slot.active = slot.active && slot.last_ > 0;
    }
    left -= lanes * fold;
    offset += step;
    return slot;
  }

  __device__ __forceinline__ i64 first_channel() const { return tile * group_; }
  __device__ __forceinline__ int group() const { return group_; }
  // of the elements of the thread's vector, counted from first_channel()
  __device__ __forceinline__ void channels(int (&own)[CHANNELS]) const {
    int row = k * V / length, rest = k * V % length, channel = row % group_;
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
      own[j] = channel;
      if (++rest < length) continue;
      rest = 0;
      if (++channel == group_) channel = 0;
    }
  }

  // The elements of one channel in a line of the block, and where they lie.
  __device__ int members() const { return fold * length; }
  __device__ int member(int channel, int i) const {
    return i / length * group_ * length + channel * length + i % length;
  }
};

#if ROWS
using Walk = Rows<VECTOR, RAGGED_VECTORS>;
#else
using Walk = Runs<VECTOR, RAGGED_VECTORS>;
#endif
using slot_t = Walk::slot_t;
constexpr int V = VECTOR;

// of a multiprocessor: up to 128 registers a thread where vectors are ragged or a thread has the
// coefficients of eight channels, else 80. Then ptxas spills none; left alone, it would.
constexpr int MIN_BLOCKS = RAGGED_VECTORS || Walk::CHANNELS == 8 ? 2 : 3;

template <typename T> __device__ __forceinline__ int skew_of(const T* tensor) {
  return reinterpret_cast<size_t>(tensor) / sizeof(T) % V;
}

// Vectors of a tensor. One across the ends of a row is read whole, its neighbours with it; one across
// the ends of the tensor, of which there are two, element by element: each comes in at the front and
// moves the others on, so that the rare case is a short loop and no array is indexed at run time.
template <int COUNT, typename T>
__device__ __forceinline__ void load_slots(Pack<T, V> (&packs)[COUNT], const T* tensor,
                                           const slot_t* slots, i64 size) {
  bool outside[COUNT], any = false;
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    outside[u] = slot_t::ragged && (slots[u].offset < 0 || slots[u].offset + V > size);
    packs[u] = load_pack_if<V>(slots[u].active && !outside[u], tensor + slots[u].offset);
    any = any || (slots[u].active && outside[u]);
  }
  if (!slot_t::ragged || !__any_sync(0xffffffffu, any)) return;
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
#pragma unroll 1
    for (int j = V - 1; j >= 0; --j) {
      T value = load_if(outside[u] && slots[u].has(j), tensor + slots[u].offset + j);
      if (!outside[u]) continue;
#pragma unroll
      for (int k = V - 1; k > 0; --k) packs[u].v[k] = packs[u].v[k - 1];
      packs[u].v[0] = value;
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_slot(T* tensor, const slot_t& slot, const Pack<T, V>& pack) {
  bool whole = slot.whole();
  store_pack_if<V>(whole, tensor + slot.offset, pack);
  if (slot_t::ragged) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      store_if(!whole && slot.has(j), tensor + slot.offset + j, pack.v[j]);
    }
  }
}

// What `make(active, c)` gives for every channel of the block, computed once and shared.
template <typename Value, typename Make>
__device__ __forceinline__ void fill_table(Value* table, const Walk& walk, i64 channels, Make make) {
#pragma unroll 1
  for (int i = threadIdx.x, rest = walk.group(); rest > 0; i += blockDim.x, rest -= blockDim.x) {
    i64 c = walk.first_channel() + i;
    bool active = i < walk.group() && c < channels;
    Value value = make(active, c);
    if (active) table[i] = value;
  }
  __syncthreads();
}

template <typename Value>
__device__ __forceinline__ void pick(Value (&own)[Walk::CHANNELS], const Value* table,
                                     const Walk& walk) {
  int channel[Walk::CHANNELS];
  walk.channels(channel);
#pragma unroll
  for (int j = 0; j < Walk::CHANNELS; ++j) own[j] = table[channel[j]];
}
