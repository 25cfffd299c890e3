// Batch normalisation over all axes but the channel axis, then an activation: training and inference.
//
// Formulas:  mean[c] = 1/N sum_n x[n,c]                  over the N rows of a channel, see lib/reduce/rows.cuh
//            var[c]  = 1/N sum_n (x[n,c] - mean[c])^2    biased
//            rstd[c] = 1 / sqrt(var[c] + eps)
//            y[n,c]  = phi(gamma[c] (x[n,c] - mean[c]) rstd[c] + beta[c] + residual[n,c])
//            running_mean[c] = (1 - momentum) running_mean[c] + momentum mean[c]
//            running_var[c]  = (1 - momentum) running_var[c] + momentum var[c] N/divisor     divisor: N or N - 1
//            Inference uses the running statistics as mean and var, and does not change them.
// Arrays:    x (outer, C, inner), any strides; residual like x, may be null (0); y in C order, may alias x or residual;
//            all of type T: float, double, or 16 bits (lib/numbers/half.cuh). A is float for 16-bit T, else T. gamma,
//            beta, running_mean, running_var (C,), of type A; each may be null (1, 0, not tracked). statistics (3, C),
//            of type A: the rows mean, mean_low, rstd. mean + mean_low is the mean to about twice the precision of A:
//            rounding it to one A would cause an error in y of that rounding times rstd.
// Launch:    Block (w, l, 1), grid (ceil(C/w), 1, 1), shared memory 3 w l sizeof(A). Thread (i, j) owns the channel c =
//            w blockIdx.x + i and its rows j, j + l, j + 2l, ...: neighbouring threads read neighbouring channels, or
//            for w = 1 neighbouring rows. Every thread has a row: N >= l. No block waits for another. registers4, 8,
//            16: a thread's rows, at most that many, stay in registers; registers4 requires inner = 1. two_pass: chunks
//            of VALUES rows, read twice. 64 x 20: one block (20, 16, 1), 4 values a thread, one barrier; with more than
//            64 workers two barriers. Inference: the same blocks, grid (ceil(C/w), tiles of rows, 1), no shared memory,
//            no barrier.
// Traffic:   registers and inference: N C reads and N C writes of T; two_pass: 2 N C reads and N C writes. A residual
//            adds N C reads. Parameters and statistics: a few times C.
// Numerics:  In A. A thread sums its rows in a pair (lib/numbers/pair.cuh), forms their mean, then the squares about
//            that mean; partial results merge after Chan, Golub and LeVeque (1983). E[x^2] - E[x]^2 is not used. A
//            constant channel gives exactly phi(beta). A variance beyond the range of A counts as infinite: y =
//            phi(beta). NaN and infinity stay in their channel. Deterministic: workers merge in ascending order, more
//            than 64 of them first 32 at a time.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithms 1 and 2.
// Called by: bnkernels/ops/batch_norm/training.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/half.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/moments.cuh"
#include "lib/reduce/rows.cuh"

template <typename T, typename A>
struct BatchNormForward {
    const T* x;
    const T* residual;
    const A* gamma;
    const A* beta;
    T* y;
    A* statistics;
    A* running_mean;
    A* running_var;
    long long outer, channels, inner;
    long long x_outer, x_channel, x_inner;  // strides, in elements
    long long residual_outer, residual_channel, residual_inner;
    A momentum, divisor, eps, alpha;
    int activation;
};

template <typename T, typename A>
struct BatchNormInference {
    const T* x;
    const T* residual;
    const A* gamma;
    const A* beta;
    T* y;
    const A* running_mean;
    const A* running_var;
    long long outer, channels, inner;
    long long x_outer, x_channel, x_inner;  // strides, in elements
    long long residual_outer, residual_channel, residual_inner;
    A eps, alpha;
    int activation;
};

// Loads the thread's next VALUES rows, or as many as are left; returns their number.
template <typename T, typename A, int VALUES, bool MATRIX>
__device__ __forceinline__ int load_rows(A (&values)[VALUES], const BatchNormForward<T, A>& a, long long c,
                                         Rows<MATRIX>& rows) {
    const T* channel = a.x + c * a.x_channel;
    int count = 0;
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (rows.inside()) {
            values[i] = A(channel[rows.at(a.x_outer, a.x_inner)]);
            ++count;
            rows.advance();
        }
    return count;
}

template <typename A>
__device__ __forceinline__ void store_moments(A* partial, const Moments<A>& own) {
    const int plane = blockDim.x * blockDim.y;
    A* slot = partial + threadIdx.y * blockDim.x + threadIdx.x;
    slot[0] = own.mean.high;
    slot[plane] = own.mean.low;
    slot[2 * plane] = value(own.m2);
}

template <typename T, typename A>
__device__ __forceinline__ void write_statistics(const BatchNormForward<T, A>& a, long long c, const Moments<A>& all,
                                                 A rstd) {
    a.statistics[c] = all.mean.high;
    a.statistics[a.channels + c] = all.mean.low;
    a.statistics[2 * a.channels + c] = rstd;
    const A keep = A(1) - a.momentum, var = value(all.m2) / a.divisor;
    if (a.running_mean) a.running_mean[c] = fma(a.momentum, all.mean.high, keep * a.running_mean[c]);
    if (a.running_var) a.running_var[c] = fma(a.momentum, var, keep * a.running_var[c]);
}

// Normalises, activates and writes the next `count` rows, of which `values` holds x - mean; overwrites `values`.
template <int VALUES, bool MATRIX, typename Arguments, typename A>
__device__ __forceinline__ void write_rows(const Arguments& a, long long c, Rows<MATRIX>& rows, A (&values)[VALUES],
                                           int count, A scale, A beta) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) values[i] = fma(scale, values[i], beta);
    if (a.residual) {
        const auto* residual = a.residual + c * a.residual_channel;
        Rows<MATRIX> row = rows;
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            if (i < count) {
                values[i] += A(residual[row.at(a.residual_outer, a.residual_inner)]);
                row.advance();
            }
    }
    if (a.activation == LINEAR) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            if (i < count) {
                store(a.y[rows.at_output(a.channels, c)], linear(values[i], values[i], a.alpha));
                rows.advance();
            }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        store(a.y[rows.at_output(a.channels, c)], curved(values[0], a.activation, a.alpha));
        rotate(values);
        rows.advance();
    }
}

template <typename T, typename A, int VALUES, bool HELD, bool MATRIX>
__device__ __forceinline__ void batch_norm_forward(const BatchNormForward<T, A>& a) {
    BNK_DYNAMIC_SHARED(A, partial);  // [mean.high, mean.low, m2][worker][channel of the slice]
    const int workers = blockDim.y, worker = threadIdx.y;
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = c < a.channels;  // no early return: every thread must reach the barriers
    const Rows<MATRIX> first(a.outer, a.inner, worker, workers);
    const RowCounts counts(a.outer * a.inner, workers);
    A values[VALUES];
    int count = 0;

    if (active) {
        Rows<MATRIX> rows = first;
        count = load_rows(values, a, c, rows);
        Moments<A> own = moments_of(values, count);
        if (!HELD)
            while (rows.inside()) {
                count = load_rows(values, a, c, rows);
                own = merge(own, moments_of(values, count));
            }
        store_moments(partial, own);
    }
    __syncthreads();
    const A* const slots = partial + threadIdx.x;
    const int width = blockDim.x, plane = width * workers;
    int step = 1;
    if (workers > SERIAL_WORKERS) {
        step = MERGE_FAN_IN;
        if (active && worker % MERGE_FAN_IN == 0)
            store_moments(partial, merge_workers(slots + worker * width, plane, width, counts, worker,
                                                 min(worker + MERGE_FAN_IN, workers), 1));
        __syncthreads();
    }
    if (!active) return;

    const Moments<A> all = merge_workers(slots, plane, step * width, counts, 0, workers, step);
    const A rstd = A(1) / sqrt(value(all.m2) / all.count + a.eps);
    if (worker == 0) write_statistics(a, c, all, rstd);

    const A scale = a.gamma ? a.gamma[c] * rstd : rstd, beta = a.beta ? a.beta[c] : A(0);
    Rows<MATRIX> rows = first;
    while (rows.inside()) {
        if (!HELD) {
            Rows<MATRIX> ahead = rows;
            count = load_rows(values, a, c, ahead);
        }
#pragma unroll
        for (int i = 0; i < VALUES; ++i) values[i] = subtract(values[i], all.mean);
        write_rows(a, c, rows, values, count, scale, beta);
    }
}

template <typename T, typename A>
__device__ __forceinline__ void batch_norm_inference(const BatchNormInference<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= a.channels) return;
    const A mean = a.running_mean[c], rstd = A(1) / sqrt(a.running_var[c] + a.eps);
    const A scale = a.gamma ? a.gamma[c] * rstd : rstd, beta = a.beta ? a.beta[c] : A(0);
    Rows<false> rows(a.outer, a.inner, blockIdx.y * blockDim.y + threadIdx.y, gridDim.y * blockDim.y);
    while (rows.inside()) {
        A value[1] = {A(a.x[rows.at(a.x_outer, a.x_inner) + c * a.x_channel]) - mean};
        write_rows(a, c, rows, value, 1, scale, beta);
    }
}

#define BATCH_NORM_FORWARD(variant, suffix, T, A, min_blocks, values, held, matrix)                    \
    BNK_KERNEL(bnk_batch_norm_forward_##variant##_##suffix, (BatchNormForward<T, A>), 512, min_blocks, \
               (batch_norm_forward<T, A, values, held, matrix>))
#define BATCH_NORM_INFERENCE(suffix, T, A) \
    BNK_KERNEL(bnk_batch_norm_inference_##suffix, (BatchNormInference<T, A>), 512, 0, (batch_norm_inference<T, A>))

BATCH_NORM_FORWARD(registers4, f32, float, float, 0, 4, true, true)
BATCH_NORM_FORWARD(registers16, f32, float, float, 0, 16, true, false)
BATCH_NORM_FORWARD(two_pass, f32, float, float, 0, 4, false, false)
BATCH_NORM_INFERENCE(f32, float, float)
BATCH_NORM_FORWARD(registers4, f16, Float16, float, 0, 4, true, true)
BATCH_NORM_FORWARD(registers16, f16, Float16, float, 0, 16, true, false)
BATCH_NORM_FORWARD(two_pass, f16, Float16, float, 0, 4, false, false)
BATCH_NORM_INFERENCE(f16, Float16, float)
BATCH_NORM_FORWARD(registers4, bf16, BFloat16, float, 0, 4, true, true)
BATCH_NORM_FORWARD(registers16, bf16, BFloat16, float, 0, 16, true, false)
BATCH_NORM_FORWARD(two_pass, bf16, BFloat16, float, 0, 4, false, false)
BATCH_NORM_INFERENCE(bf16, BFloat16, float)
BATCH_NORM_FORWARD(registers4, f64, double, double, 1, 4, true, true)
BATCH_NORM_FORWARD(registers8, f64, double, double, 1, 8, true, false)
BATCH_NORM_FORWARD(two_pass, f64, double, double, 1, 4, false, false)
BATCH_NORM_INFERENCE(f64, double, double)
