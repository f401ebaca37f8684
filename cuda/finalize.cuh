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

struct Running {
  double mean, var;
};

// `writes`: who alone reads the running statistics and writes.
__device__ __forceinline__ Running load_running(bool writes, i64 channel, const Statistics& out) {
  Running running{0, 0};
  if (out.running_mean) {
    running.mean = load_if(writes, out.running_mean + channel);
    running.var = load_if(writes, out.running_var + channel);
  }
  return running;
}

// The one place where a variance is clamped; a comparison, because fmax would swallow a NaN.
__device__ __forceinline__ double variance_of(double m2, double n) { return (m2 < 0 ? 0 : m2) / n; }

// Whatever is multiplied and added in one step is said to be: the compiler would choose for itself in
// every kernel, and the bits differ.
__device__ __forceinline__ Channel keep(bool writes, bool updates, i64 channel, double mean,
                                        double variance, const Running& old, const MomentSums& sums,
                                        const Statistics& out) {
  double invstd = 1 / sqrt(variance + sums.eps);
  store_if(writes, out.mean + channel, mean);
  store_at(writes, out.var, channel, variance);
  store_if(writes, out.invstd + channel, invstd);
  if (out.running_mean && updates) {
    double n = sums.count;
    double unbiased = variance * (n / (n > 1 ? n - 1 : 1));
    double kept = 1 - sums.factor;
    bool active = writes && n > 0;
    store_if(active, out.running_mean + channel,
             static_cast<param_t>(fma(sums.factor, mean, kept * old.mean)));
    store_if(active, out.running_var + channel,
             static_cast<param_t>(fma(sums.factor, unbiased, kept * old.var)));
  }
  return {mean, invstd, 1, 0};
}

__device__ __forceinline__ Channel finalize(bool active, bool writes, i64 channel, i64 form,
                                            const MomentSums& sums, const Statistics& out) {
  Running old = load_running(writes, channel, out);
  double mean = old.mean, variance = old.var, n = sums.count > 0 ? sums.count : 1;
  if (form != RUNNING) {
    double m2 = load_if(active, sums.second + channel);
    mean = load_if(active, sums.first + channel);
    if (form != LOCAL) {
      double weighted = mean;
      mean = weighted / n;
      if (form == POOLED) m2 = fma(-weighted, mean, m2);
    }
    variance = variance_of(m2, n);
  }
  return keep(writes, form != RUNNING, channel, mean, variance, old, sums, out);
}
