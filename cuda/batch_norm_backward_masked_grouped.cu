// Gradients of batch_norm_forward_masked_grouped.cu, in one launch.
//
// Formulas:  For every group t, over its N[t] rows whose mask is true, with r and d of the forward:
//            xhat[t,n,c] = (x[t,n,c] - mean[t,c]) rstd[t,c]
//            g[t,n,c]    = dy[t,n,c] phi'(gamma[c] (xhat[t,n,c] r[t,c] + d[t,c]) + beta[c] + residual[t,n,c])
//            dresidual   = g,  dbeta[c] = sum_t sum_n g,  dgamma[c] = sum_t (r[t,c] sum_n g xhat + d[t,c] sum_n g)
//            dx[t,n,c]   = gamma[c] r rstd (g - (sum_n g + xhat sum_n (g xhat)) / N[t])      r and d count as constants
//            dx[t,n,c]   = gamma[c] rstd g                                                   running statistics
//            dx and dresidual are 0 where the mask is false.
// Arrays:    dy, x, residual (groups, outer, C, inner), any strides, residual may be null (0); dx, dresidual in C
//            order, dresidual may be null, dx may alias dy, x or residual; of type T. mask, gamma, beta, statistics as
//            in the forward; running_mean, running_var (groups, C), read in the stage FROZEN. dgamma, dbeta (C,), of
//            the type of gamma and beta. sums (3, C), of type A: sum g, sum g xhat, N; written in the stage COLLECT,
//            read in APPLY. partial (slices, gridDim.y, 2, w) of type A, and finished_blocks (slices,), 0 before and
//            after the launch; both only if gridDim.y > 1.
// Launch:    As the forward; shared memory 3 w l sizeof(A). The gridDim.y blocks of a slice share its groups; the last
//            block to finish adds the partial sums of all, so no block waits for another.
// Traffic:   4 N C reads and N C writes of T, 2 N C reads fewer if a thread has at most VALUES rows; a residual is read
//            as often as x, its gradient written once. Of invalid rows only the mask is read.
// Numerics:  In A; sums in pairs over workers, groups and blocks in ascending order. Deterministic.
// Reference: as in the forward.
// Called by: bnkernels/ops/batch_norm/training.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/half.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/masked_rows.cuh"
#include "lib/reduce/rows.cuh"
#include "lib/reduce/sums.cuh"

template <typename T, typename A>
struct BatchNormBackwardMaskedGrouped {
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
    unsigned* finished_blocks;
    long long groups, outer, channels, inner;
    long long dy_group, dy_outer, dy_channel, dy_inner;  // strides, in elements
    long long x_group, x_outer, x_channel, x_inner;
    long long residual_group, residual_outer, residual_channel, residual_inner;
    long long mask_group, mask_outer, mask_inner;
    A eps, alpha;
    int activation, stage, statistic_rows, params_in_storage_type;
};

// Sums over the rows of a group, and of the parameters' gradients over groups.
enum Sum { G, G_XHAT, COUNT, SUMS };
enum ParameterSum { DGAMMA, DBETA, PARAMETERS };

// A channel of a group.
template <typename T, typename A>
struct GroupChannel {
    const BatchNormBackwardMaskedGrouped<T, A>& a;
    long long group, c;
    Renormalisation<A> norm;

    // Loads x - mean and g of the next rows; invalid rows become 0.
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
            if (chunk.has(i)) centred[i] = subtract(centred[i], norm.mean);
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

    // The input of the activation, with the same bits as in the forward.
    __device__ __forceinline__ A before_activation(A centred, A residual) const {
        const A z = norm.of_centred(centred);
        return a.residual ? z + residual : z;
    }

    // Sums over the thread's rows; leaves the last chunk in `centred`, `g` and `chunk`.
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

    // Writes dx and dresidual = g of a chunk, 0 for invalid rows. mean_g + slope (x - mean) is the part through the
    // statistics.
    __device__ __forceinline__ void write(const A (&centred)[VALUES<A>], const A (&g)[VALUES<A>], const Chunk& chunk,
                                          Rows<false>& rows, A mean_g, A slope) const {
        const long long start = group * (a.outer * a.channels * a.inner);
#pragma unroll
        for (int i = 0; i < VALUES<A>; ++i)
            if (i < chunk.count) {
                const long long at = start + rows.at_output(a.channels, c);
                store(a.dx[at], chunk.has(i) ? norm.scale * (g[i] - fma(centred[i], slope, mean_g)) : A(0));
                if (a.dresidual) store(a.dresidual[at], g[i]);
                rows.advance();
            }
    }
};

// Writes dgamma and dbeta, summed over the blocks that share a slice by the last of them to finish. All threads must
// call.
template <typename T, typename A>
__device__ __forceinline__ void finish(const BatchNormBackwardMaskedGrouped<T, A>& a, long long c,
                                       ChannelSums<A, PARAMETERS> own) {
    const bool writes = threadIdx.y == 0 && c < a.channels;
    if (gridDim.y > 1) {
        BNK_DYNAMIC_SHARED(A, shared);
        const int width = blockDim.x;
        A* const slice = a.partial + (long long)blockIdx.x * gridDim.y * PARAMETERS * width + threadIdx.x;
        if (writes)
            for (int i = 0; i < PARAMETERS; ++i) slice[(blockIdx.y * PARAMETERS + i) * width] = value(own.sums[i]);
        __syncthreads();
        if (threadIdx.x == 0 && threadIdx.y == 0) {
            __threadfence();
            const bool last = atomicAdd(a.finished_blocks + blockIdx.x, 1u) == gridDim.y - 1;
            __threadfence();
            if (last) a.finished_blocks[blockIdx.x] = 0;  // reset for the next launch
            shared[0] = last ? A(1) : A(0);
        }
        __syncthreads();
        if (shared[0] == A(0) || !writes) return;
        own = {};
        for (int block = 0; block < gridDim.y; ++block)
            for (int i = 0; i < PARAMETERS; ++i)
                own.sums[i] = add(own.sums[i], slice[(block * PARAMETERS + i) * width]);
    }
    if (!writes) return;
    store_parameter<T>(a.dgamma, c, a.params_in_storage_type, value(own.sums[DGAMMA]));
    store_parameter<T>(a.dbeta, c, a.params_in_storage_type, value(own.sums[DBETA]));
}

template <typename T, typename A>
__device__ __forceinline__ void batch_norm_backward_masked_grouped(const BatchNormBackwardMaskedGrouped<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = c < a.channels;  // no early return: every thread must reach the barriers
    const Rows<false> first(a.outer, a.inner, blockIdx.z * blockDim.y + threadIdx.y, gridDim.z * blockDim.y);
    const bool sums = a.stage != APPLY, held = sums && fit<VALUES<A>>(first);
    ChannelSums<A, PARAMETERS> parameters = {};
#pragma unroll 1
    for (long long group = blockIdx.y; group < a.groups; group += gridDim.y) {
        const GroupChannel<T, A> channel = {a, group, c,
                                            active ? load_normalisation<T, A>(a, group, c) : Renormalisation<A>{}};
        A centred[VALUES<A>], g[VALUES<A>];
        Chunk chunk = {0, 0};
        A sum_g = A(0), sum_g_xhat = A(0), count = A(1);
        if (sums) {
            ChannelSums<A, SUMS> own = {};
            if (active) own = channel.collect(centred, g, chunk, first);
            const ChannelSums<A, SUMS> total = merge_block(own);
            sum_g = value(total.sums[G]);
            sum_g_xhat = value(total.sums[G_XHAT]) * channel.norm.rstd;
            count = value(total.sums[COUNT]);
            parameters.add_row({fma(channel.norm.r, sum_g_xhat, channel.norm.d * sum_g), sum_g});
            __syncthreads();  // the next group uses the same shared memory
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
        const A mean_g = frozen ? A(0) : sum_g / count, slope = frozen ? A(0) : sum_g_xhat * channel.norm.rstd / count;
        Rows<false> rows = first;
        while (rows.inside()) {
            if (!held) {
                Rows<false> ahead = rows;
                chunk = channel.load(centred, g, ahead);
            }
            channel.write(centred, g, chunk, rows, mean_g, slope);
        }
    }
    if (a.stage == WHOLE || a.stage == FROZEN) finish(a, c, parameters);
}

#define BATCH_NORM_BACKWARD_MASKED_GROUPED(suffix, T, A)                                                        \
    BNK_KERNEL(bnk_batch_norm_backward_masked_grouped_##suffix, (BatchNormBackwardMaskedGrouped<T, A>), 512, 1, \
               (batch_norm_backward_masked_grouped<T, A>))

BATCH_NORM_BACKWARD_MASKED_GROUPED(f32, float, float)
BATCH_NORM_BACKWARD_MASKED_GROUPED(f16, Float16, float)
BATCH_NORM_BACKWARD_MASKED_GROUPED(bf16, BFloat16, float)
BATCH_NORM_BACKWARD_MASKED_GROUPED(f64, double, double)
