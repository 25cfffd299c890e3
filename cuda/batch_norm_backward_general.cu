// Gradients of batch_norm_forward_general.cu: of valid examples alone, in groups, renormalised, or in stages; one launch.
//
// Formulas:  for every group t, over its N[t] rows whose mask is true, with r and d of the forward:
//            xhat[t,n,c] = (x[t,n,c] - mean[t,c]) rstd[t,c]
//            g[t,n,c]    = dy[t,n,c] phi'(gamma[c] (xhat[t,n,c] r[t,c] + d[t,c]) + beta[c] + residual[t,n,c])
//            dresidual   = g,  dbeta[c] = sum_t sum_n g,  dgamma[c] = sum_t (r[t,c] sum_n g xhat + d[t,c] sum_n g)
//            dx[t,n,c]   = gamma[c] r rstd (g - (sum_n g + xhat sum_n (g xhat)) / N[t])      r and d count as constants
//            dx[t,n,c]   = gamma[c] rstd g                               running statistics: they do not depend on x
//            Where the mask is false, dx and dresidual are 0.
// Arrays:    dy, x, residual (groups, outer, C, inner), any strides, residual may be null (0); dx, dresidual C order,
//            dresidual may be null, dx may be dy, x or residual itself; of type T. mask, gamma, beta, statistics as in the
//            forward; running_mean, running_var (groups, C) read by the stage FROZEN. dgamma, dbeta (C,), of the type of gamma
//            and beta. sums (3, C), of type A: sum g, sum g xhat, N; written by the stage COLLECT, read by APPLY.
//            partial: (slices, gridDim.y, 2, w) of type A, and arrivals: a counter for every slice, 0 before and after the
//            launch; both only where gridDim.y > 1.
// Launch:    as the forward, shared memory 3 w l sizeof(A). gridDim.y > 1 blocks share the groups of a slice; the one that
//            is last to arrive adds up what all have found: no block waits for another.
// Traffic:   4 N C reads and N C writes of T, 2 N C less where a thread has at most VALUES rows; a residual is read as often
//            as x, its gradient written once; of invalid rows only the mask is read.
// Numerics:  in A; sums in pairs, over lanes, groups and blocks in their order. Deterministic.
// Reference: as in the forward.
// Called by: bnkernels/ops/batch_norm/training.py
#include "activation.cuh"
#include "channel.cuh"
#include "channel_sums.cuh"
#include "common.cuh"
#include "general.cuh"
#include "half.cuh"

template <typename T, typename A>
struct BatchNormBackwardGeneral {
    const T* dy;
    const T* x;
    const T* residual;
    const char* mask;
    const void* gamma;
    const void* beta;
    const A* statistics;
    const A* running_mean;
    const A* running_var;
    T* dx;
    void* dgamma;
    void* dbeta;
    T* dresidual;
    A* sums;
    A* partial;
    unsigned* arrivals;
    long long groups, outer, channels, inner;
    long long dy_group, dy_outer, dy_channel, dy_inner;  // strides, in elements
    long long x_group, x_outer, x_channel, x_inner;
    long long residual_group, residual_outer, residual_channel, residual_inner;
    long long mask_group, mask_outer, mask_inner;
    A eps, alpha;
    int activation, stage, statistic_rows, narrow;
};

// Sums over the rows of a group; those of parameters over its groups.
enum Sum { G, G_XHAT, COUNT, SUMS };
enum ParameterSum { DGAMMA, DBETA, PARAMETERS };

// One group of a channel, as a thread sees it.
template <typename T, typename A>
struct Slice {
    const BatchNormBackwardGeneral<T, A>& a;
    long long group, c;
    Normalisation<A> of;

    // x - mean and g of the next rows, 0 where they are invalid.
    __device__ __forceinline__ Chunk load(A (&centred)[VALUES<A>], A (&g)[VALUES<A>], Rows<false>& rows) const {
        const Rows<false> first = rows;
        Chunk chunk =
            chunk_of<VALUES<A>>(a.mask ? a.mask + group * a.mask_group : a.mask, a.mask_outer, a.mask_inner, rows);
        load_chunk(centred, a.x + group * a.x_group + c * a.x_channel, a.x_outer, a.x_inner, first, chunk);
        load_chunk(g, a.dy + group * a.dy_group + c * a.dy_channel, a.dy_outer, a.dy_inner, first, chunk);
        A residual[VALUES<A>] = {};
        if (a.residual)
            load_chunk(residual, a.residual + group * a.residual_group + c * a.residual_channel, a.residual_outer,
                       a.residual_inner, first, chunk);
#pragma unroll
        for (int i = 0; i < VALUES<A>; ++i) {
            if (chunk.has(i)) centred[i] = subtract(centred[i], of.mean);
            if (a.activation == LINEAR) g[i] = linear(g[i], before_activation(centred[i], residual[i]), a.alpha);
        }
        if (a.activation == LINEAR) return chunk;
#pragma unroll 1
        for (int i = 0; i < VALUES<A>; ++i) {
            if (chunk.has(i))
                g[0] *= curved_derivative(before_activation(centred[0], residual[0]), a.activation, a.alpha);
            rotate(centred);
            rotate(g);
            rotate(residual);
        }
        return chunk;
    }

    // What the activation saw: the same, bit for bit, as the forward's.
    __device__ __forceinline__ A before_activation(A centred, A residual) const {
        const A z = fma(of.scale, centred, of.shift);
        return a.residual ? z + residual : z;
    }

    // Sums over the thread's rows; the last of them are left in `centred`, `g` and `chunk`.
    __device__ __forceinline__ ChannelSums<A, SUMS> collect(A (&centred)[VALUES<A>], A (&g)[VALUES<A>], Chunk& chunk,
                                                            Rows<false> rows) const {
        ChannelSums<A, SUMS> own = {};
#pragma unroll 1
        while (rows.inside()) {
            chunk = load(centred, g, rows);
#pragma unroll
            for (int i = 0; i < VALUES<A>; ++i)
                if (chunk.has(i)) own.add_row({g[i], g[i] * centred[i], A(1)});
        }
        return own;
    }

    // dx, and g itself, which is 0 where it is invalid; through the statistics goes mean_g + slope (x - mean).
    __device__ __forceinline__ void write(const A (&centred)[VALUES<A>], const A (&g)[VALUES<A>], const Chunk& chunk,
                                          Rows<false>& rows, A mean_g, A slope) const {
        const long long start = group * (a.outer * a.channels * a.inner);
#pragma unroll
        for (int i = 0; i < VALUES<A>; ++i)
            if (i < chunk.count) {
                const long long at = start + rows.at_output(a.channels, c);
                store(a.dx[at], chunk.has(i) ? of.scale * (g[i] - fma(centred[i], slope, mean_g)) : A(0));
                if (a.dresidual) store(a.dresidual[at], g[i]);
                rows.advance();
            }
    }
};

// Into dgamma and dbeta, from the blocks that share a slice: the last to arrive adds. All threads must call.
template <typename T, typename A>
__device__ __forceinline__ void finish(const BatchNormBackwardGeneral<T, A>& a, long long c,
                                       ChannelSums<A, PARAMETERS> own) {
    const bool writes = threadIdx.y == 0 && c < a.channels;
    if (gridDim.y > 1) {
        BNK_DYNAMIC_SHARED(A, shared);
        const int width = blockDim.x;
        A* const slice = a.partial + (long long)blockIdx.x * gridDim.y * PARAMETERS * width + threadIdx.x;
        if (writes)
            for (int i = 0; i < PARAMETERS; ++i) slice[(blockIdx.y * PARAMETERS + i) * width] = value(own.of[i]);
        __syncthreads();
        if (threadIdx.x == 0 && threadIdx.y == 0) {
            __threadfence();
            const bool last = atomicAdd(a.arrivals + blockIdx.x, 1u) == gridDim.y - 1;
            __threadfence();
            if (last) a.arrivals[blockIdx.x] = 0;  // as the next launch finds it
            shared[0] = last ? A(1) : A(0);
        }
        __syncthreads();
        if (shared[0] == A(0) || !writes) return;
        own = {};
        for (int block = 0; block < gridDim.y; ++block)
            for (int i = 0; i < PARAMETERS; ++i) own.of[i] = add(own.of[i], slice[(block * PARAMETERS + i) * width]);
    }
    if (!writes) return;
    store_parameter<T>(a.dgamma, c, a.narrow, value(own.of[DGAMMA]));
    store_parameter<T>(a.dbeta, c, a.narrow, value(own.of[DBETA]));
}

template <typename T, typename A>
__device__ __forceinline__ void batch_norm_backward_general(const BatchNormBackwardGeneral<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = c < a.channels;  // no early return: every thread must reach the barriers
    const Rows<false> first(a.outer, a.inner, blockIdx.z * blockDim.y + threadIdx.y, gridDim.z * blockDim.y);
    const bool sums = a.stage != APPLY, held = sums && fit<VALUES<A>>(first);
    ChannelSums<A, PARAMETERS> parameters = {};
#pragma unroll 1
    for (long long group = blockIdx.y; group < a.groups; group += gridDim.y) {
        const Slice<T, A> slice = {a, group, c, active ? load_normalisation<T, A>(a, group, c) : Normalisation<A>{}};
        A centred[VALUES<A>], g[VALUES<A>];
        Chunk chunk = {0, 0};
        A sum_g = A(0), sum_g_xhat = A(0), count = A(1);
        if (sums) {
            ChannelSums<A, SUMS> own = {};
            if (active) own = slice.collect(centred, g, chunk, first);
            const ChannelSums<A, SUMS> total = merge_block(own);
            sum_g = value(total.of[G]);
            sum_g_xhat = value(total.of[G_XHAT]) * slice.of.rstd;
            count = value(total.of[COUNT]);
            parameters.add_row({fma(slice.of.r, sum_g_xhat, slice.of.d * sum_g), sum_g});
            __syncthreads();  // the next group shares its sums in the same places
        } else if (active) {
            sum_g = a.sums[c];
            sum_g_xhat = a.sums[a.channels + c];
            count = a.sums[2 * a.channels + c];
        }
        if (!active) continue;
        if (a.stage == COLLECT) {
            if (threadIdx.y == 0) {
                a.sums[c] = sum_g;
                a.sums[a.channels + c] = sum_g_xhat;
                a.sums[2 * a.channels + c] = count;
            }
            continue;
        }
        const bool frozen = a.stage == FROZEN;
        const A mean_g = frozen ? A(0) : sum_g / count, slope = frozen ? A(0) : sum_g_xhat * slice.of.rstd / count;
        Rows<false> rows = first;
        while (rows.inside()) {
            if (!held) {
                Rows<false> ahead = rows;
                chunk = slice.load(centred, g, ahead);
            }
            slice.write(centred, g, chunk, rows, mean_g, slope);
        }
    }
    if (a.stage == WHOLE || a.stage == FROZEN) finish(a, c, parameters);
}

#define BATCH_NORM_BACKWARD_GENERAL(suffix, T, A)                                                        \
    using arguments_backward_general_##suffix = BatchNormBackwardGeneral<T, A>;                          \
    BNK_KERNEL_ROOMY(bnk_batch_norm_backward_general_##suffix, arguments_backward_general_##suffix, 512, \
                     (batch_norm_backward_general<T, A>))

BATCH_NORM_BACKWARD_GENERAL(f32, float, float)
BATCH_NORM_BACKWARD_GENERAL(f16, Float16, float)
BATCH_NORM_BACKWARD_GENERAL(bf16, BFloat16, float)
BATCH_NORM_BACKWARD_GENERAL(f64, double, double)
