// Products of matrices for the columns of one block: all rows, a few columns, and the block's threads share the terms.
//
// A tile is at most 256 rows by `width` columns. A thread multiplies EXAMPLES rows by COLUMNS columns in registers; 8, 16
// or 32 neighbouring threads have a tile's rows, `width` / COLUMNS such teams its columns, and what is left of the block's
// threads, `slices`, takes every slices-th term. The slices are added up in their order.
#pragma once

#include "half.cuh"
#include "team.cuh"

constexpr int PRODUCT_THREADS = 256;
constexpr int PRODUCT_ROWS = 32 * EXAMPLES;  // of a tile, at most
constexpr int TERMS = 32;                    // of a product, in shared memory at a time
template <typename A>
constexpr int COLUMNS = 16 / sizeof(A);  // what one access loads

// A matrix with any strides; 0 beyond its end.
template <typename T>
struct Matrix {
    const T* data;
    long long rows, columns, row_step, column_step;

    template <typename A>
    __device__ __forceinline__ A at(long long row, long long column) const {
        return row < rows && column < columns ? A(data[row * row_step + column * column_step]) : A(0);
    }
};

template <typename A>
struct alignas(16) Across {
    A of[COLUMNS<A>];
};

// left (rows, terms) times right (terms, columns): the rows from `row` on, and `width` columns from `column` on. Calls
// emit(row within the tile, column within the tile, value), neighbouring threads with neighbouring columns, and ends with
// a barrier. shared: room for product_numbers, see bnkernels/linear_batch_norm.py. All threads must call.
template <typename T, typename A, typename Emit>
__device__ __forceinline__ void product(A* shared, const Matrix<T>& left, const Matrix<T>& right, long long row,
                                        long long column, int width, const Emit& emit) {
    const long long terms = left.columns, rest = left.rows - row;
    const int lanes = rest <= 8 * EXAMPLES ? 8 : rest <= 16 * EXAMPLES ? 16 : 32, teams = width / COLUMNS<A>;
    const int rows = lanes * EXAMPLES, slices = PRODUCT_THREADS / (lanes * teams), thread = threadIdx.x;
    const Team<A> own(lanes, rows);
    const int pitch = own.pitch, team = own.number % teams, slice = own.number / teams;
    A* const lefts = shared;                   // (TERMS, rows)
    A* const rights = shared + TERMS * pitch;  // (TERMS, width)
    A sums[COLUMNS<A>][EXAMPLES] = {};
    const bool along_rows = left.row_step == 1 && left.column_step != 1, along_terms = right.column_step != 1;
#pragma unroll 1
    for (long long first = 0; first < terms; first += TERMS) {
#pragma unroll 4
        for (int i = thread; i < rows * TERMS; i += PRODUCT_THREADS) {  // neighbours in memory by neighbouring threads
            const int r = along_rows ? i % rows : i / TERMS, t = along_rows ? i / rows : i % TERMS;
            lefts[t * pitch + r] = left.template at<A>(row + r, first + t);
        }
        for (int i = thread; i < width * TERMS; i += PRODUCT_THREADS) {
            const int c = along_terms ? i / TERMS : i % width, t = along_terms ? i % TERMS : i / width;
            rights[t * width + c] = right.template at<A>(first + t, column + c);
        }
        __syncthreads();
#pragma unroll 2
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
    __syncthreads();
    const int used = (int)min((long long)rows, rest);
    for (int i = thread; i < used * width; i += PRODUCT_THREADS) {
        const int r = i / width, c = i % width;
        A sum = shared[c * pitch + r];
#pragma unroll 4
        for (int s = 1; s < slices; ++s) sum += shared[(s * width + c) * pitch + r];
        if (column + c < right.columns) emit(r, c, sum);
    }
    __syncthreads();
}
