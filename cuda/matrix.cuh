// What the products of one block have in common: the factors, their sizes, and how partial sums become one.
#pragma once

#include "half.cuh"
#include "team.cuh"

constexpr int PRODUCT_THREADS = 256;
constexpr int PRODUCT_ROWS = 32 * EXAMPLES;  // of a tile, at most
constexpr int TERMS = 32;                    // of a product, in shared memory at a time

// A matrix with any strides; 0 beyond its end.
template <typename T>
struct Matrix {
    const T* data;
    long long rows, columns, row_step, column_step;

    __device__ __forceinline__ bool has(long long row, long long column) const {
        return row < rows && column < columns;
    }

    template <typename A>
    __device__ __forceinline__ A at(long long row, long long column) const {
        return has(row, column) ? A(data[row * row_step + column * column_step]) : A(0);
    }

    // Of 16-bit numbers; those of 0 are 0.
    __device__ __forceinline__ unsigned short bits_at(long long row, long long column) const {
        return has(row, column) ? data[row * row_step + column * column_step].bits : (unsigned short)0;
    }
};

// Adds up the slices of partial sums, in their order: shared[slice][column, of `columns`][row, `pitch` apart]. Calls
// emit(row, column, sum) for `rows` rows and `width` columns, of which the matrix has `left`, neighbouring threads with
// neighbouring columns. Between two barriers.
template <typename A, typename Emit>
__device__ __forceinline__ void emit_sums(const A* shared, int slices, int columns, int pitch, int rows, int width,
                                          long long left, const Emit& emit) {
    __syncthreads();
    for (int i = threadIdx.x; i < rows * width; i += PRODUCT_THREADS) {
        const int r = i / width, c = i % width;
        A sum = shared[c * pitch + r];
#pragma unroll 4
        for (int s = 1; s < slices; ++s) sum += shared[(s * columns + c) * pitch + r];
        if (c < left) emit(r, c, sum);
    }
    __syncthreads();
}
