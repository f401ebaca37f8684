// Two sums per channel, over threads, warps, blocks and slices, in double and in a fixed order: two runs
// give the same bits. The block of a slice stores its sums in `partials`. The last block of a group of
// slices to arrive adds the group's partials, and the last group adds the groups' sums. atomicInc wraps
// the counters to 0 for the next launch.
#pragma once
#include "geometry.cuh"

constexpr int BATCH = 8;  // partial sums that a thread of a last block loads at once

struct alignas(16) Pair {
  double a, b;
};

__device__ __forceinline__ Pair operator+(Pair p, Pair q) { return {p.a + q.a, p.b + q.b}; }

struct Scratch {
  double* partials;    // pairs: [slices, then groups][channel]
  unsigned* counters;  // per tile: one per group, then one for the groups
  i64 group_slices;    // slices per group
};

__device__ __forceinline__ Pair warp_sum(Pair sum) {
#pragma unroll 1
  for (int distance = 16; distance > 0; distance /= 2) {
    Pair other;
    other.a = __shfl_xor_sync(0xffffffffu, sum.a, distance);
    other.b = __shfl_xor_sync(0xffffffffu, sum.b, distance);
    sum = sum + other;
  }
  return sum;
}

// The result is valid in the first warp.
__device__ __forceinline__ Pair block_sum(Pair sum) {
  __shared__ Pair of_warp[32];
  sum = warp_sum(sum);
  int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) of_warp[warp] = sum;
  __syncthreads();
  int warps = blockDim.x / 32;
  Pair total{0, 0};
  if (threadIdx.x < warps) total = of_warp[threadIdx.x];
  if (warp == 0) total = warp_sum(total);
  __syncthreads();
  return total;
}

// Adds the rows of a (height, width) table in shared memory into its first row, eight rows into one per
// step: the barrier of a step costs more than its additions.
__device__ __forceinline__ void add_rows(Pair* table, int width, int height) {
  constexpr int TOGETHER = 8;
#pragma unroll 1
  while (height > 1) {
    int all = height * width;
    height = (height + TOGETHER - 1) / TOGETHER;
#pragma unroll 1
    for (int i = threadIdx.x; i < height * width; i += blockDim.x) {
      Pair sum = table[i];
#pragma unroll
      for (int row = 1; row < TOGETHER; ++row) {
        int other = i + row * height * width;
        if (other < all) sum = sum + table[other];
      }
      table[i] = sum;
    }
    __syncthreads();
  }
}

__device__ __forceinline__ void store_partial(bool active, double* partials, i64 index, Pair sum) {
  Pack<double, 2> pack{{sum.a, sum.b}};
  store_pack_if<2>(active, partials + 2 * index, pack);
}

// The sum of every `step`th of a channel's `count` partials, from number `begin` on. Number 0 is at
// `index`; they are `channels` apart. A whole batch is loaded before any of it is added: a loop that is
// only unrolled would wait for each load. Each address is computed from the one before: all at once they
// need so many registers that ptxas adds the first values before it loads the rest.
__device__ __forceinline__ Pair sum_partials(bool active, const double* partials, i64 index,
                                             i64 channels, int begin, int step, int count) {
  Pair sum{0, 0};
  const double* next = partials + 2 * (index + begin * channels);
#pragma unroll 1
  for (int round = 0; round < count; round += BATCH * step) {
    Pack<double, 2> batch[BATCH];
#pragma unroll
    for (int u = 0; u < BATCH; ++u) {
      batch[u] = load_pair_of_blocks_if(active && begin < count, next);
      begin += step;
      next = opaque(next + 2 * step * channels);
    }
#pragma unroll
    for (int u = 0; u < BATCH; ++u) sum = sum + Pair{batch[u].v[0], batch[u].v[1]};
  }
  return sum;
}

// Whether this block is the last of the `members` of a counter, so that all partials are stored. Every
// thread must store its own before it calls this.
__device__ __forceinline__ bool is_last(unsigned* counter, unsigned members) {
  __shared__ bool last[1];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicInc(counter, members - 1) == members - 1;
  __syncthreads();
  if (last[0]) __threadfence();
  return last[0];
}

// Whether this block is the tile's last. `store(row)` stores the block's sums as partials in that row;
// `add(row, count)` replaces them by the sums of `count` rows from `row` on.
template <typename Store, typename Add>
__device__ __forceinline__ bool add_slices(const Walk& walk, const Scratch& scratch, Store store,
                                           Add add) {
  int members = gridDim.y, group = scratch.group_slices, own = walk.slice, row = 0;
  int groups = (members + group - 1) / group;
  unsigned* counter = scratch.counters + walk.tile * (groups + 1);
#pragma unroll 1
  do {
    store(row + own);
    int first = own / group * group, count = members - first < group ? members - first : group;
    own /= group;
    if (!is_last(counter + own, count)) return false;
    add(row + first, count);
    if (row > 0) break;
    row = members;
    counter += groups;
    members = group = groups;
  } while (groups > 1);
  return true;
}

// Rows: the block has one channel. `pair_of(single)` is what one of the singles adds.
template <typename PairOf, typename Finish>
__device__ __forceinline__ void reduce_tile(const Pair (&own)[1], const Rows<V, RAGGED_VECTORS>& walk,
                                            const Shape& shape, Scratch scratch, PairOf pair_of,
                                            Finish finish) {
  Pair sum = own[0];
  each_single(walk, [&](const Single& single) {
    Pair rest = pair_of(single);
    if (single.slot.active) sum = sum + rest;
  });
  sum = block_sum(sum);
  i64 channel = walk.tile;
  bool first = threadIdx.x == 0;
  auto store = [&](i64 row) {
    store_partial(first, scratch.partials, row * shape.c + channel, sum);
  };
  auto add = [&](i64 row, int count) {
    sum = block_sum(sum_partials(true, scratch.partials, row * shape.c + channel, shape.c,
                                 threadIdx.x, blockDim.x, count));
  };
  if (gridDim.y > 1 && !add_slices(walk, scratch, store, add)) return;
  finish(first, channel, sum);
}

// Adds the elements of each channel: one thread per channel, or one warp if a channel has several.
__device__ __forceinline__ void add_members(Pair* channels, const Pair* elements,
                                            const Runs<V, RAGGED_VECTORS>& walk) {
  int members = walk.members();
  int team = members == 1 ? 1 : 32;
#pragma unroll 1
  for (int channel = threadIdx.x / team; channel < walk.tile_channels();
       channel += blockDim.x / team) {
    Pair sum{0, 0};
#pragma unroll 1
    for (int i = threadIdx.x % team; i < members; i += team) {
      sum = sum + elements[walk.member(channel, i)];
    }
    if (team == 32) sum = warp_sum(sum);
    if (threadIdx.x % team == 0) channels[channel] = sum;
  }
  __syncthreads();
}

// Adds the sums of all lanes of Runs into those of the first: the upper half stores its sums in `table`,
// the lower half adds them, until one lane is left. Adjacent threads cause no bank conflicts.
__device__ __forceinline__ void add_lanes(Pair (&sums)[V], Pair* table,
                                          const Runs<V, RAGGED_VECTORS>& walk) {
  int pitch = walk.lanes / 2 * walk.slots, thread = threadIdx.x;
#pragma unroll 1
  for (int lanes = walk.lanes; lanes > 1; lanes = (lanes + 1) / 2) {
    int lower = (lanes + 1) / 2 * walk.slots, all = lanes * walk.slots;
    if (thread >= lower && thread < all) {
#pragma unroll
      for (int j = 0; j < V; ++j) table[j * pitch + thread - lower] = sums[j];
    }
    __syncthreads();
    if (thread + lower < all) {
#pragma unroll
      for (int j = 0; j < V; ++j) sums[j] = sums[j] + table[j * pitch + thread];
    }
    __syncthreads();
  }
}

// The block's sums of its channels. Runs: pair j of a thread belongs to the channel of its element j. The
// plan gives the size of the table after the sums: room for half of the threads' sums, for those of a
// line, and for one per thread or channel.
__device__ __forceinline__ Pair* sum_block(Pair (&own)[V], const Runs<V, RAGGED_VECTORS>& walk) {
  extern __shared__ Pair channels[];
  Pair* table = channels + walk.tile_channels();
  add_lanes(own, table, walk);
  if (walk.lane == 0) {
#pragma unroll
    for (int j = 0; j < V; ++j) table[walk.k * V + j] = own[j];
  }
  __syncthreads();
  add_members(channels, table, walk);
  return channels;
}

template <typename PairOf, typename Finish>
__device__ __forceinline__ void reduce_tile(Pair (&own)[V], const Runs<V, RAGGED_VECTORS>& walk,
                                            const Shape& shape, Scratch scratch, PairOf pair_of,
                                            Finish finish) {
  Pair* channels = sum_block(own, walk);
  Pair* table = channels + walk.tile_channels();
  each_single(walk, [&](const Single& single) {
    Pair rest = pair_of(single);
    Pair& sum = channels[single.channel];
#pragma unroll 1
    for (int i = 0; i < walk.singles; ++i) {  // one by one: several may have the same channel
      if (threadIdx.x == i && single.slot.active) sum = sum + rest;
      __syncwarp();
    }
    __syncthreads();
  });

  const Pair* sums = channels;
  int tile_channels = walk.tile_channels();
  auto store = [&](i64 row) {
    each_channel(walk, shape.c, [&](bool active, i64 c, int i) {
      store_partial(active, scratch.partials, row * shape.c + c, sums[active ? i : 0]);
    });
  };
  auto add = [&](i64 row, int count) {
    int height = blockDim.x < tile_channels ? 1 : blockDim.x / tile_channels;
#pragma unroll 1
    for (int begin = 0; begin < tile_channels * height; begin += blockDim.x) {
      int item = begin + threadIdx.x;
      i64 c = walk.first_channel() + item % tile_channels;
      bool active = item < tile_channels * height && c < shape.c;
      Pair sum = sum_partials(active, scratch.partials, row * shape.c + c, shape.c,
                              item / tile_channels, height, count);
      if (item < tile_channels * height) table[item] = sum;
    }
    __syncthreads();
    add_rows(table, tile_channels, height);
    sums = table;
  };
  if (gridDim.y > 1 && !add_slices(walk, scratch, store, add)) return;
  each_channel(walk, shape.c, [&](bool active, i64 c, int i) {
    finish(active, c, sums[active ? i : 0]);
  });
}
