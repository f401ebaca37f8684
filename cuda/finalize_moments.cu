// Mean, variance and inverse deviation of the batch, and the running statistics, in one launch of
// one thread a channel. Nothing here sees the data.
#include "memory.cuh"
#include "numeric.cuh"

// FORM says what `first` and `second` are: 0 the mean and m2; 1 sums over the ranks of
// count * mean and m2 + count * mean^2; 2 the sum of count * mean, and m2 about the pooled mean.
extern "C" __global__ void finalize_moments(double* mean, double* var, double* invstd,
                                            param_t* running_mean, param_t* running_var,
                                            const double* first, const double* second,
                                            double count, double eps, double factor, i64 c) {
  i64 channel = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  bool active = channel < c;
  bool counted = count > 0;
  double n = counted ? count : 1;
  double center = load_if(active, first + channel);
  double m2 = load_if(active, second + channel);
#if FORM > 0
  double weighted = center;
  center = weighted / n;
#if FORM == 1
  m2 -= weighted * center;
#endif
  store_if(active, mean + channel, center);
#endif
  // The one place where a variance is clamped; a comparison, because fmax would swallow a NaN.
  double variance = (m2 < 0 ? 0 : m2) / n;
  store_if(active, var + channel, variance);
  store_if(active, invstd + channel, 1 / sqrt(variance + eps));
  if (running_mean) {
    double unbiased = variance * (n / (n > 1 ? n - 1 : 1));
    double old_mean = load_if(active, running_mean + channel);
    double old_var = load_if(active, running_var + channel);
    active = active && counted;
    store_if(active, running_mean + channel,
             static_cast<param_t>((1 - factor) * old_mean + factor * center));
    store_if(active, running_var + channel,
             static_cast<param_t>((1 - factor) * old_var + factor * unbiased));
  }
}

// The second message of float64 data: m2 about the pooled mean, which lost no digit in a sum.
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
