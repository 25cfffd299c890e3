// Batch normalisation with a mask, in groups, renormalised, or in stages: forward, in one launch.
//
// Formulas:  As in batch_norm_forward.cu, for every group t, over the N[t] rows whose mask is true:
//            mean[t,c] = 1/N[t] sum_n x[t,n,c]
//            var[t,c]  = 1/N[t] sum_n (x[t,n,c] - mean[t,c])^2,  rstd = 1 / sqrt(var + eps)
//            y[t,n,c]  = phi(gamma[c] ((x[t,n,c] - mean[t,c]) rstd[t,c] r[t,c] + d[t,c]) + beta[c] + residual[t,n,c])
//            y[t,n,c]  = 0 where the mask is false
//            r, d = 1, 0; renormalised, with s = sqrt(running_var + eps) before this mini-batch:
//            r = clip(sqrt(var + eps) / s, 1/r_max, r_max),  d = clip((mean - running_mean) / s, -d_max, d_max)
//            running_mean[t,c], running_var[t,c] as in batch_norm_forward.cu, with the divisor N[t] - correction
//            No valid row: y = 0, statistics 0, running statistics unchanged. One valid row: y = phi(beta); running_var
//            is unchanged if the divisor would be 0.
// Arrays:    x (groups, outer, C, inner), any strides; residual like x, may be null (0); y in C order, may alias x or
//            residual; of type T. mask (groups, outer, inner) of bytes, any strides, may be null (all true). gamma,
//            beta (C,), of type A or, with params_in_storage_type, of type T; may be null (1, 0). statistics (groups,
//            3, C): mean, mean_low, rstd; renormalised (groups, 5, C): r, d as well. Written, or read in the stage
//            APPLY. moments (4, C): count, mean, mean_low, M2, written in the stage COLLECT. running_mean, running_var
//            (groups, C), may be null; read in the stage FROZEN. All of type A.
// Launch:    Block (w, l, 1), grid (ceil(C/w), min(groups, 65535), tiles), shared memory 4 w l sizeof(A). Thread (i, j)
//            owns the channel c = w blockIdx.x + i and its rows j, j + l, ...; with tiles > 1, in stages without a
//            reduction (APPLY, FROZEN), the tiles share the rows.
// Traffic:   2 N C reads and N C writes of T, N C reads fewer if a thread has at most VALUES rows; the mask as often, a
//            byte a row. Data of invalid rows are not read. One barrier more than batch_norm_forward.cu.
// Numerics:  As batch_norm_forward.cu: the mean in a pair, squares about it, partial results merged with their counts
//            in ascending order of workers, more than 64 of them first 32 at a time. Deterministic.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167; Ioffe, Batch Renormalization, 2017,
//            arXiv:1702.03275; Chan, Golub and LeVeque (1983) for the merge.
// Called by: bnkernels/ops/batch_norm/training.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/half.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/masked_rows.cuh"
#include "lib/reduce/moments.cuh"
#include "lib/reduce/rows.cuh"

template <typename T, typename A>
struct BatchNormForwardMaskedGrouped {
    const T* x;
    const T* residual;
    const char* mask;
    const void* gamma;
    const void* beta;
    T* y;
    A* statistics;
    A* moments;
    A* running_mean;
    A* running_var;
    long long groups, outer, channels, inner;
    long long x_group, x_outer, x_channel, x_inner;  // strides, in elements
    long long residual_group, residual_outer, residual_channel, residual_inner;
    long long mask_group, mask_outer, mask_inner;
    A momentum, correction, eps, alpha, r_max, d_max;
    int activation, stage, statistic_rows, params_in_storage_type;
};

template <typename A>
__device__ __forceinline__ A clip(A value, A low, A high) {  // NaN stays
    return value < low ? low : value > high ? high : value;
}

// The running statistics with which renormalisation compares.
template <typename A>
struct Running {
    A mean, rstd;
};

// A channel of a group.
template <typename T, typename A>
struct GroupChannel {
    const BatchNormForwardMaskedGrouped<T, A>& a;
    long long group, c;

    __device__ __forceinline__ Chunk next(Rows<false>& rows) const {
        return chunk_of<VALUES<A>>(a.mask ? a.mask + group * a.mask_group : a.mask, a.mask_outer, a.mask_inner, rows);
    }

    __device__ __forceinline__ void load(A (&values)[VALUES<A>], const Rows<false>& rows, const Chunk& chunk) const {
        load_chunk(values, a.x + group * a.x_group + c * a.x_channel, a.x_outer, a.x_inner, rows, chunk);
    }

    // Moments of the thread's rows; leaves the last chunk in `values` and `chunk`.
    __device__ __forceinline__ Moments<A> collect(A (&values)[VALUES<A>], Chunk& chunk, Rows<false> rows) const {
        Moments<A> own = {A(0), {A(0), A(0)}, {A(0), A(0)}};
#pragma unroll 1
        while (rows.inside()) {
            const Rows<false> first = rows;
            chunk = next(rows);
            load(values, first, chunk);
            const Moments<A> more = moments_of_valid(values, chunk.valid);
            if (more.count > A(0)) own = own.count > A(0) ? merge(own, more) : more;
        }
        return own;
    }

    // The running statistics before this mini-batch; worker 0 replaces them after the next barrier.
    __device__ __forceinline__ Running<A> running() const {
        const long long at = group * a.channels + c;
        return {a.running_mean[at], A(1) / sqrt(a.running_var[at] + a.eps)};
    }

    // Normalisation of the channel, from its merged moments.
    __device__ __forceinline__ Renormalisation<A> conclude(const Moments<A>& all, const Running<A>& before) const {
        const A var = value(all.m2) / all.count;
        Renormalisation<A> norm = {};
        norm.mean = all.mean;
        norm.rstd = all.count > A(0) ? A(1) / sqrt(var + a.eps) : A(0);
        norm.r = A(1);
        if (a.statistic_rows > 3 && all.count > A(0)) {
            const A distance = (all.mean.high - before.mean) + all.mean.low;
            norm.r = clip(before.rstd / norm.rstd, A(1) / a.r_max, a.r_max);
            norm.d = clip(distance * before.rstd, -a.d_max, a.d_max);
        }
        norm.template scale_and_shift<T>(a, c);
        return norm;
    }

    __device__ __forceinline__ void write_statistics(const Moments<A>& all, const Renormalisation<A>& norm) const {
        A* row = a.statistics + group * a.statistic_rows * a.channels + c;
        row[0] = all.mean.high;
        row[a.channels] = all.mean.low;
        row[2 * a.channels] = norm.rstd;
        if (a.statistic_rows > 3) {
            row[3 * a.channels] = norm.r;
            row[4 * a.channels] = norm.d;
        }
        const long long at = group * a.channels + c;
        const A keep = A(1) - a.momentum, divisor = all.count - a.correction;
        if (a.running_mean && all.count > A(0))
            a.running_mean[at] = fma(a.momentum, all.mean.high, keep * a.running_mean[at]);
        if (a.running_var && all.count > A(0) && divisor > A(0))
            a.running_var[at] = fma(a.momentum, value(all.m2) / divisor, keep * a.running_var[at]);
    }

    __device__ __forceinline__ void write_moments(const Moments<A>& all) const {
        a.moments[c] = all.count;
        a.moments[a.channels + c] = all.mean.high;
        a.moments[2 * a.channels + c] = all.mean.low;
        a.moments[3 * a.channels + c] = value(all.m2);
    }

    // Normalises, activates and writes the rows of a chunk, whose x are `values`; overwrites `values`.
    __device__ __forceinline__ void write(A (&values)[VALUES<A>], Chunk chunk, Rows<false>& rows,
                                          const Renormalisation<A>& norm) const {
#pragma unroll
        for (int i = 0; i < VALUES<A>; ++i) values[i] = norm(values[i]);
        if (a.residual) {
            A residual[VALUES<A>];
            load_chunk(residual, a.residual + group * a.residual_group + c * a.residual_channel, a.residual_outer,
                       a.residual_inner, rows, chunk);
#pragma unroll
            for (int i = 0; i < VALUES<A>; ++i) values[i] += residual[i];
        }
        T* y = a.y + group * (a.outer * a.channels * a.inner);
        if (a.activation == LINEAR) {
#pragma unroll
            for (int i = 0; i < VALUES<A>; ++i)
                if (i < chunk.count) {
                    store(y[rows.at_output(a.channels, c)],
                          chunk.has(i) ? linear(values[i], values[i], a.alpha) : A(0));
                    rows.advance();
                }
            return;
        }
#pragma unroll 1
        for (int i = 0; i < chunk.count; ++i) {
            store(y[rows.at_output(a.channels, c)], chunk.has(i) ? curved(values[0], a.activation, a.alpha) : A(0));
            rotate(values);
            rows.advance();
        }
    }
};

template <typename A>
__device__ __forceinline__ void store_moments(A* partial, const Moments<A>& own) {
    const int plane = blockDim.x * blockDim.y;
    A* slot = partial + threadIdx.y * blockDim.x + threadIdx.x;
    slot[0] = own.count;
    slot[plane] = own.mean.high;
    slot[2 * plane] = own.mean.low;
    slot[3 * plane] = value(own.m2);
}

// Moments of a channel over the block, identical in all its threads. All threads must call.
template <typename A>
__device__ __forceinline__ Moments<A> merge_block(const Moments<A>& own) {
    BNK_DYNAMIC_SHARED(A, partial);  // [count, mean.high, mean.low, m2][worker][channel of the slice]
    const int worker = threadIdx.y, workers = blockDim.y, width = blockDim.x, plane = width * workers;
    store_moments(partial, own);
    __syncthreads();
    int step = 1;
    if (workers > SERIAL_WORKERS) {
        step = MERGE_FAN_IN;
        if (worker % MERGE_FAN_IN == 0)
            store_moments(partial, merge_counted(partial + worker * width + threadIdx.x, plane, width,
                                                 min(MERGE_FAN_IN, workers - worker)));
        __syncthreads();
    }
    const Moments<A> all = merge_counted(partial + threadIdx.x, plane, step * width, (workers + step - 1) / step);
    __syncthreads();  // the next group uses the same shared memory
    return all;
}

template <typename T, typename A>
__device__ __forceinline__ void batch_norm_forward_masked_grouped(const BatchNormForwardMaskedGrouped<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = c < a.channels;  // no early return: every thread must reach the barriers
    const Rows<false> first(a.outer, a.inner, blockIdx.z * blockDim.y + threadIdx.y, gridDim.z * blockDim.y);
    const bool sums = a.stage == WHOLE || a.stage == COLLECT, held = sums && fit<VALUES<A>>(first);
#pragma unroll 1
    for (long long group = blockIdx.y; group < a.groups; group += gridDim.y) {
        const GroupChannel<T, A> channel = {a, group, c};
        Renormalisation<A> norm = {};
        A values[VALUES<A>];
        Chunk chunk = {0, 0};
        if (sums) {
            Moments<A> own = {};
            Running<A> before = {};
            if (active) own = channel.collect(values, chunk, first);
            if (active && a.statistic_rows > 3) before = channel.running();
            const Moments<A> all = merge_block(own);
            if (!active) continue;
            if (a.stage == COLLECT) {
                if (threadIdx.y == 0) channel.write_moments(all);
                continue;
            }
            norm = channel.conclude(all, before);
            if (threadIdx.y == 0) channel.write_statistics(all, norm);
        } else if (active) {
            norm = load_normalisation<T, A>(a, group, c);
        }
        Rows<false> rows = first;
        while (active && rows.inside()) {
            if (!held) {
                Rows<false> ahead = rows;
                chunk = channel.next(ahead);
                channel.load(values, rows, chunk);
            }
            channel.write(values, chunk, rows, norm);
        }
    }
}

#define BATCH_NORM_FORWARD_MASKED_GROUPED(suffix, T, A)                                                       \
    BNK_KERNEL(bnk_batch_norm_forward_masked_grouped_##suffix, (BatchNormForwardMaskedGrouped<T, A>), 512, 1, \
               (batch_norm_forward_masked_grouped<T, A>))

BATCH_NORM_FORWARD_MASKED_GROUPED(f32, float, float)
BATCH_NORM_FORWARD_MASKED_GROUPED(f16, Float16, float)
BATCH_NORM_FORWARD_MASKED_GROUPED(bf16, BFloat16, float)
BATCH_NORM_FORWARD_MASKED_GROUPED(f64, double, double)
