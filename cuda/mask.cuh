// A mask has shape (N, L): one byte for each position of an (N, C, L) tensor, nonzero where the values of
// all channels are valid. The macro MASK says how the bytes of a vector are loaded. Without it no
// instruction for masks is compiled.
#pragma once
#include "memory.cuh"

// ONE_BYTE: a vector's elements share a byte. AT_ONCE: one load of V bytes. EACH_BYTE: V loads.
enum MaskLoads { UNMASKED, ONE_BYTE, AT_ONCE, EACH_BYTE };

#undef MASKED
#ifdef MASK
#define MASKED(...) __VA_ARGS__
constexpr MaskLoads MASK_LOADS = MASK;
#else
#define MASKED(...)
constexpr MaskLoads MASK_LOADS = UNMASKED;
constexpr const unsigned char* mask = nullptr;  // replaces the argument
#endif

// Which of the V elements of a vector are valid.
template <int V> struct ValidElements {
  static constexpr int BYTES = MASK_LOADS == AT_ONCE || MASK_LOADS == EACH_BYTE ? V : 1;

  Pack<unsigned char, BYTES> bytes;

  __device__ __forceinline__ bool operator[](int j) const {
    return MASK_LOADS == UNMASKED || bytes.v[BYTES == 1 ? 0 : j] != 0;
  }

  __device__ __forceinline__ bool any() const {
    bool found = false;
#pragma unroll
    for (int j = 0; j < BYTES; ++j) found = found || (*this)[j];
    return found;
  }
};

__device__ __forceinline__ bool is_valid(bool active, const unsigned char* mask, i64 position) {
  return MASK_LOADS == UNMASKED || load_if(active, mask + position) != 0;
}

// A valid position, the same in all lanes of all warps of a launch; 0 if there is none. Usually one of
// the first 32, which are one sector. Otherwise each lane searches a part of the mask, so that many
// masked samples at the start cost little time.
__device__ __forceinline__ i64 any_valid(const unsigned char* mask, i64 positions) {
  i64 part = (positions + 31) / 32, lane = threadIdx.x % 32;
  i64 stride = 1, i = 0;
#pragma unroll 1
  do {
    bool found = is_valid(lane * stride + i < positions, mask, lane * stride + i);
    unsigned lanes = __ballot_sync(0xffffffffu, found);
    if (lanes) return __popc((lanes & -lanes) - 1) * stride + i;  // of the lowest such lane
    i += stride == part ? 1 : 0;
    stride = part;
  } while (i < part);
  return 0;
}
