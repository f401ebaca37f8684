// normalize_recentred for shapes in which one byte of ReLU bits can belong to two rows. The thread that
// has a channel's first value writes the channel's results.
#include "memory.cuh"
#include "numeric.cuh"
#include "normalize_flat.cuh"
#include "finalize.cuh"

extern "C" __global__ void
normalize_recentred_flat(scalar_t* y, unsigned char* relu_bits, double* mean, double* var,
                         double* invstd, param_t* running_mean, param_t* running_var,
                         const scalar_t* x, const scalar_t* residual, const double* weighted,
                         const double* recentred, const param_t* weight, const param_t* bias,
                         MASKED(const unsigned char* mask,) double count, double eps, double factor, i64 relu, i64 n, i64 c, i64 l) {
  const MomentSums sums{weighted, recentred, count, eps, factor};
  const Statistics out{mean, var, invstd, running_mean, running_var};
  const Parameters parameters{weight, bias};
  normalize_byte(y, relu_bits, x, residual, mask, relu, n, c, l, [&](bool active, i64 i) {
    i64 channel = i / l % c;
    bool writes = active && i == channel * l;
    Channel found = finalize(active, writes, channel, RECENTRED, sums, out);
    parameters.load(active, channel, found);
    return found;
  });
}
