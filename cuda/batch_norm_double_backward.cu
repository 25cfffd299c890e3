// Gradients of the backward of batch normalisation, for gradient penalties and Hessian-vector products, in one launch.
//
// Formulas:  The function is L = <ddx, dx> + <ddgamma, dgamma> + <ddbeta, dbeta> + <ddresidual, dresidual>, where dx,
//            dgamma, dbeta, dresidual are the outputs of batch_norm_backward.cu. Below, ddy, dx, ... are the gradients
//            of L with respect to dy, x, ... Per channel, with s = gamma rstd and means and sums over the batch:
//            xhat = (x - mean) rstd,  z = gamma xhat + beta + residual,  g = dy phi'(z),  k = dy phi''(z)
//            P a  = a - mean(a) - xhat mean(a xhat)        symmetric: <a, P b> = <P a, b>; the backward is dx = s P g
//            w    = s P ddx + ddgamma xhat + ddbeta + ddresidual       since L = <w, g>
//            q    = w k                                                gradient with respect to z, through g
//            e    = sum(ddx P g)                                       <ddx, dx> = s e
//            h    = gamma q + ddgamma g - s (ddx mean(g xhat) + g mean(ddx xhat))    with respect to xhat
//            ddy  = w phi'(z),  dresidual = q,  dbeta = sum(q),  dgamma = sum(q xhat) + rstd e
//            dx   = rstd (P h - xhat s e / N)        through mean and rstd as in the backward, and through s e
//            If `frozen`, mean and rstd do not depend on x: P a = a, and nothing goes through mean(g xhat),
//            mean(ddx xhat) and s e, so that h = gamma q + ddgamma g and dx = rstd h.
//            All sums come from one pass: w = (s ddx + ddresidual) + w0 + w1 xhat, where w0 and w1 need only sums of
//            ddx, so sum(q), sum(q xhat), sum(h) and sum(h xhat) are combinations of the ten sums of `Sum`.
// Arrays:    ddx, dy, x, residual, ddresidual (outer, C, inner), any strides; ddy, dx, dresidual in C order; all of
//            type T. ddx, residual, ddresidual may be null (0), dresidual too; ddy may alias any of the inputs. A as in
//            the forward. ddgamma, ddbeta, gamma, beta (C,), of type A, may be null (0, 0, 1, 0); dgamma, dbeta (C,).
//            statistics (3, C), of type A: mean, mean_low, rstd of the forward.
// Launch:    As the backward: block (w, l, 1), grid (ceil(C/w), 1, 1), shared memory 10 w l sizeof(A); thread (i, j)
//            owns the channel c = w blockIdx.x + i and its rows j, j + l, j + 2l, ..., one at a time.
// Traffic:   Every input twice, every output once. One barrier, with more than 64 workers two.
// Numerics:  In A, sums in pairs (lib/numbers/pair.cuh): dx sums to 0 over the batch as well as rounding allows. z has
//            the bits of the forward. Deterministic (lib/reduce/sums.cuh). phi'' at a kink, where it does not exist, is
//            0; elu's at 0 is the limit from below.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3, differentiated once more:
//            docs/double_backward.md derives every line of the formulas.
// Called by: bnkernels/ops/batch_norm/double_backward.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/half.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/normalisation.cuh"
#include "lib/reduce/rows.cuh"
#include "lib/reduce/sums.cuh"

template <typename T, typename A>
struct BatchNormDoubleBackward {
    const T* ddx;
    const T* dy;
    const T* x;
    const T* residual;
    const T* ddresidual;
    const A* ddgamma;
    const A* ddbeta;
    const A* gamma;
    const A* beta;
    const A* statistics;
    T* ddy;
    T* dx;
    A* dgamma;
    A* dbeta;
    T* dresidual;
    long long outer, channels, inner;
    long long ddx_outer, ddx_channel, ddx_inner;  // strides, in elements
    long long dy_outer, dy_channel, dy_inner;
    long long x_outer, x_channel, x_inner;
    long long residual_outer, residual_channel, residual_inner;
    long long ddresidual_outer, ddresidual_channel, ddresidual_inner;
    A alpha;
    int activation, frozen;
};

// Sums over rows, with v = ddx and u = s ddx + ddresidual.
enum Sum { V, V_XHAT, G, G_XHAT, V_G, K, K_XHAT, K_XHAT_XHAT, U_K, U_K_XHAT, SUMS };

// A thread's channel.
template <typename A>
struct Channel : Normalisation<A> {
    A gamma;
};

// Coefficients of a channel, from its sums: w = u + w0 + w1 xhat, h = gamma q + w1 g - fall v, dx = rstd (h - h0 - h1
// xhat).
template <typename A>
struct Coefficients {
    A w0, w1, fall, h0, h1, dgamma, dbeta;
};

// The terms of one row.
template <typename A>
struct RowTerms {
    A xhat, v, u, g, slope, k;  // slope = phi'(z)
};

template <typename T, typename A>
__device__ __forceinline__ Channel<A> load_channel(const BatchNormDoubleBackward<T, A>& a, long long c) {
    Channel<A> channel;
    channel.mean = {a.statistics[c], a.statistics[a.channels + c]};
    channel.rstd = a.statistics[2 * a.channels + c];
    channel.gamma = a.gamma ? a.gamma[c] : A(1);
    channel.scale = channel.gamma * channel.rstd;
    channel.shift = a.beta ? a.beta[c] : A(0);
    channel.fold_low();
    return channel;
}

// value phi'(z). Where the slope is 0, even an infinite value gives 0.
template <typename A>
__device__ __forceinline__ A times_derivative(A value, A slope, int activation) {
    return activation == LINEAR && slope == A(0) ? A(0) : value * slope;
}

template <typename T, typename A>
__device__ __forceinline__ RowTerms<A> load_row(const BatchNormDoubleBackward<T, A>& a, long long c,
                                                const Channel<A>& channel, const Rows<false>& at) {
    RowTerms<A> row;
    const A centred = A(a.x[at.at(a.x_outer, a.x_inner) + c * a.x_channel]) - channel.mean.high;
    const A dy = A(a.dy[at.at(a.dy_outer, a.dy_inner) + c * a.dy_channel]);
    A z = channel.of_centred(centred);
    if (a.residual) z += A(a.residual[at.at(a.residual_outer, a.residual_inner) + c * a.residual_channel]);
    row.xhat = channel.xhat(centred);
    row.v = a.ddx ? A(a.ddx[at.at(a.ddx_outer, a.ddx_inner) + c * a.ddx_channel]) : A(0);
    row.u = channel.scale * row.v;
    if (a.ddresidual)
        row.u += A(a.ddresidual[at.at(a.ddresidual_outer, a.ddresidual_inner) + c * a.ddresidual_channel]);
    if (a.activation == LINEAR) {
        row.slope = linear(A(1), z, a.alpha);
        row.k = A(0);
    } else {
        const Derivatives<A> phi = curved_derivatives(z, a.activation, a.alpha);
        row.slope = phi.first;
        row.k = dy * phi.second;
    }
    row.g = times_derivative(dy, row.slope, a.activation);
    return row;
}

template <typename T, typename A>
__device__ __forceinline__ Coefficients<A> coefficients_of(const BatchNormDoubleBackward<T, A>& a, long long c,
                                                           const Channel<A>& channel,
                                                           const ChannelSums<A, SUMS>& sums) {
    A sum[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sum[i] = value(sums.sums[i]);
    const A n = A(a.outer * a.inner), s = channel.scale;
    const auto mean = [&](A of_all) { return a.frozen ? A(0) : of_all / n; };  // as far as it goes through statistics
    const A mean_v = mean(sum[V]), mean_v_xhat = mean(sum[V_XHAT]), mean_g_xhat = mean(sum[G_XHAT]);
    Coefficients<A> coefficients;
    coefficients.w0 = (a.ddbeta ? a.ddbeta[c] : A(0)) - s * mean_v;
    coefficients.w1 = (a.ddgamma ? a.ddgamma[c] : A(0)) - s * mean_v_xhat;
    coefficients.fall = s * mean_g_xhat;
    const A e = sum[V_G] - mean_v * sum[G] - mean_v_xhat * sum[G_XHAT];
    const A sum_q = sum[U_K] + coefficients.w0 * sum[K] + coefficients.w1 * sum[K_XHAT];
    const A sum_q_xhat = sum[U_K_XHAT] + coefficients.w0 * sum[K_XHAT] + coefficients.w1 * sum[K_XHAT_XHAT];
    coefficients.h0 = mean(channel.gamma * sum_q + coefficients.w1 * sum[G] - coefficients.fall * sum[V]);
    coefficients.h1 =
        mean(channel.gamma * sum_q_xhat + coefficients.w1 * sum[G_XHAT] - coefficients.fall * sum[V_XHAT] + s * e);
    coefficients.dgamma = sum_q_xhat + channel.rstd * e;
    coefficients.dbeta = sum_q;
    return coefficients;
}

template <typename T, typename A>
__device__ __forceinline__ void batch_norm_double_backward(const BatchNormDoubleBackward<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = c < a.channels;  // no early return: every thread must reach the barriers
    const Rows<false> first(a.outer, a.inner, threadIdx.y, blockDim.y);
    Channel<A> channel = {};
    ChannelSums<A, SUMS> own = {};
    if (active) {
        channel = load_channel(a, c);
#pragma unroll 1
        for (Rows<false> at = first; at.inside(); at.advance()) {
            const RowTerms<A> row = load_row(a, c, channel, at);
            const A k_xhat = row.k * row.xhat;
            own.add_row({row.v, row.v * row.xhat, row.g, row.g * row.xhat, row.v * row.g, row.k, k_xhat,
                         k_xhat * row.xhat, row.u * row.k, row.u * k_xhat});
        }
    }
    const ChannelSums<A, SUMS> total = merge_block(own);
    if (!active) return;

    const Coefficients<A> coefficients = coefficients_of(a, c, channel, total);
    if (threadIdx.y == 0) {
        a.dgamma[c] = coefficients.dgamma;
        a.dbeta[c] = coefficients.dbeta;
    }
#pragma unroll 1
    for (Rows<false> at = first; at.inside(); at.advance()) {
        const RowTerms<A> row = load_row(a, c, channel, at);
        const A w = row.u + fma(coefficients.w1, row.xhat, coefficients.w0);
        const A q = a.activation == LINEAR ? A(0) : w * row.k;
        const A h = fma(channel.gamma, q, fma(coefficients.w1, row.g, -coefficients.fall * row.v));
        const long long out = at.at_output(a.channels, c);
        store(a.ddy[out], times_derivative(w, row.slope, a.activation));
        store(a.dx[out], channel.rstd * (h - fma(coefficients.h1, row.xhat, coefficients.h0)));
        if (a.dresidual) store(a.dresidual[out], q);
    }
}

#define BATCH_NORM_DOUBLE_BACKWARD(suffix, T, A)                                                 \
    BNK_KERNEL(bnk_batch_norm_double_backward_##suffix, (BatchNormDoubleBackward<T, A>), 512, 1, \
               (batch_norm_double_backward<T, A>))

BATCH_NORM_DOUBLE_BACKWARD(f32, float, float)
BATCH_NORM_DOUBLE_BACKWARD(f16, Float16, float)
BATCH_NORM_DOUBLE_BACKWARD(bf16, BFloat16, float)
BATCH_NORM_DOUBLE_BACKWARD(f64, double, double)
