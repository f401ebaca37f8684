// The second message of float64 data: m2 about the pooled mean, which loses no digits to count * mean^2.
#include "memory.cuh"

extern "C" __global__ void recentre_moments(double* recentred, const double* mean, const double* m2,
                                            const double* weighted, double count, double total,
                                            i64 c) {
  i64 channel = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  bool active = channel < c;
  double shift = load_if(active, mean + channel) -
                 load_if(active, weighted + channel) / (total > 0 ? total : 1);
  store_if(active, recentred + channel,
           load_if(active, m2 + channel) + count * (shift * shift));
}
