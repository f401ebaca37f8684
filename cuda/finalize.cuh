// The statistics of one channel from its moments, and what is kept of them.
#pragma once
#include "numeric.cuh"

// What the inputs are: `first` and `second` the mean and m2; sums over the ranks of count * mean and
// m2 + count * mean^2; the sum of count * mean, and m2 about the pooled mean; or the running
// statistics alone, which are then the batch's and stay as they are.
enum Form { LOCAL, POOLED, RECENTRED, RUNNING };

struct MomentSums {
  const double* first;
  const double* second;
  double count, eps, factor;
};

struct Statistics {
  double* mean;
  double* var;
  double* invstd;
  param_t* running_mean;  // or both null
  param_t* running_var;
};

// `writes`: who alone reads the running statistics and writes. Whatever is multiplied and added in
// one step is said to be: the compiler would choose for itself in every kernel, and the bits differ.
__device__ __forceinline__ Channel finalize(bool active, bool writes, i64 channel, i64 form,
                                            const MomentSums& sums, const Statistics& out) {
  bool given = form == RUNNING, counted = sums.count > 0;
  double n = counted ? sums.count : 1;
  double old_mean = 0, old_var = 0;
  if (out.running_mean) {
    old_mean = load_if(writes, out.running_mean + channel);
    old_var = load_if(writes, out.running_var + channel);
  }
  double center = old_mean, variance = old_var;
  if (!given) {
    double m2 = load_if(active, sums.second + channel);
    center = load_if(active, sums.first + channel);
    if (form != LOCAL) {
      double weighted = center;
      center = weighted / n;
      if (form == POOLED) m2 = fma(-weighted, center, m2);
    }
    // The one place where a variance is clamped; a comparison, because fmax would swallow a NaN.
    variance = (m2 < 0 ? 0 : m2) / n;
  }
  double invstd = 1 / sqrt(variance + sums.eps);
  if (form != LOCAL) store_if(writes, out.mean + channel, center);
  store_if(writes, out.var + channel, variance);
  store_if(writes, out.invstd + channel, invstd);
  if (out.running_mean && !given) {
    double unbiased = variance * (n / (n > 1 ? n - 1 : 1));
    double kept = 1 - sums.factor;
    bool updates = writes && counted;
    store_if(updates, out.running_mean + channel,
             static_cast<param_t>(fma(sums.factor, center, kept * old_mean)));
    store_if(updates, out.running_var + channel,
             static_cast<param_t>(fma(sums.factor, unbiased, kept * old_var)));
  }
  return {center, invstd, 1, 0};
}
