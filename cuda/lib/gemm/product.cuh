// Matrix product for a few columns of the result by one block. 16-bit matrices use tensor cores from sm_80 on, see
// tensor_product.cuh; other types and older GPUs use fma:
//
// A tile is at most 256 rows by `width` columns. A thread accumulates EXAMPLES rows by COLUMNS columns in registers. A
// subwarp of 8, 16 or 32 threads covers the rows of a tile, `width` / COLUMNS subwarps its columns. The threads left
// over split k: each of `k_splits` takes every k_splits-th term. Partial sums are added in order of the splits.
#pragma once

#include "lib/gemm/matrix.cuh"
#include "lib/gemm/tensor_product.cuh"

template <typename A>
constexpr int COLUMNS = 16 / sizeof(A);  // elements of a 16-byte load

template <typename A>
struct alignas(16) Across {
    A values[COLUMNS<A>];
};

// Not a generic lambda: NVRTC up to 13.0 takes one for a host function, unless CuPy's options say otherwise.
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
    A* const lefts = shared;                    // (TILE_K, rows)
    A* const rights = shared + TILE_K * pitch;  // (TILE_K, width)
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

// left (rows, terms) times right (terms, columns), for a tile of rows from `row` on and `width` columns from `column`
// on. Calls emit(row in the tile, column in the tile, value), neighbouring threads with neighbouring columns, and ends
// with a barrier. `shared` holds product_numbers numbers, see bnkernels/ops/linear_batch_norm/launch.py. All threads
// must call.
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
