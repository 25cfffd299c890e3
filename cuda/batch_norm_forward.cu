// Batch normalisation of a tensor over all axes but the channels', then an activation: training and inference.
//
// Formulas:  mean[c] = 1/N sum_n x[n,c]                       over the mini-batch; n numbers the N rows of a channel,
//            var[c]  = 1/N sum_n (x[n,c] - mean[c])^2         biased                 see channel.cuh
//            rstd[c] = 1 / sqrt(var[c] + eps)
//            y[n,c]  = phi(gamma[c] (x[n,c] - mean[c]) rstd[c] + beta[c] + residual[n,c])
//            running_mean[c] = (1 - momentum) running_mean[c] + momentum mean[c]
//            running_var[c]  = (1 - momentum) running_var[c] + momentum var[c] N/divisor     N or N-1
//            Inference takes mean and var from the running statistics and changes nothing.
// Arrays:    x (outer, C, inner), any strides; residual like x, may be null (0); y C order, may be x or residual itself;
//            all of type T: float, double, or 16 bits (half.cuh), for which A is float; else A is T.
//            gamma, beta, running_mean, running_var (C,), of type A; any of them may be null (1, 0, not tracked).
//            statistics (3, C), of type A: the rows mean, mean_low, rstd. mean + mean_low is the mean to about twice
//            the precision of A: what is lost in rounding it to one A would come back, times rstd, as an error of y.
// Launch:    block (w, l, 1), grid (ceil(C/w), 1, 1), shared memory 3 w l sizeof(A). Thread (i, j) owns the channel
//            c = w blockIdx.x + i and its rows j, j + l, j + 2l, ...: neighbouring threads read neighbouring channels,
//            or where w = 1 neighbouring rows. No block ever waits for another: partition by neuron.
//            N >= l: every thread has a row.
//            held: a thread's rows, at most VALUES of them, stay in registers. streamed: chunks of VALUES rows.
//            held4 is for inner = 1 alone and spares the arithmetic of an inner axis.
//            64 x 20: one block (20, 16, 1), 4 values a thread, one barrier; above 64 lanes two barriers.
//            Inference: the same blocks, grid (ceil(C/w), rows in tiles, 1), no shared memory, no barrier.
// Traffic:   held and inference N C reads and N C writes of T; streamed 2 N C reads and N C writes; N C reads more of a
//            residual. And a few times C.
// Numerics:  in A. A thread sums its rows in a pair (common.cuh), forms their mean, then the squares about that mean;
//            partial results merge after Chan, Golub and LeVeque (1983). No E[x^2] - E[x]^2 anywhere. A constant
//            channel gives exactly phi(beta). A variance beyond the range of A counts as infinite: y = phi(beta).
//            NaN and infinity stay in their channel. Deterministic: lanes merge in their order, above 64 of them
//            first in groups of 32, then the groups.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithms 1 and 2.
// Called by: bnkernels/ops/batch_norm/training.py
#include "activation.cuh"
#include "channel.cuh"
#include "common.cuh"
#include "half.cuh"
#include "moments.cuh"

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

// The next rows of a thread, as many as there are and fit; returns how many.
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

// Activate and write the first `count` of these rows, whose distances from the mean are `values`; uses them up.
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
    BNK_DYNAMIC_SHARED(A, partial);  // [mean.high, mean.low, m2][lane][channel of the slice]
    const int lanes = blockDim.y, lane = threadIdx.y;
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = c < a.channels;  // no early return: every thread must reach the barriers
    const Rows<MATRIX> first(a.outer, a.inner, lane, lanes);
    const Shares shares(a.outer * a.inner, lanes);
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
    const int width = blockDim.x, plane = width * lanes;
    int step = 1;
    if (lanes > SERIAL_LANES) {
        step = GROUP;
        if (active && lane % GROUP == 0)
            store_moments(partial,
                          merge_lanes(slots + lane * width, plane, width, shares, lane, min(lane + GROUP, lanes), 1));
        __syncthreads();
    }
    if (!active) return;

    const Moments<A> all = merge_lanes(slots, plane, step * width, shares, 0, lanes, step);
    const A rstd = A(1) / sqrt(value(all.m2) / all.count + a.eps);
    if (lane == 0) write_statistics(a, c, all, rstd);

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

#define BATCH_NORM_FORWARD(KERNEL, variant, suffix, T, A, threads, values, held, matrix)                 \
    using arguments_forward_##variant##_##suffix = BatchNormForward<T, A>;                               \
    KERNEL(bnk_batch_norm_forward_##variant##_##suffix, arguments_forward_##variant##_##suffix, threads, \
           (batch_norm_forward<T, A, values, held, matrix>))
#define BATCH_NORM_INFERENCE(suffix, T, A)                         \
    using arguments_inference_##suffix = BatchNormInference<T, A>; \
    BNK_KERNEL(bnk_batch_norm_inference_##suffix, arguments_inference_##suffix, 512, (batch_norm_inference<T, A>))

BATCH_NORM_FORWARD(BNK_KERNEL, held4, f32, float, float, 512, 4, true, true)
BATCH_NORM_FORWARD(BNK_KERNEL, held16, f32, float, float, 512, 16, true, false)
BATCH_NORM_FORWARD(BNK_KERNEL, streamed, f32, float, float, 512, 4, false, false)
BATCH_NORM_INFERENCE(f32, float, float)
BATCH_NORM_FORWARD(BNK_KERNEL, held4, f16, Float16, float, 512, 4, true, true)
BATCH_NORM_FORWARD(BNK_KERNEL, held16, f16, Float16, float, 512, 16, true, false)
BATCH_NORM_FORWARD(BNK_KERNEL, streamed, f16, Float16, float, 512, 4, false, false)
BATCH_NORM_INFERENCE(f16, Float16, float)
BATCH_NORM_FORWARD(BNK_KERNEL, held4, bf16, BFloat16, float, 512, 4, true, true)
BATCH_NORM_FORWARD(BNK_KERNEL, held16, bf16, BFloat16, float, 512, 16, true, false)
BATCH_NORM_FORWARD(BNK_KERNEL, streamed, bf16, BFloat16, float, 512, 4, false, false)
BATCH_NORM_INFERENCE(bf16, BFloat16, float)
BATCH_NORM_FORWARD(BNK_KERNEL_ROOMY, held4, f64, double, double, 512, 4, true, true)
BATCH_NORM_FORWARD(BNK_KERNEL_ROOMY, held8, f64, double, double, 512, 8, true, false)
BATCH_NORM_FORWARD(BNK_KERNEL_ROOMY, streamed, f64, double, double, 512, 4, false, false)
BATCH_NORM_INFERENCE(f64, double, double)
