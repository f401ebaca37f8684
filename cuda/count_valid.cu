// Adds the number of nonzero bytes of a mask to `total`. The order does not matter: these are integers.
#include "memory.cuh"

extern "C" __global__ void count_valid(unsigned long long* total, const unsigned char* mask,
                                       i64 positions) {
  i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  unsigned lanes = __ballot_sync(0xffffffffu, load_if(i < positions, mask + i) != 0);
  if (threadIdx.x % 32 == 0) atomicAdd(total, static_cast<unsigned long long>(__popc(lanes)));
}
