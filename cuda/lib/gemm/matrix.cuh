// What the products of one block have in common: the factors, their sizes, and how partial sums become one.
#pragma once

#include "lib/gemm/subwarp.cuh"
#include "lib/numbers/half.cuh"

constexpr int PRODUCT_THREADS = 256;
constexpr int PRODUCT_ROWS = 32 * EXAMPLES;  // of a tile, at most
constexpr int TILE_K = 32;                   // of a product, in shared memory at a time

// A matrix with any strides; 0 beyond its end.
template <typename T>
struct Matrix {
    const T* data;
    long long rows, columns, row_step, column_step;

    __device__ __forceinline__ const T* address(long long row, long long column) const {
        return data + row * row_step + column * column_step;
    }
    // What is at an address within, of this row and column.
    __device__ __forceinline__ T value(const T* at, int, int) const { return *at; }
};

// How the block takes tiles of a matrix to shared memory: neighbours in memory by neighbouring threads. Rows and columns of
// a tile are powers of two, and each thread has one row of it or one column, so nothing is divided on the way.
template <typename Factor>
struct TileLoader {
    const Factor& factor;
    bool down;  // the thread has a column: it goes down the rows
    int row, column, stride, count, used;

    // used: how many columns of a tile belong to it, the others are 0.
    __device__ __forceinline__ TileLoader(const Factor& factor, int rows, int columns, int used)
        : factor(factor), down(factor.row_step != 1 || factor.column_step == 1), used(used) {
        const int length = down ? columns : rows, others = down ? rows : columns, bits = __popc(length - 1);
        const int near = threadIdx.x & (length - 1), far = threadIdx.x >> bits;
        stride = PRODUCT_THREADS >> bits;
        row = down ? far : near;
        column = down ? near : far;
        count = far < others ? max((others << bits) / PRODUCT_THREADS, 1) : 0;
    }

    // Takes what is the thread's of the tile from (first_row, first_column) on: to[row row_pitch + column column_pitch].
    // GROUP numbers are on their way at once, and divide `count`. convert(number) is what is kept.
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
                    // Of what is not there the tile's first number is taken, and dropped: a load waits for no branch.
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

// Adds up the slices of partial sums, in their order: shared[slice][column, of `columns`][row, `pitch` apart]. Calls
// emit(row, column, sum) for `rows` rows and `width` columns, of which the matrix has `left`, neighbouring threads with
// neighbouring columns. Between two barriers.
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
