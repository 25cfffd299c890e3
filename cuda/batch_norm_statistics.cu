// Merges the moments of several parts of a mini-batch into its statistics, for synchronised batch norm, in one launch.
//
// Formulas:  Over the parts k that have rows:
//            count[c] = sum_k count[k,c],  mean[c] = sum_k count[k,c] mean[k,c] / count[c]
//            m2[c] = sum_k (m2[k,c] + count[k,c] (mean[k,c] - mean[c])^2),  var = m2 / count
//            rstd[c] = 1 / sqrt(var + eps)
//            running_mean, running_var as in batch_norm_forward.cu, with the divisor count - correction
//            Without any rows all outputs are 0 and the running statistics are unchanged; running_var also if its
//            divisor is 0.
// Arrays:    moments (parts, 4, C): count, mean, mean_low and m2 of every part. merged (4, C): the same of all parts.
//            statistics (3, C): mean, mean_low, rstd, the input of batch norm. running_mean, running_var (C,), may be
//            null. All of type A, in C order.
// Launch:    Block (w, 1, 1), grid (ceil(C/w), 1, 1), no shared memory, no barrier: a thread merges one channel.
// Traffic:   4 parts C reads, 7 C writes, and the running statistics.
// Numerics:  In A, distances of the means from the first and sums of squares in pairs (lib/reduce/parts.cuh), parts in
//            ascending order: deterministic, and the same on every device that merges the same parts. A variance beyond
//            the range of A counts as infinite.
// Reference: Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983.
// Called by: bnkernels/ops/batch_norm/in_parts.py
#include "lib/kernel.cuh"
#include "lib/numbers/rsqrt.cuh"
#include "lib/reduce/parts.cuh"

template <typename A>
struct BatchNormStatistics {
    const A* moments;
    A* merged;
    A* statistics;
    A* running_mean;
    A* running_var;
    long long parts, channels;
    A momentum, correction, eps;
};

template <typename A>
__device__ __forceinline__ void batch_norm_statistics(const BatchNormStatistics<A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= a.channels) return;
    PartSum<A> sum({A(0), A(0), A(0), A(0)});
#pragma unroll 1
    for (long long i = 0; i < a.parts; ++i) {
        const A* const part = a.moments + 4 * i * a.channels + c;
        sum.add_part({part[a.channels], part[2 * a.channels], part[3 * a.channels], part[0]});
    }
    const Part<A> all = sum.part();
    const A divisor = all.count - a.correction, keep = A(1) - a.momentum;
    a.merged[c] = all.count;
    a.merged[a.channels + c] = a.statistics[c] = all.high;
    a.merged[2 * a.channels + c] = a.statistics[a.channels + c] = all.low;
    a.merged[3 * a.channels + c] = all.m2;
    a.statistics[2 * a.channels + c] = all.count > A(0) ? reciprocal_sqrt(all.m2 / all.count + a.eps) : A(0);
    if (all.count == A(0)) return;
    if (a.running_mean) a.running_mean[c] = fma(a.momentum, all.high, keep * a.running_mean[c]);
    if (a.running_var && divisor > A(0)) a.running_var[c] = fma(a.momentum, all.m2 / divisor, keep * a.running_var[c]);
}

#define BATCH_NORM_STATISTICS(suffix, A) \
    BNK_KERNEL(bnk_batch_norm_statistics_##suffix, (BatchNormStatistics<A>), 128, 0, (batch_norm_statistics<A>))

BATCH_NORM_STATISTICS(f32, float)
BATCH_NORM_STATISTICS(f64, double)
