// Gradients of batch normalisation with a residual sum and an activation, in one launch.
//
// Formulas:  For every group t, over its N[t] rows whose mask is true, with r and d of the forward, which count as
//            constants (1 and 0 if it did not renormalise):
//            xhat[n,c]  = (x[n,c] - mean[c]) rstd[c]
//            g[n,c]     = dy[n,c] phi'(gamma[c] (xhat[n,c] r[c] + d[c]) + beta[c] + residual[n,c])    recomputed
//            dresidual[n,c] = g[n,c]
//            dbeta[c]   = sum_t sum_n g[n,c]
//            dgamma[c]  = sum_t (r[c] sum_n g[n,c] xhat[n,c] + d[c] sum_n g[n,c])
//            dx[n,c]    = gamma[c] rstd[c] r[c] (g[n,c] - (sum_n g + xhat[n,c] sum_n (g xhat)) / N)   batch statistics
//            dx[n,c]    = gamma[c] rstd[c] g[n,c]                                            running statistics
//            dx and dresidual are 0 where the mask is false.
// Arrays:    dy, x, residual (groups, outer, C, inner), any strides; dx, dresidual in C order, dresidual only if there
//            is a residual, dx may alias dy, x or residual; all of type T. A, mask, gamma, beta, statistics and the
//            running statistics as in the forward: `given` has a bit for each of residual, mask, gamma and beta that is
//            not null. With running statistics, in the stage FROZEN, statistics is null. dgamma, dbeta (C,), of the
//            type of gamma and beta, may be null. sums (3, C): sum g, sum g xhat, N; written in the stage COLLECT, read
//            in APPLY. partial (slices, gridDim.y, w, 2) of type A, and finished_blocks (slices,), 0 before and after
//            the launch; both only if gridDim.y > 1. Without a mask rows = N, inverse_rows = 1/N.
// Launch:    As the forward, with the same constants and shared memory, w (l + 1) sizeof(A) more with a mask; thread
//            (i, j) owns the channel c = w blockIdx.x + i and its rows j, j + l, j + 2l, ... registers4, 8, 16: xhat
//            and g of a thread's rows, at most that many, stay in registers. two_pass: chunks of 4 rows. inference: the
//            stages FROZEN and APPLY, in which dx needs no sum of this launch: one row at a time, it writes dx while it
//            sums; in APPLY, which forms no sums, the tiles blockIdx.z share the rows. The gridDim.y blocks of a slice
//            share its groups; the last block to finish adds the sums of all, so no block waits for another.
// Traffic:   registers and inference: 2 N C reads and N C writes of T; two_pass: 4 N C reads and N C writes. A residual
//            is read as often as x, and its gradient written once; of rows that the mask excludes only the mask is
//            read. All loads of a chunk come before its first sum. One barrier, with more than 64 workers two, and one
//            after each of several groups.
// Numerics:  In A. Both sums are plain within the rows that a thread holds and over the workers, so dx sums to 0 over
//            the batch as well as rounding allows; a thread with more rows sums its chunks in pairs, as groups and
//            blocks are summed. Sums that overflow although no gradient does are formed anew, scaled
//            (lib/reduce/gradient_sums.cuh), but for running statistics. Deterministic: workers merge in ascending
//            order, more than 64 of them first 32 at a time; groups and blocks in ascending order.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 3.
// Called by: bnkernels/ops/batch_norm/training.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/half.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/gradient_sums.cuh"
#include "lib/reduce/options.cuh"
#include "lib/reduce/rows.cuh"

template <typename T, typename A>
struct BatchNormBackward {
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
    A rows, inverse_rows, eps, alpha;  // eps: for running statistics
    int activation, given, width, workers, full, stage, statistic_rows, params_in_storage_type;
};

// The argument of one group.
template <typename T, typename A>
__device__ __forceinline__ BatchNormBackward<T, A> of_group(BatchNormBackward<T, A> a, long long group) {
    if (a.groups == 1) return a;
    const long long size = a.outer * a.channels * a.inner;
    move(a.dy, group * a.dy_group);
    move(a.x, group * a.x_group);
    move(a.residual, group * a.residual_group);
    move(a.mask, group * a.mask_group);
    move(a.statistics, group * a.statistic_rows * a.channels);
    move(a.running_mean, group * a.channels);
    move(a.running_var, group * a.channels);
    move(a.dx, group * size);
    move(a.dresidual, group * size);
    return a;
}

// A thread's next rows: first x and dy, then xhat and g.
template <typename A, int VALUES>
struct Chunk : ChunkRows {
    A x[VALUES], g[VALUES], z[VALUES];

    template <typename T, bool MATRIX, typename Index>
    __device__ __forceinline__ void load(const BatchNormBackward<T, A>& a, Index c, Rows<MATRIX, Index>& rows) {
        const T* const of_x = a.x + c * (Index)a.x_channel;
        const T* const of_dy = a.dy + c * (Index)a.dy_channel;
        const T* const of_residual = a.residual + c * (Index)a.residual_channel;
        masked = a.given & MASK;
        if (masked) take_valid<VALUES>(a.mask, (Index)a.mask_outer, (Index)a.mask_inner, rows);
        count = 0;
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            if (a.full || rows.inside()) {
                if (!masked || has(i)) {
                    x[i] = A(of_x[rows.at(a.x_outer, a.x_inner)]);
                    g[i] = A(of_dy[rows.at(a.dy_outer, a.dy_inner)]);
                    if (a.given & RESIDUAL) z[i] = A(of_residual[rows.at(a.residual_outer, a.residual_inner)]);
                }
                ++count;
                rows.advance();
            }
    }

    // The input of the activation has the same bits as in the forward.
    template <typename T>
    __device__ __forceinline__ void derive(const BatchNormBackward<T, A>& a, const Channel<A>& channel) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            const A centred = x[i] - channel.mean.high;
            x[i] = channel.xhat(centred);
            const A residual = z[i];
            z[i] = channel.of_centred(centred);
            if (a.given & RESIDUAL) z[i] += residual;
        }
        activation_backward_all(g, z, a.activation, a.alpha);
    }

    // Sums over the rows, in units of 1 / unit.
    __device__ __forceinline__ GradientSums<A> sums(A unit) const {
        GradientSums<A> sums = {A(0), A(0)};
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            if (has(i)) sums.add(unit * g[i], x[i]);
        return sums;
    }

    // Writes the gradients of the next rows.
    template <typename T, bool MATRIX, typename Index>
    __device__ __forceinline__ void write(const BatchNormBackward<T, A>& a, Index c, Rows<MATRIX, Index>& rows,
                                          const Channel<A>& channel, const GradientSums<A>& means) const {
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            if (i < count) {
                const Index at = rows.at_output(a.channels, c);
                const A through = a.stage == FROZEN ? A(0) : fma(x[i], means.g_xhat, means.g);
                store(a.dx[at], has(i) ? channel.scale * (g[i] - through) : A(0));
                if (a.given & RESIDUAL) store(a.dresidual[at], has(i) ? g[i] : A(0));
                rows.advance();
            }
    }
};

// Sums over the chunks of a thread: long sums, and therefore pairs.
template <typename A>
struct ChunkSums {
    Pair<A> g, g_xhat;

    __device__ __forceinline__ void add_chunk(const GradientSums<A>& sums) {
        g = add(g, sums.g);
        g_xhat = add(g_xhat, sums.g_xhat);
    }
    __device__ __forceinline__ GradientSums<A> sums() const { return {value(g), value(g_xhat)}; }
};

// Sums over all rows of a thread, chunk by chunk; scaled if they are not small otherwise.
template <int VALUES, typename T, typename A, bool MATRIX, typename Index>
__device__ __forceinline__ ScaledSums<A> sums_of_chunks(const BatchNormBackward<T, A>& a, Index c,
                                                        const Channel<A>& channel, const Rows<MATRIX, Index>& rows) {
    bool scaled = false;
#pragma unroll 1
    while (true) {
        const A unit = scaled ? A(SUM_UNIT) : A(1);
        ChunkSums<A> sums = {};
        int count = 0;
        Rows<MATRIX, Index> ahead = rows;
#pragma unroll 1
        do {
            Chunk<A, VALUES> chunk;
            chunk.load(a, c, ahead);
            chunk.derive(a, channel);
            sums.add_chunk(chunk.sums(unit));
            count += chunk.valid_count();
        } while (ahead.inside());
        const GradientSums<A> found = sums.sums();
        if (scaled || found.small()) return {found, scaled, A(count)};
        scaled = true;
    }
}

// Sums over groups of the gradients of gamma and beta.
template <typename A>
using ParameterSums = ChunkSums<A>;

// Whether the thread writes what its channel has once.
template <typename T, typename A, typename Index>
__device__ __forceinline__ bool writes(const BatchNormBackward<T, A>& a, Index c) {
    return threadIdx.y == 0 && (a.full || c < (Index)a.channels);
}

template <typename T, typename A, typename Index>
__device__ __forceinline__ void write_parameter_gradients(const BatchNormBackward<T, A>& a, Index c,
                                                          const GradientSums<A>& sums) {
    if (!writes(a, c)) return;
    store_parameter<T>(a.dgamma, c, a.params_in_storage_type, sums.g_xhat);
    store_parameter<T>(a.dbeta, c, a.params_in_storage_type, sums.g);
}

// Writes the sums of the group in the stage COLLECT, else the gradients of gamma and beta, or adds to those of others.
template <typename T, typename A, typename Index>
__device__ __forceinline__ void take_sums(const BatchNormBackward<T, A>& a, Index c, const Channel<A>& channel,
                                          const ScaledSums<A>& total, ParameterSums<A>& parameters) {
    GradientSums<A> sums = total.sums;
    if (a.statistic_rows == RENORMALISED && a.stage != COLLECT)
        sums.g_xhat = fma(channel.r, sums.g_xhat, channel.d * sums.g);
    sums = {sums.g * total.unit(), sums.g_xhat * total.unit()};
    if (a.stage == COLLECT) {
        if (!writes(a, c)) return;
        const Index channels = (Index)a.channels;
        a.sums[c] = sums.g;
        a.sums[channels + c] = sums.g_xhat;
        a.sums[2 * channels + c] = a.given & MASK ? total.count : a.rows;
    } else if (a.groups == 1) {
        write_parameter_gradients(a, c, sums);
    } else {
        parameters.add_chunk(sums);
    }
}

// Writes the gradients of gamma and beta of several groups, summed over the blocks that share a slice by the last of
// them to finish. All threads must call.
template <typename T, typename A>
__device__ __forceinline__ void finish(const BatchNormBackward<T, A>& a, ParameterSums<A> own) {
    const long long c = (long long)blockIdx.x * a.width + threadIdx.x;
    if (gridDim.y > 1) {
        BNK_DYNAMIC_SHARED(unsigned, is_last);
        GradientSums<A>* const slice =
            reinterpret_cast<GradientSums<A>*>(a.partial) + (long long)blockIdx.x * gridDim.y * a.width + threadIdx.x;
        if (writes(a, c)) slice[blockIdx.y * a.width] = own.sums();
        __syncthreads();
        if (threadIdx.x == 0 && threadIdx.y == 0) {
            __threadfence();
            const bool last = atomicAdd(a.finished_blocks + blockIdx.x, 1u) == gridDim.y - 1;
            __threadfence();
            if (last) a.finished_blocks[blockIdx.x] = 0;  // reset for the next launch
            *is_last = last;
        }
        __syncthreads();
        if (*is_last == 0) return;
        own = {};
        if (writes(a, c))
            for (int block = 0; block < gridDim.y; ++block) own.add_chunk(slice[block * a.width]);
    }
    write_parameter_gradients(a, c, own.sums());
}

// One group: VALUES rows of a thread are in registers. If not HELD, the second pass reads all rows again.
template <int VALUES, bool HELD, bool MATRIX, typename T, typename A>
__device__ __forceinline__ void backward_of_group(const BatchNormBackward<T, A>& a, const SharedSums<A>& workers,
                                                  ParameterSums<A>& parameters) {
    using Index = typename IndexOf<MATRIX>::Type;
    const Index c = (Index)blockIdx.x * a.width + threadIdx.x;
    const bool active = a.full || c < (Index)a.channels;  // no early return: every thread must reach the barriers
    Rows<MATRIX, Index> rows(a.outer, a.inner, threadIdx.y, a.workers);
    Channel<A> channel = {};
    Chunk<A, VALUES> chunk;
    ScaledSums<A> own = {};

    if (active) {
        channel.template load_parameters<T>(a, c);
        channel.load_statistics(a, c);
        if (HELD) {
            Rows<MATRIX, Index> ahead = rows;
            chunk.load(a, c, ahead);
        }
        channel.conclude(a);
        if (HELD) {
            chunk.derive(a, channel);
            own.sums = chunk.sums(A(1));
            own.count = A(chunk.valid_count());
            own.scaled = !own.sums.small();
            if (own.scaled) own.sums = chunk.sums(A(SUM_UNIT));
        } else {
            own = sums_of_chunks<VALUES>(a, c, channel, rows);
        }
    }
    const ScaledSums<A> total = workers.merge_workers(own, active);
    take_sums(a, c, channel, total, parameters);
    if (!active || a.stage == COLLECT) return;

    const A inverse_rows = a.given & MASK ? A(1) / max(total.count, A(1)) : a.inverse_rows;
    const GradientSums<A> means = {total.sums.g * inverse_rows * total.unit(),
                                   total.sums.g_xhat * inverse_rows * total.unit()};
#pragma unroll 1
    do {
        if (!HELD) {
            Rows<MATRIX, Index> ahead = rows;
            chunk.load(a, c, ahead);
            chunk.derive(a, channel);
        }
        chunk.write(a, c, rows, channel, means);
    } while (!HELD && rows.inside());
}

template <typename T, typename A, int VALUES, bool HELD, bool MATRIX, bool OPTIONS>
__device__ __forceinline__ void batch_norm_backward(const BatchNormBackward<T, A>& arguments) {
    const BatchNormBackward<T, A> a = specialised<OPTIONS>(arguments, WHOLE);
    BNK_DYNAMIC_SHARED(GradientSums<A>, shared);
    const SharedSums<A> workers(shared, a.width, a.workers, a.given & MASK);
    ParameterSums<A> parameters = {};
#pragma unroll 1
    for (long long group = first_group(a); group < a.groups; group = next_group(a, group)) {
        backward_of_group<VALUES, HELD, MATRIX>(of_group(a, group), workers, parameters);
        end_group(a);
    }
    if (a.groups > 1) finish(a, parameters);
}

// One group where dx needs no sum of this launch.
template <typename T, typename A>
__device__ __forceinline__ void inference_backward_of_group(const BatchNormBackward<T, A>& a,
                                                            const SharedSums<A>& workers,
                                                            ParameterSums<A>& parameters) {
    const long long c = (long long)blockIdx.x * a.width + threadIdx.x;
    const bool active = c < a.channels;
    Channel<A> channel = {};
    ChunkSums<A> sums = {};
    if (active) {
        GradientSums<A> means = {A(0), A(0)};
        if (a.stage == APPLY) {
            const A inverse_rows = A(1) / max(a.sums[2 * a.channels + c], A(1));
            means = {a.sums[c] * inverse_rows, a.sums[a.channels + c] * inverse_rows};
        }
        channel.template load_parameters<T>(a, c);
        channel.load_statistics(a, c);
        channel.conclude(a);
        Rows<false> rows(a.outer, a.inner, blockIdx.z * a.workers + threadIdx.y, gridDim.z * a.workers);
#pragma unroll 1
        while (rows.inside()) {
            Rows<false> ahead = rows;
            Chunk<A, 1> chunk;
            chunk.load(a, c, ahead);
            chunk.derive(a, channel);
            if (a.stage == FROZEN) sums.add_chunk(chunk.sums(A(1)));
            chunk.write(a, c, rows, channel, means);
        }
    }
    if (a.stage == APPLY) return;
    GradientSums<A> own = sums.sums();
    const bool scaled = !own.small();
    if (scaled) own = {own.g * A(SUM_UNIT), own.g_xhat * A(SUM_UNIT)};
    take_sums(a, c, channel, workers.merge_workers({own, scaled, A(0)}, active), parameters);
}

template <typename T, typename A, bool OPTIONS>
__device__ __forceinline__ void batch_norm_inference_backward(const BatchNormBackward<T, A>& arguments) {
    const BatchNormBackward<T, A> a = specialised<OPTIONS>(arguments, FROZEN);
    BNK_DYNAMIC_SHARED(GradientSums<A>, shared);
    const SharedSums<A> workers(shared, a.width, a.workers, false);
    ParameterSums<A> parameters = {};
#pragma unroll 1
    for (long long group = first_group(a); group < a.groups; group = next_group(a, group)) {
        inference_backward_of_group(of_group(a, group), workers, parameters);
        end_group(a);
    }
    if (a.groups > 1 && a.stage == FROZEN) finish(a, parameters);
}

#define BATCH_NORM_BACKWARD(variant, suffix, T, A, min_blocks, values, held, matrix, options)            \
    BNK_KERNEL(bnk_batch_norm_backward_##variant##_##suffix, (BatchNormBackward<T, A>), 512, min_blocks, \
               (batch_norm_backward<T, A, values, held, matrix, options>))
#define BATCH_NORM_INFERENCE_BACKWARD(variant, suffix, T, A, min_blocks, options)               \
    BNK_KERNEL(bnk_batch_norm_##variant##_##suffix, (BatchNormBackward<T, A>), 512, min_blocks, \
               (batch_norm_inference_backward<T, A, options>))

BATCH_NORM_BACKWARD(registers4, f32, float, float, 1, 4, true, true, false)
BATCH_NORM_BACKWARD(registers16, f32, float, float, 1, 16, true, false, false)
BATCH_NORM_BACKWARD(two_pass, f32, float, float, 1, 4, false, false, false)
BATCH_NORM_BACKWARD(options_registers8, f32, float, float, 1, 8, true, false, true)
BATCH_NORM_BACKWARD(options_two_pass, f32, float, float, 1, 4, false, false, true)
BATCH_NORM_INFERENCE_BACKWARD(inference_backward, f32, float, float, 0, false)
BATCH_NORM_INFERENCE_BACKWARD(inference_backward_options, f32, float, float, 1, true)
BATCH_NORM_BACKWARD(registers4, f16, Float16, float, 1, 4, true, true, false)
BATCH_NORM_BACKWARD(registers16, f16, Float16, float, 1, 16, true, false, false)
BATCH_NORM_BACKWARD(two_pass, f16, Float16, float, 1, 4, false, false, false)
BATCH_NORM_BACKWARD(options_registers8, f16, Float16, float, 1, 8, true, false, true)
BATCH_NORM_BACKWARD(options_two_pass, f16, Float16, float, 1, 4, false, false, true)
BATCH_NORM_INFERENCE_BACKWARD(inference_backward, f16, Float16, float, 0, false)
BATCH_NORM_INFERENCE_BACKWARD(inference_backward_options, f16, Float16, float, 1, true)
BATCH_NORM_BACKWARD(registers4, bf16, BFloat16, float, 1, 4, true, true, false)
BATCH_NORM_BACKWARD(registers16, bf16, BFloat16, float, 1, 16, true, false, false)
BATCH_NORM_BACKWARD(two_pass, bf16, BFloat16, float, 1, 4, false, false, false)
BATCH_NORM_BACKWARD(options_registers8, bf16, BFloat16, float, 1, 8, true, false, true)
BATCH_NORM_BACKWARD(options_two_pass, bf16, BFloat16, float, 1, 4, false, false, true)
BATCH_NORM_INFERENCE_BACKWARD(inference_backward, bf16, BFloat16, float, 0, false)
BATCH_NORM_INFERENCE_BACKWARD(inference_backward_options, bf16, BFloat16, float, 1, true)
BATCH_NORM_BACKWARD(registers4, f64, double, double, 1, 4, true, true, false)
BATCH_NORM_BACKWARD(registers8, f64, double, double, 1, 8, true, false, false)
BATCH_NORM_BACKWARD(two_pass, f64, double, double, 1, 4, false, false, false)
BATCH_NORM_BACKWARD(options_registers4, f64, double, double, 1, 4, true, false, true)
BATCH_NORM_BACKWARD(options_two_pass, f64, double, double, 1, 2, false, false, true)
BATCH_NORM_INFERENCE_BACKWARD(inference_backward, f64, double, double, 0, false)
BATCH_NORM_INFERENCE_BACKWARD(inference_backward_options, f64, double, double, 1, true)
