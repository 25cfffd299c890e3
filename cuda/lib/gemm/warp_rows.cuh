// Rows in shared memory that a warp normalises: all examples of a neuron (batch norm), or all neurons of an example
// (layer norm).
#pragma once

#include "lib/numbers/activation.cuh"
#include "lib/numbers/half.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/normalisation.cuh"
#include "lib/reduce/warp.cuh"

// Row pitch: rows begin in different banks.
__device__ __forceinline__ int pitch_of(long long length) { return (int)((length + 3) / 4 * 4 + 4); }

// A row and the warp that owns it. All threads of the warp must call every function.
template <typename A>
struct WarpRow {
    A* row;
    int count, lane;

    __device__ __forceinline__ WarpRow(A* row, long long count)
        : row(row), count((int)count), lane(threadIdx.x % WARP) {}

    // sum_n f(n, row[n]), identical in all threads.
    template <typename Function>
    __device__ __forceinline__ A sum(const Function& f) const {
        A total = A(0);
#pragma unroll 4
        for (int n = lane; n < count; n += WARP) total += f(n, row[n]);
        return warp_sum(total);
    }

    // Subtracts `less` from every value and returns sum_n f(row[n]), identical in all threads.
    template <typename Function>
    __device__ __forceinline__ A subtract_and_sum(A less, const Function& f) const {
        A total = A(0);
#pragma unroll 4
        for (int n = lane; n < count; n += WARP) total += f(row[n] -= less);
        return warp_sum(total);
    }

    // row[n] = f(n, row[n]), in a rolled loop: activations are long.
    template <typename Function>
    __device__ __forceinline__ void replace(const Function& f) const {
#pragma unroll 1
        for (int n = lane; n < count; n += WARP) row[n] = f(n, row[n]);
    }
};

// The map without statistics: gamma and beta of a neuron.
template <typename Arguments>
__device__ __forceinline__ auto load_affine(const Arguments& a, long long m) {
    using A = decltype(a.alpha + 0);
    return Affine<A>{{A(0), A(0)}, a.gamma ? a.gamma[m] : A(1), a.beta ? a.beta[m] : A(0)};
}

// Calls work(c) for every row of the block; the warps take the rows in turn.
template <typename Work>
__device__ __forceinline__ void for_each_row(int width, long long left, const Work& work) {
    for (int c = threadIdx.x / WARP; c < width && c < left; c += blockDim.x / WARP) work(c);
}

// Copies the tile (width, examples) of a block to its columns of a matrix (examples, outputs), and back.
template <typename T, typename A>
__device__ __forceinline__ void store_tile(T* matrix, const A* tile, int pitch, long long examples, long long outputs,
                                           long long column, int width) {
    const int bits = __popc(width - 1), c = threadIdx.x & (width - 1);  // width is a power of two
    for (int n = threadIdx.x >> bits; n < examples && column + c < outputs; n += blockDim.x >> bits)
        store(matrix[n * outputs + column + c], tile[c * pitch + n]);
}

template <typename T, typename A>
__device__ __forceinline__ void load_tile(A* tile, const T* matrix, int pitch, long long examples, long long outputs,
                                          long long column, int width) {
    const int bits = __popc(width - 1), c = threadIdx.x & (width - 1);  // width is a power of two
    for (int n = threadIdx.x >> bits; n < examples; n += blockDim.x >> bits)
        tile[c * pitch + n] = column + c < outputs ? A(matrix[n * outputs + column + c]) : A(0);
}

// Copies the tile (width, neurons) of a block to the rows of a matrix from `first` on, and back.
template <typename T, typename A>
__device__ __forceinline__ void store_rows(T* matrix, const A* tile, int pitch, long long rows, long long outputs,
                                           long long first, int width) {
    for (int c = 0; c < width && first + c < rows; ++c)
        for (int m = threadIdx.x; m < outputs; m += blockDim.x)
            store(matrix[(first + c) * outputs + m], tile[c * pitch + m]);
}

template <typename T, typename A>
__device__ __forceinline__ void load_rows(A* tile, const T* matrix, int pitch, long long rows, long long outputs,
                                          long long first, int width) {
    for (int c = 0; c < width && first + c < rows; ++c)
        for (int m = threadIdx.x; m < outputs; m += blockDim.x)
            tile[c * pitch + m] = A(matrix[(first + c) * outputs + m]);
}
