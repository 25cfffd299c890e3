// Gradients of batch normalisation of an (N, C) mini-batch and of the activation behind it, one launch.
//
// Formulas:  xhat[n,c]  = (x[n,c] - mean[c]) rstd[c]
//            g[n,c]     = dy[n,c] phi'(gamma[c] xhat[n,c] + beta[c])      recomputed: no pre-activation is kept
//            dbeta[c]   = sum_n g[n,c]
//            dgamma[c]  = sum_n g[n,c] xhat[n,c]
//            dx[n,c]    = gamma[c] rstd[c] (g[n,c] - (dbeta[c] + xhat[n,c] dgamma[c]) / N)   batch statistics
//            dx[n,c]    = gamma[c] rstd[c] g[n,c]                        running statistics: they do not depend on x
// Arrays:    dy, x (N, C), any strides; dx (N, C), C order, may be dy or x itself; all of type T.
//            gamma, beta (C,), of type A, may be null (1, 0). dgamma, dbeta (C,), of type A, may be null.
//            mean, mean_low, rstd (C,), of type A: the rows of the forward's statistics. With running statistics
//            mean and rstd hold the running mean and the running variance, and mean_low is null.
// Launch:    as the forward: block (w, l, 1), grid (ceil(C/w), 1, 1), shared memory 2 w l sizeof(A); thread (i, j)
//            owns channel c = w blockIdx.x + i and rows j, j + l, j + 2l, ... of it.
//            held: x - mean and g of a thread's rows, at most VALUES, stay in registers. streamed and running: one row at
//            a time; running writes dx while it sums, since dx needs no sum.
// Traffic:   held and running 2 N C reads and N C writes of T; streamed 4 N C reads and N C writes. One barrier.
// Numerics:  in A; both sums in pairs (common.cuh), so dx sums to 0 over the batch as well as rounding allows.
//            Deterministic: every thread merges in the order of the lanes.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3.
// Called by: bnkernels/batch_norm.py
#include "common.cuh"

template <typename T, typename A>
struct BatchNormBackward {
    const T* dy;
    const T* x;
    const A* gamma;
    const A* beta;
    const A* mean;
    const A* mean_low;
    const A* rstd;
    T* dx;
    A* dgamma;
    A* dbeta;
    long long rows, channels;
    long long dy_row_stride, dy_channel_stride;  // in elements
    long long x_row_stride, x_channel_stride;
    A eps;  // for running statistics
    int activation;
};

// What a thread knows of its channel.
template <typename A>
struct Channel {
    Pair<A> mean;
    A rstd, scale, beta;  // scale = gamma rstd
    int activation;

    // The gradient before the activation; the same z, bit for bit, as the forward's.
    __device__ __forceinline__ A gradient(A dy, A centred) const {
        return activation_gradient(dy, fma(scale, centred, beta), activation);
    }
};

// Sums over rows, of g and of g (x - mean).
template <typename A>
struct Sums {
    Pair<A> g, g_centred;

    __device__ __forceinline__ void add_row(A gradient, A centred) {
        g = add(g, gradient);
        g_centred = add(g_centred, gradient * centred);
    }
};

// The block's sums of one channel: every thread merges all lanes itself, in the same order. All threads must call.
template <typename A>
__device__ __forceinline__ Sums<A> sum_over_lanes(const Sums<A>& own) {
    BNK_DYNAMIC_SHARED(A, partial);  // [g, g (x - mean)][lane][channel of the slice]
    const int width = blockDim.x, plane = width * blockDim.y;
    const int slot = threadIdx.y * width + threadIdx.x;
    partial[slot] = value(own.g);
    partial[plane + slot] = value(own.g_centred);
    __syncthreads();
    Sums<A> total = {};
    for (int other = threadIdx.x; other < plane; other += width) {
        total.g = add(total.g, partial[other]);
        total.g_centred = add(total.g_centred, partial[plane + other]);
    }
    return total;
}

template <typename T, typename A>
__device__ __forceinline__ void write_parameter_gradients(const BatchNormBackward<T, A>& a, long long c, A rstd,
                                                          const Sums<A>& total) {
    if (threadIdx.y != 0 || c >= a.channels) return;
    if (a.dgamma) a.dgamma[c] = value(total.g_centred) * rstd;
    if (a.dbeta) a.dbeta[c] = value(total.g);
}

template <typename T, typename A>
__device__ __forceinline__ Channel<A> load_channel(const BatchNormBackward<T, A>& a, long long c) {
    Channel<A> channel;
    channel.mean = {a.mean[c], a.mean_low ? a.mean_low[c] : A(0)};
    channel.rstd = a.mean_low ? a.rstd[c] : A(1) / sqrt(a.rstd[c] + a.eps);
    channel.scale = a.gamma ? a.gamma[c] * channel.rstd : channel.rstd;
    channel.beta = a.beta ? a.beta[c] : A(0);
    channel.activation = a.activation;
    return channel;
}

// VALUES rows a thread stay in registers; VALUES = 0: rows are read again for dx.
template <typename T, typename A, int VALUES>
__device__ __forceinline__ void batch_norm_backward(const BatchNormBackward<T, A>& a) {
    constexpr bool HELD = VALUES > 0;
    constexpr int SLOTS = HELD ? VALUES : 1;
    const int lanes = blockDim.y;
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = c < a.channels;  // no early return: every thread must reach the barrier
    const T* dy = a.dy + c * a.dy_channel_stride;
    const T* x = a.x + c * a.x_channel_stride;
    Channel<A> channel = {};
    Sums<A> sums = {};
    A centred[SLOTS], g[SLOTS];

    if (active) {
        channel = load_channel(a, c);
        for (long long row = threadIdx.y; row < a.rows; row += (long long)SLOTS * lanes) {
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                const long long at = row + (long long)i * lanes;
                if (at >= a.rows) continue;
                centred[i] = subtract(A(x[at * a.x_row_stride]), channel.mean);
                g[i] = channel.gradient(A(dy[at * a.dy_row_stride]), centred[i]);
                sums.add_row(g[i], centred[i]);
            }
        }
    }
    const Sums<A> total = sum_over_lanes(sums);
    write_parameter_gradients(a, c, channel.rstd, total);
    if (!active) return;

    const A mean_g = value(total.g) / A(a.rows);
    const A slope = value(total.g_centred) * channel.rstd * channel.rstd / A(a.rows);  // dgamma rstd / N
    for (long long row = threadIdx.y; row < a.rows; row += (long long)SLOTS * lanes) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const long long at = row + (long long)i * lanes;
            if (at >= a.rows) continue;
            if (!HELD) {
                centred[i] = subtract(A(x[at * a.x_row_stride]), channel.mean);
                g[i] = channel.gradient(A(dy[at * a.dy_row_stride]), centred[i]);
            }
            a.dx[at * a.channels + c] = T(channel.scale * (g[i] - fma(centred[i], slope, mean_g)));
        }
    }
}

template <typename T, typename A>
__device__ __forceinline__ void batch_norm_inference_backward(const BatchNormBackward<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    Channel<A> channel = {};
    Sums<A> sums = {};
    if (c < a.channels) {
        channel = load_channel(a, c);
#pragma unroll 1  // unrolled it needs a stack on sm_120
        for (long long row = threadIdx.y; row < a.rows; row += blockDim.y) {
            const A centred = subtract(A(a.x[row * a.x_row_stride + c * a.x_channel_stride]), channel.mean);
            const A g = channel.gradient(A(a.dy[row * a.dy_row_stride + c * a.dy_channel_stride]), centred);
            sums.add_row(g, centred);
            a.dx[row * a.channels + c] = T(channel.scale * g);
        }
    }
    write_parameter_gradients(a, c, channel.rstd, sum_over_lanes(sums));
}

#define BATCH_NORM_BACKWARD(variant, suffix, T, A, threads, body)   \
    using arguments_##variant##_##suffix = BatchNormBackward<T, A>; \
    BNK_KERNEL(bnk_batch_norm_##variant##_##suffix, arguments_##variant##_##suffix, threads, body)

BATCH_NORM_BACKWARD(backward_held4, f32, float, float, 512, (batch_norm_backward<float, float, 4>))
BATCH_NORM_BACKWARD(backward_held4, f64, double, double, 512, (batch_norm_backward<double, double, 4>))
BATCH_NORM_BACKWARD(backward_held16, f32, float, float, 512, (batch_norm_backward<float, float, 16>))
BATCH_NORM_BACKWARD(backward_held16, f64, double, double, 256, (batch_norm_backward<double, double, 16>))
BATCH_NORM_BACKWARD(backward_streamed, f32, float, float, 512, (batch_norm_backward<float, float, 0>))
BATCH_NORM_BACKWARD(backward_streamed, f64, double, double, 256, (batch_norm_backward<double, double, 0>))
BATCH_NORM_BACKWARD(inference_backward, f32, float, float, 512, (batch_norm_inference_backward<float, float>))
BATCH_NORM_BACKWARD(inference_backward, f64, double, double, 256, (batch_norm_inference_backward<double, double>))
