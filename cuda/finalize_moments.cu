// Mean, variance and inverse deviation of the batch, and the running statistics, in one launch of
// one thread a channel. Nothing here sees the data.
#include "memory.cuh"
#include "numeric.cuh"

// What the inputs are: `first` and `second` the mean and m2; sums over the ranks of count * mean and
// m2 + count * mean^2; the sum of count * mean, and m2 about the pooled mean; or the running
// statistics alone, which are then the batch's and stay as they are.
enum Form { LOCAL, POOLED, RECENTRED, RUNNING };

extern "C" __global__ void finalize_moments(double* mean, double* var, double* invstd,
                                            param_t* running_mean, param_t* running_var,
                                            const double* first, const double* second,
                                            double count, double eps, double factor, i64 form,
                                            i64 c) {
  i64 channel = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  bool active = channel < c;
  bool given = form == RUNNING, counted = count > 0;
  double n = counted ? count : 1;
  double old_mean = 0, old_var = 0;
  if (running_mean) {
    old_mean = load_if(active, running_mean + channel);
    old_var = load_if(active, running_var + channel);
  }
  double center = old_mean, variance = old_var;
  if (!given) {
    double m2 = load_if(active, second + channel);
    center = load_if(active, first + channel);
    if (form != LOCAL) {
      double weighted = center;
      center = weighted / n;
      if (form == POOLED) m2 -= weighted * center;
    }
    // The one place where a variance is clamped; a comparison, because fmax would swallow a NaN.
    variance = (m2 < 0 ? 0 : m2) / n;
  }
  if (form != LOCAL) store_if(active, mean + channel, center);
  store_if(active, var + channel, variance);
  store_if(active, invstd + channel, 1 / sqrt(variance + eps));
  if (running_mean && !given) {
    double unbiased = variance * (n / (n > 1 ? n - 1 : 1));
    active = active && counted;
    store_if(active, running_mean + channel,
             static_cast<param_t>((1 - factor) * old_mean + factor * center));
    store_if(active, running_var + channel,
             static_cast<param_t>((1 - factor) * old_var + factor * unbiased));
  }
}
