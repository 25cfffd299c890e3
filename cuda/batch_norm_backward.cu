// Gradients of batch normalisation and of the residual sum and the activation behind it, one launch.
//
// Formulas:  xhat[n,c]  = (x[n,c] - mean[c]) rstd[c]
//            g[n,c]     = dy[n,c] phi'(gamma[c] xhat[n,c] + beta[c] + residual[n,c])     recomputed: nothing is kept
//            dresidual[n,c] = g[n,c]
//            dbeta[c]   = sum_n g[n,c]
//            dgamma[c]  = sum_n g[n,c] xhat[n,c]
//            dx[n,c]    = gamma[c] rstd[c] (g[n,c] - (dbeta[c] + xhat[n,c] dgamma[c]) / N)   batch statistics
//            dx[n,c]    = gamma[c] rstd[c] g[n,c]                        running statistics: they do not depend on x
// Arrays:    dy, x, residual (outer, C, inner), any strides, residual may be null (0); dx, dresidual C order, dresidual
//            may be null, dx may be dy, x or residual itself; all of type T. A as in the forward.
//            gamma, beta (C,), of type A, may be null (1, 0). dgamma, dbeta (C,), of type A, may be null.
//            mean, mean_low, rstd (C,), of type A: the rows of the forward's statistics. With running statistics
//            mean and rstd hold the running mean and the running variance, and mean_low is null.
// Launch:    as the forward: block (w, l, 1), grid (ceil(C/w), 1, 1), shared memory 2 w l sizeof(A); thread (i, j)
//            owns channel c = w blockIdx.x + i and rows j, j + l, j + 2l, ... of it.
//            held: x - mean and g of a thread's rows, at most VALUES, stay in registers. streamed and running: one row at
//            a time; running writes dx while it sums, since dx needs no sum. held4: inner = 1.
// Traffic:   held and running 2 N C reads and N C writes of T; streamed 4 N C reads and N C writes. A residual is read as
//            often as x, and its gradient written once. One barrier, above 64 lanes two.
// Numerics:  in A; both sums in pairs (common.cuh), so dx sums to 0 over the batch as well as rounding allows.
//            Deterministic: lanes merge in their order, above 64 of them first in groups of 32, then the groups.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3.
// Called by: bnkernels/ops/batch_norm/training.py
#include "activation.cuh"
#include "channel.cuh"
#include "common.cuh"
#include "half.cuh"

template <typename T, typename A>
struct BatchNormBackward {
    const T* dy;
    const T* x;
    const T* residual;
    const A* gamma;
    const A* beta;
    const A* mean;
    const A* mean_low;
    const A* rstd;
    T* dx;
    A* dgamma;
    A* dbeta;
    T* dresidual;
    long long outer, channels, inner;
    long long dy_outer, dy_channel, dy_inner;  // strides, in elements
    long long x_outer, x_channel, x_inner;
    long long residual_outer, residual_channel, residual_inner;
    A eps, alpha;  // eps for running statistics
    int activation;
};

// What a thread knows of its channel.
template <typename A>
struct Channel {
    Pair<A> mean;
    A rstd, scale, beta;  // scale = gamma rstd
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

// The sums over the lanes first, first + step, ... below last, from shared memory.
template <typename A>
__device__ __forceinline__ Sums<A> sum_lanes(const A* partial, int first, int last, int step) {
    const int width = blockDim.x, plane = width * blockDim.y;
    Sums<A> total = {};
    for (int lane = first; lane < last; lane += step) {
        const A* slot = partial + lane * width + threadIdx.x;
        total.g = add(total.g, slot[0]);
        total.g_centred = add(total.g_centred, slot[plane]);
    }
    return total;
}

template <typename A>
__device__ __forceinline__ void store_sums(A* partial, const Sums<A>& own) {
    A* slot = partial + threadIdx.y * blockDim.x + threadIdx.x;
    slot[0] = value(own.g);
    slot[blockDim.x * blockDim.y] = value(own.g_centred);
}

// The block's sums of one channel, in the same order for every thread of it. All threads must call.
template <typename A>
__device__ __forceinline__ Sums<A> sum_over_lanes(const Sums<A>& own) {
    BNK_DYNAMIC_SHARED(A, partial);  // [g, g (x - mean)][lane][channel of the slice]
    const int lane = threadIdx.y, lanes = blockDim.y;
    store_sums(partial, own);
    __syncthreads();
    if (lanes <= SERIAL_LANES) return sum_lanes(partial, 0, lanes, 1);
    if (lane % GROUP == 0) store_sums(partial, sum_lanes(partial, lane, min(lane + GROUP, lanes), 1));
    __syncthreads();
    return sum_lanes(partial, 0, lanes, GROUP);
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
    return channel;
}

// What the activation saw: the same, bit for bit, as the forward's.
template <bool MATRIX, typename T, typename A>
__device__ __forceinline__ A before_activation(const BatchNormBackward<T, A>& a, long long c, const Rows<MATRIX>& row,
                                               const Channel<A>& channel, A centred) {
    const A z = fma(channel.scale, centred, channel.beta);
    if (!a.residual) return z;
    return z + A(a.residual[row.at(a.residual_outer, a.residual_inner) + c * a.residual_channel]);
}

// x - mean and g of the rows of a thread from `rows` on, as many as there are and fit; returns how many.
template <int VALUES, bool MATRIX, typename T, typename A>
__device__ __forceinline__ int load_rows(const BatchNormBackward<T, A>& a, long long c, const Channel<A>& channel,
                                         const Rows<MATRIX>& rows, A (&centred)[VALUES], A (&g)[VALUES]) {
    const T* dy = a.dy + c * a.dy_channel;
    const T* x = a.x + c * a.x_channel;
    Rows<MATRIX> row = rows;
    int count = 0;
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (row.inside()) {
            centred[i] = subtract(A(x[row.at(a.x_outer, a.x_inner)]), channel.mean);
            g[i] = A(dy[row.at(a.dy_outer, a.dy_inner)]);
            if (a.activation == LINEAR) g[i] = linear(g[i], before_activation(a, c, row, channel, centred[i]), a.alpha);
            ++count;
            row.advance();
        }
    if (a.activation == LINEAR) return count;
    row = rows;
#pragma unroll 1
    for (int i = 0; i < VALUES; ++i) {
        if (i < count) {
            g[0] *= curved_derivative(before_activation(a, c, row, channel, centred[0]), a.activation, a.alpha);
            row.advance();
        }
        rotate(centred);
        rotate(g);
    }
    return count;
}

// VALUES rows a thread stay in registers; where they are not HELD they are read again for dx.
template <typename T, typename A, int VALUES, bool HELD, bool MATRIX>
__device__ __forceinline__ void batch_norm_backward(const BatchNormBackward<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = c < a.channels;  // no early return: every thread must reach the barriers
    Rows<MATRIX> rows(a.outer, a.inner, threadIdx.y, blockDim.y);
    Channel<A> channel = {};
    Sums<A> sums = {};
    A centred[VALUES], g[VALUES];
    int count = 0;

    if (active) {
        channel = load_channel(a, c);
        Rows<MATRIX> row = rows;
        do {
            count = load_rows(a, c, channel, row, centred, g);
#pragma unroll
            for (int i = 0; i < VALUES; ++i)
                if (i < count) {
                    sums.add_row(g[i], centred[i]);
                    row.advance();
                }
        } while (!HELD && row.inside());
    }
    const Sums<A> total = sum_over_lanes(sums);
    write_parameter_gradients(a, c, channel.rstd, total);
    if (!active) return;

    const A n = A(a.outer * a.inner), mean_g = value(total.g) / n;
    const A slope = value(total.g_centred) * channel.rstd * channel.rstd / n;  // dgamma rstd / N
    do {
        if (!HELD) count = load_rows(a, c, channel, rows, centred, g);
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            if (i < count) {
                const long long at = rows.at_output(a.channels, c);
                store(a.dx[at], channel.scale * (g[i] - fma(centred[i], slope, mean_g)));
                if (a.dresidual) store(a.dresidual[at], g[i]);
                rows.advance();
            }
    } while (!HELD && rows.inside());
}

template <typename T, typename A>
__device__ __forceinline__ void batch_norm_inference_backward(const BatchNormBackward<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    Rows<false> row(a.outer, a.inner, threadIdx.y, blockDim.y);
    Channel<A> channel = {};
    Sums<A> sums = {};
    A centred[1], g[1];
    if (c < a.channels) {
        channel = load_channel(a, c);
#pragma unroll 1  // unrolled it needs a stack on sm_120
        for (; row.inside(); row.advance()) {
            load_rows(a, c, channel, row, centred, g);
            const long long at = row.at_output(a.channels, c);
            sums.add_row(g[0], centred[0]);
            store(a.dx[at], channel.scale * g[0]);
            if (a.dresidual) store(a.dresidual[at], g[0]);
        }
    }
    write_parameter_gradients(a, c, channel.rstd, sum_over_lanes(sums));
}

#define BATCH_NORM_BACKWARD(KERNEL, variant, suffix, T, A, threads, values, held, matrix)                  \
    using arguments_backward_##variant##_##suffix = BatchNormBackward<T, A>;                               \
    KERNEL(bnk_batch_norm_backward_##variant##_##suffix, arguments_backward_##variant##_##suffix, threads, \
           (batch_norm_backward<T, A, values, held, matrix>))
#define BATCH_NORM_INFERENCE_BACKWARD(suffix, T, A)                                           \
    using arguments_inference_##suffix = BatchNormBackward<T, A>;                             \
    BNK_KERNEL(bnk_batch_norm_inference_backward_##suffix, arguments_inference_##suffix, 512, \
               (batch_norm_inference_backward<T, A>))

BATCH_NORM_BACKWARD(BNK_KERNEL, held4, f32, float, float, 512, 4, true, true)
BATCH_NORM_BACKWARD(BNK_KERNEL_ROOMY, held16, f32, float, float, 512, 16, true, false)
BATCH_NORM_BACKWARD(BNK_KERNEL_ROOMY, streamed, f32, float, float, 512, 1, false, false)
BATCH_NORM_INFERENCE_BACKWARD(f32, float, float)
BATCH_NORM_BACKWARD(BNK_KERNEL, held4, f16, Float16, float, 512, 4, true, true)
BATCH_NORM_BACKWARD(BNK_KERNEL_ROOMY, held16, f16, Float16, float, 512, 16, true, false)
BATCH_NORM_BACKWARD(BNK_KERNEL_ROOMY, streamed, f16, Float16, float, 512, 1, false, false)
BATCH_NORM_INFERENCE_BACKWARD(f16, Float16, float)
BATCH_NORM_BACKWARD(BNK_KERNEL, held4, bf16, BFloat16, float, 512, 4, true, true)
BATCH_NORM_BACKWARD(BNK_KERNEL_ROOMY, held16, bf16, BFloat16, float, 512, 16, true, false)
BATCH_NORM_BACKWARD(BNK_KERNEL_ROOMY, streamed, bf16, BFloat16, float, 512, 1, false, false)
BATCH_NORM_INFERENCE_BACKWARD(bf16, BFloat16, float)
BATCH_NORM_BACKWARD(BNK_KERNEL_ROOMY, held4, f64, double, double, 512, 4, true, true)
BATCH_NORM_BACKWARD(BNK_KERNEL_ROOMY, held8, f64, double, double, 512, 8, true, false)
BATCH_NORM_BACKWARD(BNK_KERNEL_ROOMY, streamed, f64, double, double, 512, 1, false, false)
BATCH_NORM_INFERENCE_BACKWARD(f64, double, double)
