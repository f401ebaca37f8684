// A block's tile, kept in dynamic shared memory between the sums and the write. Every thread copies its own
// vectors there and reads no others, so no barrier is needed. DEPTH batches of UNROLL vectors are in
// flight at once; asynchronous copies (sm_80 and up) need no registers for them.
#pragma once
#include "reduce.cuh"

// Large tiles leave room for one block per multiprocessor, whose threads have to hide all latency.
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

// The copy is complete after `batches_left`. An inactive vector is not copied.
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

// Waits until no more than COUNT of this thread's batches are in flight.
template <int COUNT> __device__ __forceinline__ void batches_left() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
#endif
}

// The addresses of a thread's vectors, in order. `begin`: where the tile starts, in units of 16 bytes.
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

// The block's sums of its channels, valid in each thread that has one in a table; read by `sum_of`.
__device__ __forceinline__ Pair sum_block(Pair (&own)[1], const Rows<V, RAGGED_VECTORS>&) {
  return block_sum(own[0]);
}

__device__ __forceinline__ Pair sum_of(const Pair& sum, int) { return sum; }
__device__ __forceinline__ Pair sum_of(const Pair* sums, int i) { return sums[i]; }
