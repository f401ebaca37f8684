// normalize for shapes in which one byte of ReLU bits can belong to two rows.
#include "memory.cuh"
#include "numeric.cuh"
#include "normalize_flat.cuh"

extern "C" __global__ void normalize_flat(scalar_t* y, unsigned char* relu_bits, const scalar_t* x,
                                          const scalar_t* residual, const double* mean,
                                          const double* invstd, const param_t* weight,
                                          const param_t* bias,
                                          MASKED(const unsigned char* mask,) i64 relu, i64 n, i64 c, i64 l) {
  const ChannelArrays arrays{mean, invstd, {weight, bias}};
  normalize_byte(y, relu_bits, x, residual, mask, relu, n, c, l, [&](bool active, i64 i) {
    return arrays.load(active, i / l % c);
  });
}
