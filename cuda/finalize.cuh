// The statistics of one channel from its moments, and the update of its running statistics.
#pragma once
#include "numeric.cuh"

// What `first` and `second` are. LOCAL: mean and m2. POOLED: sums over the ranks, of count * mean and of
// m2 + count * mean^2. RECENTRED: the sum of count * mean, and m2 about the pooled mean. RUNNING: unused;
// the running statistics serve as the batch's and are not updated.
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
  param_t* running_mean;  // both may be null
  param_t* running_var;
};

struct Running {
  double mean, var;
};

// `writes` is true in one thread per channel: only that one reads the running statistics and writes.
__device__ __forceinline__ Running load_running(bool writes, i64 channel, const Statistics& out) {
  Running running{0, 0};
  if (out.running_mean) {
    running.mean = load_if(writes, out.running_mean + channel);
    running.var = load_if(writes, out.running_var + channel);
  }
  return running;
}

// The only place where a variance is clamped. A comparison, because fmax would turn a NaN into 0.
__device__ __forceinline__ double variance_of(double m2, double n) { return (m2 < 0 ? 0 : m2) / n; }

// Every fused multiply-add is written as one: otherwise the compiler chooses in each kernel which products
// to fuse, and the last bits differ between kernels.
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
