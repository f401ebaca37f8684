// What a block keeps of its tile between the sums and the write, in dynamic shared memory: every thread
// copies its own vectors there and reads no others, so that they need no barrier. DEPTH batches of UNROLL
// vectors are on their way at once, in no registers, where the device copies by itself (sm_80 and up).
#pragma once
#include "reduce.cuh"

// Where a tile leaves room for one block alone, its threads have to hide what all of them wait for.
constexpr int RESIDENT_THREADS = 512;
constexpr int RESIDENT_BLOCKS = Walk::CHANNELS == 1 ? 2 : 1;
constexpr int TABLE_CHANNELS = Walk::CHANNELS == 1 ? 1 : MAX_TILE_CHANNELS;

__device__ __forceinline__ void store_shared_if(bool active, scalar_t* to,
                                                const Pack<scalar_t, V>& pack) {
  using word = typename Word<sizeof(pack)>::type;
  word bits;
  memcpy(&bits, &pack, sizeof(word));
  if (active) *reinterpret_cast<word*>(to) = bits;
}

// It has arrived behind `batches_left`. Nothing is copied of what is not active.
__device__ __forceinline__ void copy_if(bool active, scalar_t* to, const scalar_t* from) {
  static_assert(sizeof(Pack<scalar_t, V>) == 16, "one instruction copies 16 bytes");
#if __CUDA_ARCH__ >= 800
  asm volatile("{\n.reg .pred active;\nsetp.ne.s32 active, %2, 0;\n"
               "@active cp.async.cg.shared.global [%0], [%1], 16;\n}" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(active))
               : "memory");
#else
  store_shared_if(active, to, load_pack_if<V>(active, from));
#endif
}

__device__ __forceinline__ void end_batch() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until no more than COUNT of this thread's batches are on their way.
template <int COUNT> __device__ __forceinline__ void batches_left() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
#endif
}

// The places of a thread's vectors, one after the other, from so many 16 bytes of the memory on.
struct Places {
  scalar_t* next;
  int step;

  __device__ Places(i64 begin, const Walk& walk) : step(walk.step_threads() * V) {
    extern __shared__ uint4 memory[];
    next = reinterpret_cast<scalar_t*>(memory + begin + threadIdx.x);
  }

  __device__ __forceinline__ scalar_t* take() {
    scalar_t* own = next;
    next += step;
    return own;
  }
};

// The block's sums of each of its channels, for `sum_of` in every thread that has one in a table.
__device__ __forceinline__ Pair sum_block(Pair (&own)[1], const Rows<V, RAGGED_VECTORS>&) {
  return block_sum(own[0]);
}

__device__ __forceinline__ Pair sum_of(const Pair& sum, int) { return sum; }
__device__ __forceinline__ Pair sum_of(const Pair* sums, int i) { return sums[i]; }
