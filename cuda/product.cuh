// Products of matrices for the columns of one block: all rows, a few columns, and the block's threads share the terms.
// Of 16-bit numbers by tensor cores, see tensor_product.cuh, from sm_80 on; of others, and on older GPUs, so:
//
// A tile is at most 256 rows by `width` columns. A thread multiplies EXAMPLES rows by COLUMNS columns in registers; 8, 16
// or 32 neighbouring threads have a tile's rows, `width` / COLUMNS such teams its columns, and what is left of the block's
// threads, `slices`, takes every slices-th term. The slices are added up in their order.
#pragma once

#include "matrix.cuh"
#include "tensor_product.cuh"

template <typename A>
constexpr int COLUMNS = 16 / sizeof(A);  // what one access loads

template <typename A>
struct alignas(16) Across {
    A of[COLUMNS<A>];
};

// Not a generic lambda: NVRTC up to 13.0 takes one for a host function, unless CuPy's options tell it otherwise.
template <typename A>
struct ToType {
    template <typename T>
    __device__ __forceinline__ A operator()(T value) const {
        return A(value);
    }
};

template <typename A, typename Left, typename Right, typename Emit>
__device__ __forceinline__ void fma_product(A* shared, const Left& left, const Right& right, long long row,
                                            long long column, int width, const Emit& emit) {
    const long long terms = left.columns, rest = left.rows - row;
    const int lanes = rest <= 8 * EXAMPLES ? 8 : rest <= 16 * EXAMPLES ? 16 : 32, teams = width / COLUMNS<A>;
    const int rows = lanes * EXAMPLES, slices = PRODUCT_THREADS / (lanes * teams);
    const Team<A> own(lanes, rows);
    const int pitch = own.pitch, team = own.number % teams, slice = own.number / teams;
    A* const lefts = shared;                   // (TERMS, rows)
    A* const rights = shared + TERMS * pitch;  // (TERMS, width)
    A sums[COLUMNS<A>][EXAMPLES] = {};
    const Stage<Left> left_stage(left, rows, TERMS, TERMS);
    const Stage<Right> right_stage(right, TERMS, width, width);
    const ToType<A> convert{};
#pragma unroll 1
    for (long long first = 0; first < terms; first += TERMS) {
        left_stage.template run<32 / sizeof(A)>(row, first, lefts, 1, pitch, convert);
        right_stage.template run<1>(first, column, rights, width, 1, convert);
        __syncthreads();
#pragma unroll 1
        for (int t = slice; t < TERMS; t += slices) {
            A of_rows[EXAMPLES];
            own.load(of_rows, lefts + t * pitch);
            const Across<A> across = *reinterpret_cast<const Across<A>*>(rights + t * width + team * COLUMNS<A>);
#pragma unroll
            for (int c = 0; c < COLUMNS<A>; ++c)
#pragma unroll
                for (int i = 0; i < EXAMPLES; ++i) sums[c][i] = fma(across.of[c], of_rows[i], sums[c][i]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < COLUMNS<A>; ++c) own.store(shared + ((slice * teams + team) * COLUMNS<A> + c) * pitch, sums[c]);
    emit_sums(shared, slices, width, pitch, (int)min((long long)rows, rest), width, right.columns - column, emit);
}

// left (rows, terms) times right (terms, columns): the rows from `row` on, and `width` columns from `column` on. Calls
// emit(row within the tile, column within the tile, value), neighbouring threads with neighbouring columns, and ends with
// a barrier. shared: room for product_numbers, see bnkernels/ops/linear_batch_norm/launch.py. All threads must call.
template <typename T, typename A, typename Emit>
__device__ __forceinline__ void product(A* shared, const Matrix<T>& left, const Matrix<T>& right, long long row,
                                        long long column, int width, const Emit& emit) {
#if BNK_TENSOR_CORES
    if constexpr (sizeof(T) == 2)
        tensor_product(shared, left, right, row, column, width, emit);
    else
#endif
        fma_product(shared, left, right, row, column, width, emit);
}
