// Rows of a matrix, each shared by the threads of a block with the same threadIdx.y: access and row-wise sums.
//
// blockDim.x is a power of two. A unit is a vector of 16 bytes of a row. A thread takes every blockDim.x-th unit,
// always the same ones: no other thread reads the units that it keeps in shared memory, so they need no barrier.
#pragma once

#include "lib/numbers/pair.cuh"
#include "lib/numbers/vector.cuh"

template <typename T>
constexpr int UNIT = Packed<T>::COUNT;

// Rows of `length` values. aligned16: a row is a whole number of units and begins at a multiple of 16 bytes.
struct VectorRows {
    long long length;
    bool aligned16;

    template <typename T>
    __device__ __forceinline__ long long units() const {
        return (length + UNIT<T> - 1) / UNIT<T>;
    }

    // Whether element i of a unit is within the row.
    template <typename T>
    __device__ __forceinline__ bool has(long long unit, int i) const {
        return aligned16 || unit * UNIT<T> + i < length;
    }

    // Loads a unit; elements beyond the end of the row are 0.
    template <typename T>
    __device__ __forceinline__ Vector load(const T* row, long long unit) const {
        if (aligned16) return bnk_load_vector(row + unit * UNIT<T>);
        Vector vector = {};
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i)
            if (has<T>(unit, i)) Packed<T>::set(vector, i, typename Packed<T>::Number(row[unit * UNIT<T> + i]));
        return vector;
    }

    template <typename T, typename A>
    __device__ __forceinline__ void store(T* row, long long unit, const A (&values)[UNIT<T>]) const {
        if (aligned16) {
            Vector vector = {};
#pragma unroll
            for (int i = 0; i < UNIT<T>; ++i) Packed<T>::set(vector, i, values[i]);
            bnk_store_vector(row + unit * UNIT<T>, vector);
            return;
        }
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i)
            if (has<T>(unit, i)) row[unit * UNIT<T> + i] = T(values[i]);
    }

    // Loads the parameters of a unit's columns: `missing` if there are none, and beyond the end.
    template <typename T, typename A>
    __device__ __forceinline__ void load_parameters(A (&values)[UNIT<T>], const A* parameters, long long unit,
                                                    A missing) const {
        constexpr int COUNT = UNIT<A>;
#pragma unroll
        for (int i = 0; i < UNIT<T>; i += COUNT) {
            Vector four = {};
            if (aligned16 && parameters) four = bnk_load_vector(parameters + unit * UNIT<T> + i);
#pragma unroll
            for (int j = 0; j < COUNT; ++j) {
                values[i + j] = aligned16 && parameters ? Packed<A>::get(four, j) : missing;
                if (!aligned16 && parameters && has<T>(unit, i + j)) values[i + j] = parameters[unit * UNIT<T> + i + j];
            }
        }
    }
};

// Calls work(k, unit) for the thread's units first <= unit < last, k = 0, 1, ...
template <int UNROLL = 1, typename Work>
__device__ __forceinline__ void for_each_unit(long long first, long long last, const Work& work) {
    int k = 0;
#pragma unroll UNROLL
    for (long long unit = first + threadIdx.x; unit < last; unit += blockDim.x) work(k++, unit);
}

// Sum over the threads of a row, identical in all of them. `scratch` holds a pair for every warp of the block. All
// threads must call.
template <typename A>
__device__ __forceinline__ Pair<A> row_sum(Pair<A> sum, Pair<A>* scratch) {
    const int width = blockDim.x, warps = width / 32;
    for (int offset = min(width, 32) / 2; offset > 0; offset /= 2) {
        const Pair<A> other = {__shfl_xor_sync(0xffffffffu, sum.high, offset),
                               __shfl_xor_sync(0xffffffffu, sum.low, offset)};
        sum = add(sum, other);
    }
    if (warps <= 1) return sum;
    Pair<A>* const own = scratch + threadIdx.y * warps;
    if (threadIdx.x % 32 == 0) own[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = own[0];
#pragma unroll 1
    for (int warp = 1; warp < warps; ++warp) sum = add(sum, own[warp]);
    __syncthreads();  // the next sum uses the same scratch
    return sum;
}
