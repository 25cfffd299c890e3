// Products of matrices for the columns of one block: all rows, a few columns, and the block's threads share the terms.
// Of 16-bit numbers by tensor cores, see tensor_product.cuh, from sm_80 on; of others, and on older GPUs, so:
//
// A tile is at most 256 rows by `width` columns. A thread multiplies EXAMPLES rows by COLUMNS columns in registers; 8, 16
// or 32 neighbouring threads have a tile's rows, `width` / COLUMNS such teams its columns, and what is left of the block's
// threads, `slices`, takes every slices-th term. The slices are added up in their order.
#pragma once

#include "lib/gemm/matrix.cuh"
#include "lib/gemm/tensor_product.cuh"

template <typename A>
constexpr int COLUMNS = 16 / sizeof(A);  // what one access loads

template <typename A>
struct alignas(16) Across {
    A values[COLUMNS<A>];
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
    const long long terms = left.columns, rows_left = left.rows - row;
    const int subwarp_size = rows_left <= 8 * EXAMPLES    ? 8
                             : rows_left <= 16 * EXAMPLES ? 16
                                                          : 32,
              column_tiles = width / COLUMNS<A>;
    const int rows = subwarp_size * EXAMPLES, k_splits = PRODUCT_THREADS / (subwarp_size * column_tiles);
    const Subwarp<A> own(subwarp_size, rows);
    const int pitch = own.pitch, column_tile = own.index % column_tiles, k_split = own.index / column_tiles;
    A* const lefts = shared;                    // (TERMS, rows)
    A* const rights = shared + TILE_K * pitch;  // (TERMS, width)
    A sums[COLUMNS<A>][EXAMPLES] = {};
    const TileLoader<Left> left_loader(left, rows, TILE_K, TILE_K);
    const TileLoader<Right> right_loader(right, TILE_K, width, width);
    const ToType<A> convert{};
#pragma unroll 1
    for (long long first = 0; first < terms; first += TILE_K) {
        left_loader.template load<32 / sizeof(A)>(row, first, lefts, 1, pitch, convert);
        right_loader.template load<1>(first, column, rights, width, 1, convert);
        __syncthreads();
#pragma unroll 1
        for (int t = k_split; t < TILE_K; t += k_splits) {
            A row_values[EXAMPLES];
            own.load(row_values, lefts + t * pitch);
            const Across<A> across = *reinterpret_cast<const Across<A>*>(rights + t * width + column_tile * COLUMNS<A>);
#pragma unroll
            for (int c = 0; c < COLUMNS<A>; ++c)
#pragma unroll
                for (int i = 0; i < EXAMPLES; ++i) sums[c][i] = fma(across.values[c], row_values[i], sums[c][i]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < COLUMNS<A>; ++c)
        own.store(shared + ((k_split * column_tiles + column_tile) * COLUMNS<A> + c) * pitch, sums[c]);
    emit_sums(shared, k_splits, width, pitch, (int)min((long long)rows, rows_left), width, right.columns - column,
              emit);
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
