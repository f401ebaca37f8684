// Which elements of an (N, C, L) tensor a block and a thread process, in vectors of V elements.
//
// Rows: a block owns one channel and a slice of the vectors of its N rows.
// Runs: a block owns a tile of adjacent channels, which is a run of tile_channels * L elements in each
// sample, and a slice of the samples. A thread owns one vector of the run and steps through the samples,
// so each of its V elements stays in one channel. Columns are the case L == 1. If a sample is not a
// whole number of vectors, `line_samples` samples form one line, and one run has all channels.
//
// RAGGED: rows (or, for runs, the tensor) are not a whole number of vectors, or begin inside of one. The
// elements before the first whole vector and after the last, here called singles, are processed one by
// one, after the vectors. `left` counts down what is left to the block. It is the same in all threads,
// which therefore run the same number of iterations.
#pragma once
#include "memory.cuh"
#include "mask.cuh"

constexpr int MAX_THREADS = 256;
constexpr int MAX_TILE_CHANNELS = 256;
struct Shape {
  i64 n, c, l;
  i64 slice_length;   // vectors of a channel (rows) or lines (runs) in a slice
  i64 tile_channels;  // channels of a tile
  i64 line_samples;   // samples in a line

  __device__ i64 size() const { return n * c * l; }
};

// A vector, given by its first element. `position` is the mask position to which Walk::relative adds.
struct Slot {
  i64 offset;
  bool active;
  i64 position;
};

// An element outside of the whole vectors. `channel` is relative to the block's first.
struct Single {
  Slot slot;
  int channel;
};

// The type of a vector's index in its row. The plan takes V == 1 for rows that 32 bits cannot count.
template <int V> struct Index { using type = int; };
template <> struct Index<1> { using type = i64; };

template <int V_, bool RAGGED_> struct Rows {
  static constexpr int V = V_;
  static constexpr bool RAGGED = RAGGED_;
  static constexpr int CHANNELS = 1;  // that one vector can have elements of

  using index_t = typename Index<V>::type;

  i64 base, length, row_pitch, step, wrap, singles, place, step_place, wrap_place;
  i64 tile, slice;
  index_t k, slots;
  int left, step_k, misalignment;

  // `misalignment`: elements from a vector boundary in memory to the tensor, the same for all tensors
  __device__ Rows(const Shape& shape, i64 tile, i64 slice, int misalignment)
      : length(shape.l), row_pitch(shape.c * shape.l), singles(shape.n * 2 * V), tile(tile),
        slice(slice), misalignment(misalignment) {
    slots = length / V;  // if RAGGED, an upper bound
    i64 begin = slice * shape.slice_length, rest = shape.n * slots - begin;
    left = rest < shape.slice_length ? rest : shape.slice_length;
    i64 index = begin + threadIdx.x, row = index / slots;
    k = index % slots;
    unsigned threads = blockDim.x, short_slots = slots > threads ? threads + 1 : slots;
    int step_rows = threads / short_slots;
    step_k = threads % short_slots;
    base = row * row_pitch + tile * length;
    place = row * length;
    step = step_rows * row_pitch;
    step_place = step_rows * length;
    wrap = row_pitch;
    wrap_place = length;
    if (!RAGGED) move_to_vectors();
    keep_ready(step);
    keep_ready(wrap);
  }

  // Unless RAGGED, `base` is the offset of the thread's vector; if RAGGED, that of its row.
  __device__ __forceinline__ void move_to_vectors() {
    base += static_cast<i64>(k) * V;
    place += static_cast<i64>(k) * V;
    step += step_k * V;
    step_place += step_k * V;
    wrap -= length;
    wrap_place = 0;
  }

  // elements of a row before its first whole vector
  __device__ __forceinline__ int head(i64 row) const { return -(row + misalignment) & (V - 1); }

  __device__ __forceinline__ Slot next() {
    i64 start = RAGGED ? static_cast<i64>(k) * V + head(base) : 0;
    bool mine = static_cast<int>(threadIdx.x) < left;
    Slot slot{base + start, mine && (!RAGGED || start + V <= length), place + start};
    left -= blockDim.x;
    base += step;
    place += step_place;
    k += step_k;
    if (k >= slots) {
      k -= slots;
      base += wrap;
      place += wrap_place;
    }
    return slot;
  }

  // The mask position of element j of a vector, relative to its slot's.
  __device__ __forceinline__ int relative(int j) const { return j; }

  // A row has 2 * V candidates, V at each end. Those in whole vectors are not active.
  __device__ __forceinline__ Single single(i64 i) const {
    i64 sample = i / (2 * V), row = sample * row_pitch + tile * length;
    int j = i % (2 * V), tail = (length - head(row)) & (V - 1);
    bool active = i < singles && (j < V ? j < head(row) : j >= 2 * V - tail);
    i64 within = j < V ? j : length - 2 * V + j;
    return {{row + within, active, sample * length + within}, 0};
  }

  // the distance between a thread's vectors, counted in threads
  __device__ __forceinline__ int step_threads() const { return blockDim.x; }
  __device__ __forceinline__ i64 first_channel() const { return tile; }
  __device__ __forceinline__ int tile_channels() const { return 1; }
  __device__ __forceinline__ void channels(int (&own)[CHANNELS]) const { own[0] = 0; }
};

template <int V_, bool RAGGED_> struct Runs {
  static constexpr int V = V_;
  static constexpr bool RAGGED = RAGGED_;
  static constexpr int CHANNELS = V;
  static constexpr int singles = 8;  // as many as a byte of ReLU bits, which is stored whole

  i64 offset, step, total, positions, place, step_place;
  i64 tile, slice, all_channels;
  int left, first, step_samples;  // in samples; `first` and the step are the thread's
  int slots, lanes, k, lane, length, tile_channels_, line_samples;
  unsigned relatives[(V + 1) / 2];  // two per word, to save registers

  __device__ Runs(const Shape& shape, i64 tile, i64 slice, int)
      : total(shape.size()), positions(shape.n * shape.l), tile(tile), slice(slice), all_channels(shape.c), length(shape.l),
        tile_channels_(shape.tile_channels), line_samples(shape.line_samples) {
    slots = tile_channels_ * line_samples * length / V;
    lanes = blockDim.x / slots;
    k = threadIdx.x % slots;
    lane = threadIdx.x / slots;
    i64 rest = all_channels - tile * tile_channels_;
    i64 present = rest < tile_channels_ ? rest : tile_channels_;
    bool on = lane < lanes && k * V < present * line_samples * length;
    i64 begin = slice * shape.slice_length, samples = shape.slice_length * line_samples;
    i64 last = shape.n - begin * line_samples;  // in samples, which avoids a 64-bit division
    left = last < samples ? last : samples;
    first = on ? lane * line_samples : 0x7fffffff;
    step_samples = lanes * line_samples;
    i64 pitch = line_samples * all_channels * length;
    offset = (begin + lane) * pitch + tile * tile_channels_ * length + k * V;
    step = lanes * pitch;
    keep_ready(step);
    MASKED(find_positions(begin);)
  }

  // Mask positions: of the thread's first line, and of its elements relative to their line.
  __device__ __forceinline__ void find_positions(i64 begin) {
    place = (begin + lane) * line_samples * length;
    step_place = static_cast<i64>(lanes) * line_samples * length;
    int row = k * V / length, rest = k * V % length, channel = row % tile_channels_;
    unsigned position = row / tile_channels_ * length + rest;
#pragma unroll
    for (int j = 0; j < (MASK_LOADS == EACH_BYTE ? V : 1); ++j) {
      relatives[j / 2] = j % 2 ? relatives[j / 2] | position << 16 : position;
      bool next = ++rest == length, sample = next && channel + 1 == tile_channels_;
      position += sample || !next ? 1 : 1 - length;
      rest = next ? 0 : rest;
      channel = sample ? 0 : channel + (next ? 1 : 0);
    }
  }

  __device__ __forceinline__ int relative(int j) const {
    return relatives[j / 2] >> (j % 2 * 16) & 0xffff;
  }

  __device__ __forceinline__ Slot next() {
    bool whole = !RAGGED || offset < total - total % singles;
    Slot slot{offset, first < left && whole, place};
    left -= step_samples;
    offset += step;
    place += step_place;
    return slot;
  }

  // Of the last elements of the tensor. Counting from its end avoids a 64-bit division.
  __device__ __forceinline__ Single single(unsigned i) const {
    int rest = total % singles;
    unsigned behind = rest - 1 - i, channels = tile_channels_;
    unsigned row = behind / static_cast<unsigned>(length), within = behind % length;
    int channel = tile_channels_ - 1 - row % channels;
    i64 position = positions - 1 - row / channels * length - within;
    return {{total - rest + i, i < rest, position}, channel};
  }

  __device__ __forceinline__ int step_threads() const { return lanes * slots; }
  __device__ __forceinline__ i64 first_channel() const { return tile * tile_channels_; }
  __device__ __forceinline__ int tile_channels() const { return tile_channels_; }
  // of the elements of the thread's vector, relative to first_channel()
  __device__ __forceinline__ void channels(int (&own)[CHANNELS]) const {
    int row = k * V / length, rest = k * V % length, channel = row % tile_channels_;
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
      own[j] = channel;
      bool next = ++rest == length;
      rest = next ? 0 : rest;
      channel += next ? 1 : 0;
      channel = channel == tile_channels_ ? 0 : channel;
    }
  }

  // The number of elements of one channel in a line of the block, and the index of each.
  __device__ int members() const { return line_samples * length; }
  __device__ int member(int channel, int i) const {
    return i / length * tile_channels_ * length + channel * length + i % length;
  }
};

#if ROWS
using Walk = Rows<VECTOR, RAGGED_VECTORS>;
#else
using Walk = Runs<VECTOR, RAGGED_VECTORS>;
#endif
constexpr int V = VECTOR;
using Valid = ValidElements<V>;

// Blocks per multiprocessor for which ptxas must limit registers: the most that it reaches without
// spilling, on every architecture. A thread that writes holds more values than one that sums. With a
// mask it also holds mask bytes and counts.
constexpr bool HOLDS_MORE = MASK_LOADS != UNMASKED && (V > 1 || !ROWS);
constexpr bool WRITES_MORE = HOLDS_MORE && (Walk::CHANNELS > 1 || MASK_LOADS == EACH_BYTE);
constexpr int SUMMING_BLOCKS = (Walk::CHANNELS == 1 ? 4 : 3) - HOLDS_MORE;
constexpr int WRITING_BLOCKS = Walk::CHANNELS == 8 || WRITES_MORE ? 2 : V == 8 && !HOLDS_MORE ? 4 : 3;
constexpr int NORMALIZING_BLOCKS = V == 8 && !HOLDS_MORE ? 4 : WRITING_BLOCKS;

// The eight elements of a vector have their mask bytes at unrelated addresses. Kernels then take UNROLL
// 1 where 2 would give the same results: 2 takes 0.1 s longer to compile.
constexpr bool PATCHY = MASK_LOADS == EACH_BYTE && Walk::RAGGED && Walk::CHANNELS == 8;

template <typename T> __device__ __forceinline__ int misalignment_of(const T* tensor) {
  return reinterpret_cast<size_t>(tensor) / sizeof(T) % V;
}

template <bool ZEROS = true, int COUNT, typename T>
__device__ __forceinline__ void load_slots(Pack<T, V> (&packs)[COUNT], const T* tensor,
                                           const Slot* slots, bool wanted = true) {
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    packs[u] = load_pack_if<V, ZEROS>(wanted && slots[u].active, tensor + slots[u].offset);
  }
}

// Loads the mask bytes of vectors; 0 for inactive ones.
template <int COUNT>
__device__ __forceinline__ void load_valid(Valid (&valid)[COUNT], const unsigned char* mask,
                                           const Slot* slots, const Walk& walk) {
  if (MASK_LOADS == UNMASKED) return;
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    const unsigned char* first = mask + slots[u].position;
    if (MASK_LOADS != EACH_BYTE) {
      valid[u].bytes = load_pack_if<Valid::BYTES>(slots[u].active, first + walk.relative(0));
      continue;
    }
    valid[u].bytes = gather_if<Valid::BYTES>(slots[u].active, first, [&](int j) {
      return walk.relative(j);
    });
  }
}

// Calls each(single) for the block's share of the singles, equally often in all threads. In rows every
// slice has a share; in runs the first threads of the first slice have all.
template <typename Each>
__device__ __forceinline__ void each_single(const Rows<V, RAGGED_VECTORS>& walk, Each each) {
  if (!Walk::RAGGED) return;
  i64 threads = blockDim.x;
#pragma unroll 1
  for (i64 i = walk.slice * threads; i < walk.singles; i += gridDim.y * threads) {
    each(walk.single(i + threadIdx.x));
  }
}

template <typename Each>
__device__ __forceinline__ void each_single(const Runs<V, RAGGED_VECTORS>& walk, Each each) {
  if (Walk::RAGGED && walk.slice == 0) each(walk.single(threadIdx.x));
}

// Calls each(active, c, i) for the block's channels, i from 0, equally often in all threads.
template <typename Each>
__device__ __forceinline__ void each_channel(const Walk& walk, i64 channels, Each each) {
  int begin = 0;
#pragma unroll 1
  do {
    int i = begin + threadIdx.x;
    i64 c = walk.first_channel() + i;
    each(i < walk.tile_channels() && c < channels, c, i);
    begin += blockDim.x;
  } while (Walk::CHANNELS > 1 && begin < walk.tile_channels());
}

// Fills a table in shared memory with make(active, c) for each channel of the block, also for channels of
// the tile that the tensor does not have: idle threads pick them.
template <typename Value, typename Make>
__device__ __forceinline__ void fill_table(Value* table, const Walk& walk, i64 channels, Make make) {
  each_channel(walk, channels, [&](bool active, i64 c, int i) {
    Value value = make(active, c);
    if (i < walk.tile_channels()) table[i] = value;
  });
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
