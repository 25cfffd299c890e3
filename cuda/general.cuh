// What the general batch-norm kernels share: groups, masks, parameters of either type, renormalisation.
//
// The tensor is (groups, outer, C, inner), and every group has statistics of its own. Blocks blockIdx.y take the groups
// in turn; in stages without a sum, blocks blockIdx.z share the rows. Where a mask says that a row is invalid nothing of
// it is read, whatever lies there.
#pragma once
#include "activation.cuh"
#include "channel.cuh"
#include "common.cuh"
#include "half.cuh"

// What a launch does. The numbers are those of bnkernels/ops/batch_norm/masked_grouped.py.
enum Stage {
    WHOLE = 0,    // all of a training pass
    COLLECT = 1,  // what is summed over the rows, and nothing else
    APPLY = 2,    // the rest, with the sums given
    FROZEN = 3    // running statistics, which do not depend on x
};

// Rows that a thread holds.
template <typename A>
constexpr int VALUES = 32 / sizeof(A);

// Of some rows of a thread: how many there are, and a bit for each valid one.
struct Chunk {
    int count;
    unsigned valid;

    __device__ __forceinline__ bool has(int i) const { return (valid >> i & 1u) != 0; }
};

// Whether a thread has no more rows than that: then they stay where they were read.
template <int COUNT>
__device__ __forceinline__ bool fit(Rows<false> rows) {
    for (int i = 0; i < COUNT; ++i)
        if (rows.inside()) rows.advance();
    return !rows.inside();
}

// The next rows, as many as there are and fit. No mask: all are valid.
template <int COUNT>
__device__ __forceinline__ Chunk chunk_of(const char* mask, long long outer_stride, long long inner_stride,
                                          Rows<false>& rows) {
    Chunk chunk = {0, 0};
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (rows.inside()) {
            if (!mask || mask[rows.at(outer_stride, inner_stride)] != 0) chunk.valid |= 1u << i;
            ++chunk.count;
            rows.advance();
        }
    return chunk;
}

// The numbers of an array in the valid rows of a chunk; 0 in the others.
template <int COUNT, typename T, typename A>
__device__ __forceinline__ void load_chunk(A (&values)[COUNT], const T* channel, long long outer_stride,
                                           long long inner_stride, Rows<false> row, const Chunk& chunk) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        values[i] = chunk.has(i) ? A(channel[row.at(outer_stride, inner_stride)]) : A(0);
        if (i < chunk.count) row.advance();
    }
}

// gamma and beta are of the accumulator's type, or `narrow`: of the data's.
template <typename T, typename A>
__device__ __forceinline__ A load_parameter(const void* parameters, long long c, int narrow, A absent) {
    if (!parameters) return absent;
    return narrow ? A(static_cast<const T*>(parameters)[c]) : static_cast<const A*>(parameters)[c];
}

template <typename T, typename A>
__device__ __forceinline__ void store_parameter(void* parameters, long long c, int narrow, A value) {
    if (!parameters) return;
    if (narrow)
        store(static_cast<T*>(parameters)[c], value);
    else
        static_cast<A*>(parameters)[c] = value;
}

// How a channel is normalised: y = phi(scale (x - mean) + shift + residual), scale = gamma rstd r, shift = gamma d + beta.
template <typename A>
struct Normalisation {
    Pair<A> mean;
    A rstd, r, d, scale, shift;

    // Forward and backward form these in the same way: then the activation sees the same bits.
    template <typename T, typename Arguments>
    __device__ __forceinline__ void scale_and_shift(const Arguments& a, long long c) {
        const A gamma = load_parameter<T, A>(a.gamma, c, a.narrow, A(1));
        scale = gamma * rstd * r;
        shift = fma(gamma, d, load_parameter<T, A>(a.beta, c, a.narrow, A(0)));
    }
};

// With the statistics of a group, or the running ones.
template <typename T, typename A, typename Arguments>
__device__ __forceinline__ Normalisation<A> load_normalisation(const Arguments& a, long long group, long long c) {
    Normalisation<A> of;
    of.r = A(1);
    of.d = A(0);
    if (a.stage == FROZEN) {
        const long long at = group * a.channels + c;
        of.mean = {a.running_mean[at], A(0)};
        of.rstd = A(1) / sqrt(a.running_var[at] + a.eps);
    } else {
        const A* row = a.statistics + group * a.statistic_rows * a.channels + c;
        of.mean = {row[0], row[a.channels]};
        of.rstd = row[2 * a.channels];
        if (a.statistic_rows > 3) {
            of.r = row[3 * a.channels];
            of.d = row[4 * a.channels];
        }
    }
    of.template scale_and_shift<T>(a, c);
    return of;
}
