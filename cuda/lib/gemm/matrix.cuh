// Operands of a matrix product by one block, the loading of their tiles, and the reduction over k splits.
#pragma once

#include "lib/gemm/subwarp.cuh"
#include "lib/numbers/half.cuh"

constexpr int PRODUCT_THREADS = 256;
constexpr int PRODUCT_ROWS = 32 * EXAMPLES;  // rows of a tile, at most
constexpr int TILE_K = 32;                   // depth of a tile: terms of the product in shared memory at a time

// A matrix with any strides.
template <typename T>
struct Matrix {
    const T* data;
    long long rows, columns, row_step, column_step;

    __device__ __forceinline__ const T* address(long long row, long long column) const {
        return data + row * row_step + column * column_step;
    }
    // The element at an address, of this row and column.
    __device__ __forceinline__ T value(const T* at, int, int) const { return *at; }
};

// Loads tiles of a matrix into shared memory; neighbouring threads read neighbouring addresses. Rows and columns of a
// tile are powers of two, and each thread has one row or one column of it, so the loop divides nothing.
template <typename Factor>
struct TileLoader {
    const Factor& factor;
    bool down;  // the thread has a column and steps down its rows
    int row, column, stride, count, used;

    // used: columns of a tile that belong to it; the others are 0.
    __device__ __forceinline__ TileLoader(const Factor& factor, int rows, int columns, int used)
        : factor(factor), down(factor.row_step != 1 || factor.column_step == 1), used(used) {
        const int length = down ? columns : rows, others = down ? rows : columns, bits = __popc(length - 1);
        const int near = threadIdx.x & (length - 1), far = threadIdx.x >> bits;
        stride = PRODUCT_THREADS >> bits;
        row = down ? far : near;
        column = down ? near : far;
        count = far < others ? max((others << bits) / PRODUCT_THREADS, 1) : 0;
    }

    // Loads the thread's elements of the tile at (first_row, first_column) to to[row row_pitch + column column_pitch];
    // 0 beyond the end of the matrix. UNROLL loads are in flight at once; it divides `count`. convert(element) is
    // stored.
    template <int UNROLL, typename To, typename Convert>
    __device__ __forceinline__ void load(long long first_row, long long first_column, To* to, int row_pitch,
                                         int column_pitch, const Convert& convert) const {
        const int rows = (int)min(factor.rows - first_row, (long long)PRODUCT_ROWS);
        const int columns = (int)min(factor.columns - first_column, (long long)used);
        const bool inside = down ? column < columns : row < rows;
        const int end = inside ? (down ? rows : columns) : 0, pitch = stride * (down ? row_pitch : column_pitch);
        const long long step = stride * (down ? factor.row_step : factor.column_step);
        const auto *const origin = factor.address(first_row, first_column),
                          *at = origin + row * factor.row_step + column * factor.column_step;
        To* target = to + row * row_pitch + column * column_pitch;
        int moving = down ? row : column;
#pragma unroll 1
        for (int i = 0; i < count; i += UNROLL) {
            To values[UNROLL];
            if (moving + (UNROLL - 1) * stride < end) {
#pragma unroll
                for (int j = 0; j < UNROLL; ++j) {
                    const int r = (int)first_row + (down ? moving : row),
                              c = (int)first_column + (down ? column : moving);
                    values[j] = convert(factor.value(at, r, c));
                    at += step;
                    moving += stride;
                }
            } else {
#pragma unroll
                for (int j = 0; j < UNROLL; ++j) {
                    const bool has = moving < end;
                    const int r = (int)first_row + (down ? moving : row),
                              c = (int)first_column + (down ? column : moving);
                    // Beyond the end the first element of the tile is loaded and dropped: no branch before the load.
                    const To value =
                        convert(factor.value(has ? at : origin, has ? r : (int)first_row, has ? c : (int)first_column));
                    values[j] = has ? value : To(0);
                    at += step;
                    moving += stride;
                }
            }
#pragma unroll
            for (int j = 0; j < UNROLL; ++j, target += pitch) *target = values[j];
        }
    }
};

// Adds the partial sums shared[k split][column, of `columns`][row, `pitch` apart] in order of the splits. Calls
// emit(row, column, sum) for `rows` rows and `width` columns, `left` of which are within the matrix; neighbouring
// threads have neighbouring columns. Begins and ends with a barrier.
template <typename A, typename Emit>
__device__ __forceinline__ void emit_sums(const A* shared, int k_splits, int columns, int pitch, int rows, int width,
                                          long long left, const Emit& emit) {
    __syncthreads();
    const int bits = __popc(width - 1), c = threadIdx.x & (width - 1), stride = PRODUCT_THREADS >> bits;
    for (int r = threadIdx.x >> bits; r < rows && c < left; r += stride) {
        const A* at = shared + c * pitch + r;
        A sum = *at;
#pragma unroll 4
        for (int s = 1; s < k_splits; ++s) sum += *(at += columns * pitch);
        emit(r, c, sum);
    }
    __syncthreads();
}
