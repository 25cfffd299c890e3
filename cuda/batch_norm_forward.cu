// Batch normalisation of an (N, C) mini-batch, then an activation: training and inference, one launch each.
//
// Formulas:  mean[c] = 1/N sum_n x[n,c]                       over the mini-batch
//            var[c]  = 1/N sum_n (x[n,c] - mean[c])^2         biased
//            rstd[c] = 1 / sqrt(var[c] + eps)
//            y[n,c]  = phi(gamma[c] (x[n,c] - mean[c]) rstd[c] + beta[c])
//            running_mean[c] = (1 - momentum) running_mean[c] + momentum mean[c]
//            running_var[c]  = (1 - momentum) running_var[c] + momentum var[c] N/(N-1)     unbiased
//            Inference takes mean and var from the running statistics and changes nothing.
// Arrays:    x (N, C), any strides; y (N, C), C order, may be x itself; both of type T.
//            gamma, beta, running_mean, running_var (C,), of type A; any of them may be null (1, 0, not tracked).
//            statistics (3, C), of type A: the rows mean, mean_low, rstd. mean + mean_low is the mean to about twice
//            the precision of A: what is lost in rounding it to one A would come back, times rstd, as an error of y.
// Launch:    block (w, l, 1), grid (ceil(C/w), 1, 1), shared memory 3 w l sizeof(A). Thread (i, j) owns the channel
//            c = w blockIdx.x + i and its rows j, j + l, j + 2l, ...: neighbouring threads read neighbouring channels,
//            so a block reads whole rows of its slice. No block ever waits for another: partition by neuron.
//            N >= l: every thread has a row.
//            held: a thread's rows, at most VALUES of them, stay in registers. streamed: chunks of VALUES rows.
//            64 x 20: one block (20, 16, 1), 4 values a thread, one barrier.
//            Inference: the same blocks, grid (ceil(C/w), rows in tiles, 1), no shared memory, no barrier.
// Traffic:   held and inference N C reads and N C writes of T; streamed 2 N C reads and N C writes. And a few times C.
// Numerics:  in A. A thread sums its rows in a pair (common.cuh), forms their mean, then the squares about that mean;
//            partial results merge after Chan, Golub and LeVeque (1983). No E[x^2] - E[x]^2 anywhere. A constant
//            channel gives exactly phi(beta). A variance beyond the range of A counts as infinite: y = phi(beta).
//            NaN and infinity stay in their channel. Deterministic: every thread merges in the order of the lanes.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithms 1 and 2.
// Called by: bnkernels/batch_norm.py
#include "common.cuh"

template <typename T, typename A>
struct BatchNormForward {
    const T* x;
    const A* gamma;
    const A* beta;
    T* y;
    A* statistics;
    A* running_mean;
    A* running_var;
    long long rows, channels;
    long long row_stride, channel_stride;  // of x, in elements
    A momentum, eps;
    int activation;
};

template <typename T, typename A>
struct BatchNormInference {
    const T* x;
    const A* gamma;
    const A* beta;
    T* y;
    const A* running_mean;
    const A* running_var;
    long long rows, channels;
    long long row_stride, channel_stride;  // of x, in elements
    A eps;
    int activation;
};

// Count, mean and sum of squared differences from the mean, of some rows of one channel.
template <typename A>
struct Moments {
    A count;
    Pair<A> mean, m2;
};

// Of the first `count` of the values that a thread holds; 1 <= count <= VALUES.
template <int VALUES, typename A>
__device__ __forceinline__ Moments<A> moments_of(const A (&values)[VALUES], int count) {
    Pair<A> sum = {A(0), A(0)};
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (i < count) sum = add(sum, values[i]);
    const Pair<A> mean = divide(sum, A(count));
    A m2 = A(0);
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (i < count) m2 += subtract(values[i], mean) * subtract(values[i], mean);
    return {A(count), mean, {m2, A(0)}};
}

// Chan, Golub and LeVeque's merge of two disjoint sets of rows.
template <typename A>
__device__ __forceinline__ Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
    const A count = a.count + b.count;
    const A delta = (b.mean.high - a.mean.high) + (b.mean.low - a.mean.low);
    const Pair<A> mean = divide(add(multiply(a.mean, a.count), multiply(b.mean, b.count)), count);
    const Pair<A> m2 = add(add(a.m2, b.m2), delta * delta * (a.count * (b.count / count)));
    return {count, mean, m2};
}

// Rows row, row + lanes, row + 2 lanes, ... of a column, as many as there are and fit; returns how many.
template <typename T, typename A, int VALUES>
__device__ __forceinline__ int load_rows(A (&values)[VALUES], const T* column, long long row, long long rows,
                                         long long row_stride) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < VALUES; ++i, row += blockDim.y)
        if (row < rows) {
            values[i] = A(column[row * row_stride]);
            ++count;
        }
    return count;
}

// Mean and M2 of a channel over the whole mini-batch, from the lanes' in shared memory. Every thread merges all lanes of
// its channel itself, in the same order: that is cheaper than a second barrier.
template <typename A>
__device__ __forceinline__ Moments<A> merge_lanes(const A* partial, long long rows) {
    const int width = blockDim.x, lanes = blockDim.y, plane = lanes * width;
    const long long rounds = rows / lanes;
    const int longer = (int)(rows - rounds * lanes);  // the first lanes own one row more
    Pair<A> sum = {A(0), A(0)};
    for (int j = 0; j < lanes; ++j) {
        const A* lane = partial + j * width + threadIdx.x;
        const Pair<A> mean = {lane[0], lane[plane]};
        sum = add(sum, multiply(mean, A(rounds + (j < longer))));
    }
    Moments<A> all = {A(rows), divide(sum, A(rows)), {A(0), A(0)}};
    for (int j = 0; j < lanes; ++j) {
        const A* lane = partial + j * width + threadIdx.x;
        const A delta = (lane[0] - all.mean.high) + (lane[plane] - all.mean.low);
        all.m2 = add(all.m2, lane[2 * plane]);
        all.m2 = add(all.m2, delta * delta * A(rounds + (j < longer)));
    }
    return all;
}

template <typename T, typename A>
__device__ __forceinline__ void write_statistics(const BatchNormForward<T, A>& a, long long c, const Moments<A>& all,
                                                 A rstd) {
    a.statistics[c] = all.mean.high;
    a.statistics[a.channels + c] = all.mean.low;
    a.statistics[2 * a.channels + c] = rstd;
    const A keep = A(1) - a.momentum, unbiased = value(all.m2) / A(a.rows - 1);
    if (a.running_mean) a.running_mean[c] = fma(a.momentum, all.mean.high, keep * a.running_mean[c]);
    if (a.running_var) a.running_var[c] = fma(a.momentum, unbiased, keep * a.running_var[c]);
}

template <typename T, typename A, int VALUES, bool HELD>
__device__ __forceinline__ void batch_norm_forward(const BatchNormForward<T, A>& a) {
    BNK_DYNAMIC_SHARED(A, partial);  // [mean.high, mean.low, m2][lane][channel of the slice]
    const int lanes = blockDim.y, lane = threadIdx.y, plane = lanes * blockDim.x;
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long chunk = (long long)VALUES * lanes;
    const bool active = c < a.channels;  // no early return: every thread must reach the barrier
    const T* column = a.x + c * a.channel_stride;
    A values[VALUES];
    int count = 0;

    if (active) {
        count = load_rows(values, column, lane, a.rows, a.row_stride);
        Moments<A> own = moments_of(values, count);
        if (!HELD)
            for (long long row = lane + chunk; row < a.rows; row += chunk) {
                count = load_rows(values, column, row, a.rows, a.row_stride);
                own = merge(own, moments_of(values, count));
            }
        A* slot = partial + lane * blockDim.x + threadIdx.x;
        slot[0] = own.mean.high;
        slot[plane] = own.mean.low;
        slot[2 * plane] = value(own.m2);
    }
    __syncthreads();
    if (!active) return;

    const Moments<A> all = merge_lanes(partial, a.rows);
    const A rstd = A(1) / sqrt(value(all.m2) / all.count + a.eps);
    if (lane == 0) write_statistics(a, c, all, rstd);

    const A scale = a.gamma ? a.gamma[c] * rstd : rstd, beta = a.beta ? a.beta[c] : A(0);
    for (long long row = lane; row < a.rows; row += chunk) {
        if (!HELD) count = load_rows(values, column, row, a.rows, a.row_stride);
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            if (i < count) {
                const A z = fma(scale, subtract(values[i], all.mean), beta);
                a.y[(row + (long long)i * lanes) * a.channels + c] = T(activate(z, a.activation));
            }
    }
}

template <typename T, typename A>
__device__ __forceinline__ void batch_norm_inference(const BatchNormInference<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= a.channels) return;
    const A mean = a.running_mean[c], rstd = A(1) / sqrt(a.running_var[c] + a.eps);
    const A scale = a.gamma ? a.gamma[c] * rstd : rstd, beta = a.beta ? a.beta[c] : A(0);
    const long long step = (long long)gridDim.y * blockDim.y;
    for (long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y; row < a.rows; row += step) {
        const A x = A(a.x[row * a.row_stride + c * a.channel_stride]);
        a.y[row * a.channels + c] = T(activate(fma(scale, x - mean, beta), a.activation));
    }
}

#define BATCH_NORM_FORWARD(variant, suffix, T, A, threads, values, held)                                     \
    using arguments_forward_##variant##_##suffix = BatchNormForward<T, A>;                                   \
    BNK_KERNEL(bnk_batch_norm_forward_##variant##_##suffix, arguments_forward_##variant##_##suffix, threads, \
               (batch_norm_forward<T, A, values, held>))
#define BATCH_NORM_INFERENCE(suffix, T, A)                         \
    using arguments_inference_##suffix = BatchNormInference<T, A>; \
    BNK_KERNEL(bnk_batch_norm_inference_##suffix, arguments_inference_##suffix, 512, (batch_norm_inference<T, A>))

BATCH_NORM_FORWARD(held4, f32, float, float, 512, 4, true)
BATCH_NORM_FORWARD(held4, f64, double, double, 512, 4, true)
BATCH_NORM_FORWARD(held16, f32, float, float, 512, 16, true)
BATCH_NORM_FORWARD(held16, f64, double, double, 256, 16, true)
BATCH_NORM_FORWARD(streamed, f32, float, float, 512, 4, false)
BATCH_NORM_FORWARD(streamed, f64, double, double, 256, 4, false)
BATCH_NORM_INFERENCE(f32, float, float)
BATCH_NORM_INFERENCE(f64, double, double)
