// Mean, variance and inverse standard deviation of the batch, and the running statistics, with one
// thread per channel. The kernel reads moments, not the data.
#include "memory.cuh"
#include "numeric.cuh"
#include "finalize.cuh"

extern "C" __global__ void finalize_moments(double* mean, double* var, double* invstd,
                                            param_t* running_mean, param_t* running_var,
                                            const double* first, const double* second,
                                            double count, double eps, double factor, i64 form,
                                            i64 c) {
  i64 channel = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  bool active = channel < c;
  finalize(active, active, channel, form, MomentSums{first, second, count, eps, factor},
           Statistics{mean, var, invstd, running_mean, running_var});
}
