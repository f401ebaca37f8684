// y = activation((x - mean) * invstd * weight + bias + residual), and the bits of y > 0.
#include "memory.cuh"
#include "numeric.cuh"
#include "geometry.cuh"
#include "normalize.cuh"

extern "C" __global__ void __launch_bounds__(MAX_THREADS, NORMALIZING_BLOCKS)
normalize(scalar_t* y, unsigned char* relu_bits, const scalar_t* x, const scalar_t* residual,
          const double* mean, const double* invstd, const param_t* weight, const param_t* bias,
          MASKED(const unsigned char* mask,) i64 relu, i64 n, i64 c, i64 l, i64 slice_length, i64 tile_channels, i64 line_samples) {
  const Shape shape{n, c, l, slice_length, tile_channels, line_samples};
  const ChannelArrays arrays{mean, invstd, {weight, bias}};
  // in reverse order: what the reduction read last may still be in L2
  Walk walk(shape, gridDim.x - 1 - blockIdx.x, gridDim.y - 1 - blockIdx.y, misalignment_of(x));
  normalize_tile(walk, y, relu_bits, x, residual, mask, relu, shape, [&](bool active, i64 channel) {
    return arrays.load(active, channel);
  });
}
