// Which elements of an (N, C, L) tensor a block and a thread work on, in vectors of V elements.
//
// Rows: a block owns one channel and a slice of the vectors of its N rows.
// Runs: a block owns a tile of neighbouring channels, a run of tile_channels * L elements in every
// sample, and a slice of the samples; a thread owns one vector of the run and walks down the samples,
// so that each of its V elements stays in one channel. L == 1 is the plain case of columns. Where a
// sample is no whole number of vectors, `line_samples` samples make one line, and all channels are
// one run.
//
// With RAGGED, rows or the tensor are no whole number of vectors, or begin inside of one. Their rest, in
// front of the first whole vector and behind the last, is read by the element, after the vectors.
// `left` counts down what is left to the block, in all threads alike: they take the same number of
// rounds.
#pragma once
#include "memory.cuh"
#include "mask.cuh"

constexpr int MAX_THREADS = 256;
constexpr int MAX_TILE_CHANNELS = 256;
struct Shape {
  i64 n, c, l;
  i64 slice_length;   // vectors of a channel (rows) or lines (runs) in a slice
  i64 tile_channels;  // channels of a block
  i64 line_samples;   // samples in a line

  __device__ i64 size() const { return n * c * l; }
};

// A vector, by its first element. `position`: in the mask, of what Walk::relative counts from.
struct Slot {
  i64 offset;
  bool active;
  i64 position;
};

// An element of the rest, its channel counted from the block's first.
struct Single {
  Slot slot;
  int channel;
};

// Numbers of the vectors of a row: rows of 2^31 are read by the element, as the plan says.
template <int V> struct Index { using type = int; };
template <> struct Index<1> { using type = i64; };

template <int V_, bool RAGGED_> struct Rows {
  static constexpr int V = V_;
  static constexpr bool RAGGED = RAGGED_;
  static constexpr int CHANNELS = 1;  // that the elements of one vector can belong to

  using index_t = typename Index<V>::type;

  i64 base, length, row_pitch, step, wrap, singles, place, step_place, wrap_place;
  i64 tile, slice;
  index_t k, slots;
  int left, step_k, misalignment;

  // `misalignment`: elements from the last vector boundary in memory to the tensor, as of all tensors
  __device__ Rows(const Shape& shape, i64 tile, i64 slice, int misalignment)
      : length(shape.l), row_pitch(shape.c * shape.l), singles(shape.n * 2 * V), tile(tile),
        slice(slice), misalignment(misalignment) {
    slots = length / V;  // ragged: at most
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

  // Where a row begins with a vector, `base` is that of the thread; else it is its row.
  __device__ __forceinline__ void move_to_vectors() {
    base += static_cast<i64>(k) * V;
    place += static_cast<i64>(k) * V;
    step += step_k * V;
    step_place += step_k * V;
    wrap -= length;
    wrap_place = 0;
  }

  // elements of a row in front of its first whole vector
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

  // Position of element j of a vector, counted from its slot's.
  __device__ __forceinline__ int relative(int j) const { return j; }

  // Of the 2 * V elements at the ends of a row.
  __device__ __forceinline__ Single single(i64 i) const {
    i64 sample = i / (2 * V), row = sample * row_pitch + tile * length;
    int j = i % (2 * V), tail = (length - head(row)) & (V - 1);
    bool active = i < singles && (j < V ? j < head(row) : j >= 2 * V - tail);
    i64 within = j < V ? j : length - 2 * V + j;
    return {{row + within, active, sample * length + within}, 0};
  }

  // from a thread's vector to its next one, in threads
  __device__ __forceinline__ int step_threads() const { return blockDim.x; }
  __device__ __forceinline__ i64 first_channel() const { return tile; }
  __device__ __forceinline__ int tile_channels() const { return 1; }
  __device__ __forceinline__ void channels(int (&own)[CHANNELS]) const { own[0] = 0; }
};

template <int V_, bool RAGGED_> struct Runs {
  static constexpr int V = V_;
  static constexpr bool RAGGED = RAGGED_;
  static constexpr int CHANNELS = V;
  static constexpr int singles = 8;  // a byte of ReLU bits: it is stored at once

  i64 offset, step, total, positions, place, step_place;
  i64 tile, slice, all_channels;
  int left, first, step_samples;  // samples of the slice, and the thread's
  int slots, lanes, k, lane, length, tile_channels_, line_samples;
  unsigned relatives[(V + 1) / 2];  // two in a word, which saves registers

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
    i64 last = shape.n - begin * line_samples;  // samples: no 64-bit division
    left = last < samples ? last : samples;
    first = on ? lane * line_samples : 0x7fffffff;
    step_samples = lanes * line_samples;
    i64 pitch = line_samples * all_channels * length;
    offset = (begin + lane) * pitch + tile * tile_channels_ * length + k * V;
    step = lanes * pitch;
    keep_ready(step);
    MASKED(find_positions(begin);)
  }

  // That of the thread's first line, and those of its elements within a line.
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

  // Of the last elements of the tensor. Counted from its end there is no division by 64 bits.
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
  // of the elements of the thread's vector, counted from first_channel()
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

  // The elements of one channel in a line of the block, and where they lie.
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

// Blocks of a multiprocessor for which ptxas has to save registers: as many as it finds without
// spilling, for any architecture. A thread that writes holds more than one that sums. With a mask it
// holds the bytes of its vectors and counts, too.
constexpr bool HOLDS_MORE = MASK_LOADS != UNMASKED && (V > 1 || !ROWS);
constexpr bool WRITES_MORE = HOLDS_MORE && (Walk::CHANNELS > 1 || MASK_LOADS == EACH_BYTE);
constexpr int SUMMING_BLOCKS = (Walk::CHANNELS == 1 ? 4 : 3) - HOLDS_MORE;
constexpr int WRITING_BLOCKS = Walk::CHANNELS == 8 || WRITES_MORE ? 2 : V == 8 && !HOLDS_MORE ? 4 : 3;
constexpr int NORMALIZING_BLOCKS = V == 8 && !HOLDS_MORE ? 4 : WRITING_BLOCKS;

// Eight elements of a vector that each have a byte of the mask somewhere else. Threads then have one
// vector on its way where two would change nothing but time: two cost 0.1 s of compiling.
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

// The bytes of the mask for vectors; of those that are not active they are 0.
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

// Calls each(single) for the block's share of the rest, equally often in all threads. Of rows every
// slice has one; of runs the first slice has all, in its first threads.
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

// What `make(active, c)` gives for every channel of the block, computed once and shared. Also for those
// of the tile that the tensor does not have: idle threads pick them.
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
