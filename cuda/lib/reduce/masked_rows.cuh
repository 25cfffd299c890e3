// Shared code of the masked and grouped batch-norm kernels: masks, groups, parameters of either type, renormalisation.
//
// The tensor is (groups, outer, C, inner), and every group has its own statistics. The blocks blockIdx.y take the
// groups in turn; in stages without a reduction, the blocks blockIdx.z share the rows. Data of rows that the mask
// excludes are never read.
#pragma once
#include "lib/numbers/activation.cuh"
#include "lib/numbers/half.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/normalisation.cuh"
#include "lib/reduce/rows.cuh"

// The stages of a pass; numbered as in bnkernels/ops/batch_norm/problem.py.
enum Stage {
    WHOLE = 0,    // the whole training pass
    COLLECT = 1,  // only the reductions over rows
    APPLY = 2,    // only the elementwise part, with given statistics or sums
    FROZEN = 3    // running statistics, which do not depend on x
};

// Rows that a thread holds in registers.
template <typename A>
constexpr int VALUES = 32 / sizeof(A);

// A chunk of a thread's rows: their number, and a bit for each valid one.
struct Chunk {
    int count;
    unsigned valid;

    __device__ __forceinline__ bool has(int i) const { return (valid >> i & 1u) != 0; }
};

// Whether the thread has at most COUNT rows, so that they stay in registers.
template <int COUNT>
__device__ __forceinline__ bool fit(Rows<false> rows) {
    for (int i = 0; i < COUNT; ++i)
        if (rows.inside()) rows.advance();
    return !rows.inside();
}

// The next COUNT rows, or as many as are left. Without a mask all rows are valid.
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

// Loads the valid rows of a chunk; the others become 0.
template <int COUNT, typename T, typename A>
__device__ __forceinline__ void load_chunk(A (&values)[COUNT], const T* channel, long long outer_stride,
                                           long long inner_stride, Rows<false> row, const Chunk& chunk) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        values[i] = chunk.has(i) ? A(channel[row.at(outer_stride, inner_stride)]) : A(0);
        if (i < chunk.count) row.advance();
    }
}

// gamma and beta are of the accumulator's type or, with params_in_storage_type, of the data's.
template <typename T, typename A>
__device__ __forceinline__ A load_parameter(const void* parameters, long long c, int params_in_storage_type, A absent) {
    if (!parameters) return absent;
    return params_in_storage_type ? A(static_cast<const T*>(parameters)[c]) : static_cast<const A*>(parameters)[c];
}

template <typename T, typename A>
__device__ __forceinline__ void store_parameter(void* parameters, long long c, int params_in_storage_type, A value) {
    if (!parameters) return;
    if (params_in_storage_type)
        store(static_cast<T*>(parameters)[c], value);
    else
        static_cast<A*>(parameters)[c] = value;
}

// A channel of a group: y = phi(scale (x - mean) + shift + residual), scale = gamma rstd r, shift = gamma d + beta.
template <typename A>
struct Renormalisation : Normalisation<A> {
    A r, d;

    // Forward and backward both use it: the activation sees the same bits.
    template <typename T, typename Arguments>
    __device__ __forceinline__ void scale_and_shift(const Arguments& a, long long c) {
        const A gamma = load_parameter<T, A>(a.gamma, c, a.params_in_storage_type, A(1));
        this->scale = gamma * this->rstd * r;
        this->shift = fma(gamma, d, load_parameter<T, A>(a.beta, c, a.params_in_storage_type, A(0)));
    }
};

// Uses the statistics of the group or, in the stage FROZEN, the running statistics.
template <typename T, typename A, typename Arguments>
__device__ __forceinline__ Renormalisation<A> load_normalisation(const Arguments& a, long long group, long long c) {
    Renormalisation<A> norm;
    norm.r = A(1);
    norm.d = A(0);
    if (a.stage == FROZEN) {
        const long long at = group * a.channels + c;
        norm.mean = {a.running_mean[at], A(0)};
        norm.rstd = A(1) / sqrt(a.running_var[at] + a.eps);
    } else {
        const A* row = a.statistics + group * a.statistic_rows * a.channels + c;
        norm.mean = {row[0], row[a.channels]};
        norm.rstd = row[2 * a.channels];
        if (a.statistic_rows > 3) {
            norm.r = row[3 * a.channels];
            norm.d = row[4 * a.channels];
        }
    }
    norm.template scale_and_shift<T>(a, c);
    return norm;
}
