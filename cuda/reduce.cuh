// Two sums per channel, of threads, warps, blocks and slices, in double and in a fixed order: two
// runs give the same bits. A slice's block leaves its sums in `partials`; the last block to arrive
// adds them. Its counter wraps to 0 by itself, ready for the next launch.
#pragma once
#include "geometry.cuh"

struct Pair {
  double a, b;
};

__device__ __forceinline__ Pair operator+(Pair p, Pair q) { return {p.a + q.a, p.b + q.b}; }

struct Scratch {
  double* partials;  // pairs: [slice][channel]
  unsigned* counters;  // one a tile
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

// In every thread of the first warp.
__device__ __forceinline__ Pair block_sum(Pair sum) {
  __shared__ Pair of_warp[MAX_THREADS / 32];
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

// Adds the rows of a (height, width) table in shared memory into its first row.
__device__ __forceinline__ void add_rows(Pair* table, int width, int height) {
  while (height > 1) {
    int half = (height + 1) / 2;
#pragma unroll 1
    for (int i = threadIdx.x; i < (height - half) * width; i += blockDim.x) {
      table[i] = table[i] + table[half * width + i];
    }
    __syncthreads();
    height = half;
  }
}

__device__ __forceinline__ void store_partial(bool active, double* partials, i64 index, Pair sum) {
  store_if(active, partials + 2 * index, sum.a);
  store_if(active, partials + 2 * index + 1, sum.b);
}

__device__ __forceinline__ Pair load_partial(bool active, const double* partials, i64 index) {
  Pair sum;
  sum.a = load_shared_by_blocks_if(active, partials + 2 * index);
  sum.b = load_shared_by_blocks_if(active, partials + 2 * index + 1);
  return sum;
}

// Whether all other slices of this tile have left their partials. Every thread must have stored
// its own before.
__device__ __forceinline__ bool is_last_slice(unsigned* counter, unsigned slices) {
  __shared__ bool last[1];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicInc(counter, slices - 1) == slices - 1;
  __syncthreads();
  if (last[0]) __threadfence();
  return last[0];
}

// Rows: everything belongs to the one channel of the block. `pair_of(single)` is one of the rest.
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
  i64 c = walk.tile;
  bool first = threadIdx.x == 0;
  int slices = gridDim.y;
  if (slices > 1) {
    store_partial(first, scratch.partials, walk.slice * shape.c + c, sum);
    if (!is_last_slice(scratch.counters + c, slices)) return;
    sum = {0, 0};
#pragma unroll 1
    for (int begin = 0; begin < slices; begin += blockDim.x) {
      int slice = begin + threadIdx.x;
      bool active = slice < slices;
      sum = sum + load_partial(active, scratch.partials, slice * shape.c + c);
    }
    sum = block_sum(sum);
  }
  finish(first, c, sum);
}

// Adds the members of every channel: one thread a channel, or one warp where there are several.
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

// Runs: pair j of every thread belongs to the channel of its element j.
template <typename PairOf, typename Finish>
__device__ __forceinline__ void reduce_tile(const Pair (&own)[V], const Runs<V, RAGGED_VECTORS>& walk,
                                            const Shape& shape, Scratch scratch, PairOf pair_of,
                                            Finish finish) {
  __shared__ Pair elements[MAX_THREADS * V];
  __shared__ Pair channels[MAX_TILE_CHANNELS];
  int width = walk.slots * V;
  if (walk.lane < walk.lanes) {
#pragma unroll
    for (int j = 0; j < V; ++j) elements[walk.lane * width + walk.k * V + j] = own[j];
  }
  __syncthreads();
  add_rows(elements, width, walk.lanes);
  add_members(channels, elements, walk);
  each_single(walk, [&](const Single& single) {
    Pair rest = pair_of(single);
    Pair& sum = channels[single.channel];
#pragma unroll 1
    for (int i = 0; i < walk.singles; ++i) {  // one by one: they may be of one channel
      if (threadIdx.x == i && single.slot.active) sum = sum + rest;
      __syncwarp();
    }
    __syncthreads();
  });

  int tile_channels = walk.tile_channels();
  int slices = gridDim.y;
  if (slices > 1) {
    each_channel(walk, shape.c, [&](bool active, i64 c, int i) {
      store_partial(active, scratch.partials, walk.slice * shape.c + c, channels[active ? i : 0]);
    });
    if (!is_last_slice(scratch.counters + walk.tile, slices)) return;
    int height = blockDim.x < tile_channels ? 1 : blockDim.x / tile_channels;
#pragma unroll 1
    for (int begin = 0; begin < tile_channels * height; begin += blockDim.x) {
      int item = begin + threadIdx.x;
      i64 c = walk.first_channel() + item % tile_channels;
      bool active = item < tile_channels * height && c < shape.c;
      Pair sum{0, 0};
#pragma unroll 4  // loads that do not wait for each other
      for (int step = 0; step < slices; step += height) {
        int slice = step + item / tile_channels;
        sum = sum + load_partial(active && slice < slices, scratch.partials, slice * shape.c + c);
      }
      if (active) elements[item] = sum;
      else if (item < tile_channels * height) elements[item] = {0, 0};
    }
    __syncthreads();
    add_rows(elements, tile_channels, height);
  }
  const Pair* sums = slices > 1 ? elements : channels;
  each_channel(walk, shape.c, [&](bool active, i64 c, int i) {
    finish(active, c, sums[active ? i : 0]);
  });
}
