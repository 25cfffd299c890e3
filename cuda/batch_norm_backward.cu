// Gradients of batch normalisation with a residual sum and an activation, in one launch.
//
// Formulas:  xhat[n,c]  = (x[n,c] - mean[c]) rstd[c]
//            g[n,c]     = dy[n,c] phi'(gamma[c] xhat[n,c] + beta[c] + residual[n,c])     recomputed, not stored
//            dresidual[n,c] = g[n,c]
//            dbeta[c]   = sum_n g[n,c]
//            dgamma[c]  = sum_n g[n,c] xhat[n,c]
//            dx[n,c]    = gamma[c] rstd[c] (g[n,c] - (dbeta[c] + xhat[n,c] dgamma[c]) / N)   batch statistics
//            dx[n,c]    = gamma[c] rstd[c] g[n,c]                                            running statistics
// Arrays:    dy, x, residual (outer, C, inner), any strides, residual may be null (0); dx, dresidual in C order,
//            dresidual may be null, dx may alias dy, x or residual; all of type T. A as in the forward. gamma, beta
//            (C,), of type A, may be null (1, 0). dgamma, dbeta (C,), of type A, may be null. mean, mean_low, rstd
//            (C,), of type A: the rows of the forward's statistics. With running statistics mean and rstd are the
//            running mean and variance, and mean_low is null.
// Launch:    As the forward: block (w, l, 1), grid (ceil(C/w), 1, 1), shared memory 2 w l sizeof(A); thread (i, j) owns
//            the channel c = w blockIdx.x + i and its rows j, j + l, j + 2l, ... registers4, 8, 16: x - mean and g of a
//            thread's rows, at most that many, stay in registers; registers4 requires inner = 1. two_pass and
//            inference: one row at a time; inference writes dx while it sums, since dx needs no sum.
// Traffic:   registers and inference: 2 N C reads and N C writes of T; two_pass: 4 N C reads and N C writes. A residual
//            is read as often as x, and its gradient written once. One barrier, with more than 64 workers two.
// Numerics:  In A; both sums in pairs (lib/numbers/pair.cuh), so dx sums to 0 over the batch as well as rounding
//            allows. Deterministic: workers merge in ascending order, more than 64 of them first 32 at a time.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3.
// Called by: bnkernels/ops/batch_norm/training.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/half.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/normalisation.cuh"
#include "lib/reduce/rows.cuh"
#include "lib/reduce/sums.cuh"

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
    A eps, alpha;  // eps: for running statistics
    int activation;
};

// Sums over rows: of g, and of g (x - mean).
enum Sum { G, G_CENTRED, SUMS };

template <typename T, typename A>
__device__ __forceinline__ void write_parameter_gradients(const BatchNormBackward<T, A>& a, long long c, A rstd,
                                                          const ChannelSums<A, SUMS>& total) {
    if (threadIdx.y != 0 || c >= a.channels) return;
    if (a.dgamma) a.dgamma[c] = value(total.sums[G_CENTRED]) * rstd;
    if (a.dbeta) a.dbeta[c] = value(total.sums[G]);
}

template <typename T, typename A>
__device__ __forceinline__ Normalisation<A> load_channel(const BatchNormBackward<T, A>& a, long long c) {
    Normalisation<A> channel;
    channel.mean = {a.mean[c], a.mean_low ? a.mean_low[c] : A(0)};
    channel.rstd = a.mean_low ? a.rstd[c] : A(1) / sqrt(a.rstd[c] + a.eps);
    channel.scale = a.gamma ? a.gamma[c] * channel.rstd : channel.rstd;
    channel.shift = a.beta ? a.beta[c] : A(0);
    return channel;
}

// The input of the activation, with the same bits as in the forward.
template <bool MATRIX, typename T, typename A>
__device__ __forceinline__ A before_activation(const BatchNormBackward<T, A>& a, long long c, const Rows<MATRIX>& row,
                                               const Normalisation<A>& channel, A centred) {
    const A z = channel.of_centred(centred);
    if (!a.residual) return z;
    return z + A(a.residual[row.at(a.residual_outer, a.residual_inner) + c * a.residual_channel]);
}

// Loads x - mean and g of the thread's next VALUES rows, or as many as are left; returns their number.
template <int VALUES, bool MATRIX, typename T, typename A>
__device__ __forceinline__ int load_rows(const BatchNormBackward<T, A>& a, long long c, const Normalisation<A>& channel,
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

// VALUES rows of a thread are in registers. If not HELD, the second pass reads all rows again.
template <typename T, typename A, int VALUES, bool HELD, bool MATRIX>
__device__ __forceinline__ void batch_norm_backward(const BatchNormBackward<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = c < a.channels;  // no early return: every thread must reach the barriers
    Rows<MATRIX> rows(a.outer, a.inner, threadIdx.y, blockDim.y);
    Normalisation<A> channel = {};
    ChannelSums<A, SUMS> sums = {};
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
                    sums.add_row({g[i], g[i] * centred[i]});
                    row.advance();
                }
        } while (!HELD && row.inside());
    }
    const ChannelSums<A, SUMS> total = merge_block(sums);
    write_parameter_gradients(a, c, channel.rstd, total);
    if (!active) return;

    const A n = A(a.outer * a.inner), mean_g = value(total.sums[G]) / n;
    const A slope = value(total.sums[G_CENTRED]) * channel.rstd * channel.rstd / n;  // dgamma rstd / N
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
    Normalisation<A> channel = {};
    ChannelSums<A, SUMS> sums = {};
    A centred[1], g[1];
    if (c < a.channels) {
        channel = load_channel(a, c);
#pragma unroll 1  // unrolled, it needs a stack on sm_120
        for (; row.inside(); row.advance()) {
            load_rows(a, c, channel, row, centred, g);
            const long long at = row.at_output(a.channels, c);
            sums.add_row({g[0], g[0] * centred[0]});
            store(a.dx[at], channel.scale * g[0]);
            if (a.dresidual) store(a.dresidual[at], g[0]);
        }
    }
    write_parameter_gradients(a, c, channel.rstd, merge_block(sums));
}

#define BATCH_NORM_BACKWARD(variant, suffix, T, A, min_blocks, values, held, matrix)                     \
    BNK_KERNEL(bnk_batch_norm_backward_##variant##_##suffix, (BatchNormBackward<T, A>), 512, min_blocks, \
               (batch_norm_backward<T, A, values, held, matrix>))
#define BATCH_NORM_INFERENCE_BACKWARD(suffix, T, A)                                           \
    BNK_KERNEL(bnk_batch_norm_inference_backward_##suffix, (BatchNormBackward<T, A>), 512, 0, \
               (batch_norm_inference_backward<T, A>))

BATCH_NORM_BACKWARD(registers4, f32, float, float, 0, 4, true, true)
BATCH_NORM_BACKWARD(registers16, f32, float, float, 1, 16, true, false)
BATCH_NORM_BACKWARD(two_pass, f32, float, float, 1, 1, false, false)
BATCH_NORM_INFERENCE_BACKWARD(f32, float, float)
BATCH_NORM_BACKWARD(registers4, f16, Float16, float, 0, 4, true, true)
BATCH_NORM_BACKWARD(registers16, f16, Float16, float, 1, 16, true, false)
BATCH_NORM_BACKWARD(two_pass, f16, Float16, float, 1, 1, false, false)
BATCH_NORM_INFERENCE_BACKWARD(f16, Float16, float)
BATCH_NORM_BACKWARD(registers4, bf16, BFloat16, float, 0, 4, true, true)
BATCH_NORM_BACKWARD(registers16, bf16, BFloat16, float, 1, 16, true, false)
BATCH_NORM_BACKWARD(two_pass, bf16, BFloat16, float, 1, 1, false, false)
BATCH_NORM_INFERENCE_BACKWARD(bf16, BFloat16, float)
BATCH_NORM_BACKWARD(registers4, f64, double, double, 1, 4, true, true)
BATCH_NORM_BACKWARD(registers8, f64, double, double, 1, 8, true, false)
BATCH_NORM_BACKWARD(two_pass, f64, double, double, 1, 1, false, false)
BATCH_NORM_INFERENCE_BACKWARD(f64, double, double)
