// finalize_moments and normalize in one launch, after the second message of float64 data. Each block
// finalizes its own channels. The first slice of each channel writes the results, which no block of
// this launch reads.
#include "memory.cuh"
#include "numeric.cuh"
#include "geometry.cuh"
#include "normalize.cuh"
#include "finalize.cuh"

extern "C" __global__ void __launch_bounds__(MAX_THREADS, WRITING_BLOCKS - 1)
normalize_recentred(scalar_t* y, unsigned char* relu_bits, double* mean, double* var,
                    double* invstd, param_t* running_mean, param_t* running_var,
                    const scalar_t* x, const scalar_t* residual, const double* weighted,
                    const double* recentred, const param_t* weight, const param_t* bias,
                    MASKED(const unsigned char* mask,) double count, double eps, double factor,
                    i64 relu, i64 n, i64 c, i64 l, i64 slice_length, i64 tile_channels, i64 line_samples) {
  const Shape shape{n, c, l, slice_length, tile_channels, line_samples};
  const MomentSums sums{weighted, recentred, count, eps, factor};
  const Statistics out{mean, var, invstd, running_mean, running_var};
  const Parameters parameters{weight, bias};
  // in reverse order: what the reduction read last may still be in L2
  Walk walk(shape, gridDim.x - 1 - blockIdx.x, gridDim.y - 1 - blockIdx.y, misalignment_of(x));
  normalize_tile(walk, y, relu_bits, x, residual, mask, relu, shape, [&](bool active, i64 channel) {
    bool writes = active && walk.slice == 0;
    Channel found = finalize(active, writes, channel, RECENTRED, sums, out);
    parameters.load(active, channel, found);
    return found;
  });
}
