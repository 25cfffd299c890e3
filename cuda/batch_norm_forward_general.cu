// Batch normalisation over the valid examples alone, in groups, renormalised, or in stages: forward, one launch.
//
// Formulas:  as in batch_norm_forward.cu, for every group t, over the N[t] rows whose mask is true:
//            mean[t,c] = 1/N[t] sum_n x[t,n,c],  var[t,c] = 1/N[t] sum_n (x[t,n,c] - mean[t,c])^2,  rstd = 1/sqrt(var + eps)
//            y[t,n,c]  = phi(gamma[c] ((x[t,n,c] - mean[t,c]) rstd[t,c] r[t,c] + d[t,c]) + beta[c] + residual[t,n,c])
//            y[t,n,c]  = 0 where the mask is false
//            r, d = 1, 0; renormalised: r = clip(sqrt(var + eps) / s, 1/r_max, r_max), d = clip((mean - running_mean) / s,
//            -d_max, d_max), where s = sqrt(running_var + eps) before this mini-batch
//            running_mean[t,c], running_var[t,c] as in batch_norm_forward.cu, divided by N[t] - correction.
//            No valid row: y = 0, statistics 0, the running ones stay. One: y = phi(beta), and running_var stays where
//            the divisor would be 0.
// Arrays:    x (groups, outer, C, inner), any strides; residual like x, may be null (0); y C order, may be x or residual
//            itself; of type T. mask (groups, outer, inner) of bytes, any strides, may be null (all true).
//            gamma, beta (C,), of type A, or narrow: of type T; may be null (1, 0).
//            statistics (groups, 3, C): mean, mean_low, rstd; renormalised (groups, 5, C): r, d as well. Written, or with
//            the stage APPLY read. moments (4, C): count, mean, mean_low, sum of squares, written by the stage COLLECT.
//            running_mean, running_var (groups, C), may be null; read by the stage FROZEN. All of type A.
// Launch:    block (w, l, 1), grid (ceil(C/w), min(groups, 65535), tiles), shared memory 4 w l sizeof(A). Thread (i, j)
//            owns the channel c = w blockIdx.x + i and its rows j, j + l, ...; tiles > 1 share the rows where nothing is
//            summed (APPLY, FROZEN).
// Traffic:   2 N C reads and N C writes of T, N C less where a thread has at most VALUES rows; the mask as often, a byte a
//            row; of invalid rows nothing is read. A barrier more than batch_norm_forward.cu.
// Numerics:  as batch_norm_forward.cu: the mean in a pair, squares about it, partial results merged with their counts in the
//            order of the lanes, above 64 of them first in groups of 32. Deterministic.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167; Ioffe, Batch Renormalization, 2017,
//            arXiv:1702.03275; Chan, Golub and LeVeque (1983) for the merge.
// Called by: bnkernels/ops/batch_norm/training.py
#include "activation.cuh"
#include "channel.cuh"
#include "common.cuh"
#include "general.cuh"
#include "half.cuh"
#include "moments.cuh"

template <typename T, typename A>
struct BatchNormForwardGeneral {
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
    int activation, stage, statistic_rows, narrow;
};

template <typename A>
__device__ __forceinline__ A clip(A value, A low, A high) {  // NaN stays
    return value < low ? low : value > high ? high : value;
}

// What renormalisation compares with.
template <typename A>
struct Running {
    A mean, rstd;
};

// One group of a channel, as a thread sees it.
template <typename T, typename A>
struct Slice {
    const BatchNormForwardGeneral<T, A>& a;
    long long group, c;

    __device__ __forceinline__ Chunk next(Rows<false>& rows) const {
        return chunk_of<VALUES<A>>(a.mask ? a.mask + group * a.mask_group : a.mask, a.mask_outer, a.mask_inner, rows);
    }

    __device__ __forceinline__ void load(A (&values)[VALUES<A>], const Rows<false>& rows, const Chunk& chunk) const {
        load_chunk(values, a.x + group * a.x_group + c * a.x_channel, a.x_outer, a.x_inner, rows, chunk);
    }

    // The moments of the thread's rows; the last of them are left in `values` and `chunk`.
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

    // The running statistics before this mini-batch; lane 0 replaces them behind the next barrier.
    __device__ __forceinline__ Running<A> running() const {
        const long long at = group * a.channels + c;
        return {a.running_mean[at], A(1) / sqrt(a.running_var[at] + a.eps)};
    }

    // What the merged moments say, for this pass and the next; the threads of lane 0 write it.
    __device__ __forceinline__ Normalisation<A> conclude(const Moments<A>& all, const Running<A>& before) const {
        const A var = value(all.m2) / all.count;
        Normalisation<A> of = {all.mean, all.count > A(0) ? A(1) / sqrt(var + a.eps) : A(0), A(1), A(0), A(0), A(0)};
        if (a.statistic_rows > 3 && all.count > A(0)) {
            const A distance = (all.mean.high - before.mean) + all.mean.low;
            of.r = clip(before.rstd / of.rstd, A(1) / a.r_max, a.r_max);
            of.d = clip(distance * before.rstd, -a.d_max, a.d_max);
        }
        of.template scale_and_shift<T>(a, c);
        return of;
    }

    __device__ __forceinline__ void write_statistics(const Moments<A>& all, const Normalisation<A>& of) const {
        A* row = a.statistics + group * a.statistic_rows * a.channels + c;
        row[0] = all.mean.high;
        row[a.channels] = all.mean.low;
        row[2 * a.channels] = of.rstd;
        if (a.statistic_rows > 3) {
            row[3 * a.channels] = of.r;
            row[4 * a.channels] = of.d;
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

    // Write the rows of a chunk, whose numbers are `values`; uses them up.
    __device__ __forceinline__ void write(A (&values)[VALUES<A>], Chunk chunk, Rows<false>& rows,
                                          const Normalisation<A>& of) const {
#pragma unroll
        for (int i = 0; i < VALUES<A>; ++i) values[i] = fma(of.scale, subtract(values[i], of.mean), of.shift);
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

// The moments of all lanes of the block, in the same order for every thread. All threads must call.
template <typename A>
__device__ __forceinline__ Moments<A> merge_block(const Moments<A>& own) {
    BNK_DYNAMIC_SHARED(A, partial);  // [count, mean.high, mean.low, m2][lane][channel of the slice]
    const int lane = threadIdx.y, lanes = blockDim.y, width = blockDim.x, plane = width * lanes;
    store_moments(partial, own);
    __syncthreads();
    int step = 1;
    if (lanes > SERIAL_LANES) {
        step = GROUP;
        if (lane % GROUP == 0)
            store_moments(partial,
                          merge_counted(partial + lane * width + threadIdx.x, plane, width, min(GROUP, lanes - lane)));
        __syncthreads();
    }
    const Moments<A> all = merge_counted(partial + threadIdx.x, plane, step * width, (lanes + step - 1) / step);
    __syncthreads();  // the next group stores in the same places
    return all;
}

template <typename T, typename A>
__device__ __forceinline__ void batch_norm_forward_general(const BatchNormForwardGeneral<T, A>& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool active = c < a.channels;  // no early return: every thread must reach the barriers
    const Rows<false> first(a.outer, a.inner, blockIdx.z * blockDim.y + threadIdx.y, gridDim.z * blockDim.y);
    const bool sums = a.stage == WHOLE || a.stage == COLLECT, held = sums && fit<VALUES<A>>(first);
#pragma unroll 1
    for (long long group = blockIdx.y; group < a.groups; group += gridDim.y) {
        const Slice<T, A> slice = {a, group, c};
        Normalisation<A> of = {};
        A values[VALUES<A>];
        Chunk chunk = {0, 0};
        if (sums) {
            Moments<A> own = {};
            Running<A> before = {};
            if (active) own = slice.collect(values, chunk, first);
            if (active && a.statistic_rows > 3) before = slice.running();
            const Moments<A> all = merge_block(own);
            if (!active) continue;
            if (a.stage == COLLECT) {
                if (threadIdx.y == 0) slice.write_moments(all);
                continue;
            }
            of = slice.conclude(all, before);
            if (threadIdx.y == 0) slice.write_statistics(all, of);
        } else if (active) {
            of = load_normalisation<T, A>(a, group, c);
        }
        Rows<false> rows = first;
        while (active && rows.inside()) {
            if (!held) {
                Rows<false> ahead = rows;
                chunk = slice.next(ahead);
                slice.load(values, rows, chunk);
            }
            slice.write(values, chunk, rows, of);
        }
    }
}

#define BATCH_NORM_FORWARD_GENERAL(suffix, T, A)                                                       \
    using arguments_forward_general_##suffix = BatchNormForwardGeneral<T, A>;                          \
    BNK_KERNEL_ROOMY(bnk_batch_norm_forward_general_##suffix, arguments_forward_general_##suffix, 512, \
                     (batch_norm_forward_general<T, A>))

BATCH_NORM_FORWARD_GENERAL(f32, float, float)
BATCH_NORM_FORWARD_GENERAL(f16, Float16, float)
BATCH_NORM_FORWARD_GENERAL(bf16, BFloat16, float)
BATCH_NORM_FORWARD_GENERAL(f64, double, double)
