// Subwarps: 8, 16 or 32 neighbouring threads of a warp that own a neuron for a whole mini-batch.
//
// Each thread holds EXAMPLES examples in registers; sums over the mini-batch are shuffles and need no barrier. A row in
// shared memory holds one value of every example, in their order.
#pragma once

constexpr int EXAMPLES = 8;  // of a thread

template <typename T>
struct alignas(16) Four {
    T values[4];
};

// The examples of a thread, and sums over its subwarp.
template <typename T>
struct Subwarp {
    int size, rank, index, count;  // count: subwarps of the block
    int first;                     // index of the warp's first subwarp
    int batch, pitch;              // pitch: from a row of examples to the next
    bool full;                     // every thread has EXAMPLES examples

    __device__ __forceinline__ Subwarp(int size, int batch)
        : size(size),
          rank(threadIdx.x % size),
          index(threadIdx.x / size),
          count(blockDim.x / size),
          first(threadIdx.x / 32 * 32 / size),
          batch(batch),
          pitch(EXAMPLES * size + 4),  // 4 more, so that consecutive rows begin in different banks
          full(batch == EXAMPLES * size) {}

    // Example number of the thread's i-th value: four neighbours, for 16-byte accesses.
    __device__ __forceinline__ int example(int i) const { return i / 4 * 4 * size + 4 * rank + i % 4; }
    __device__ __forceinline__ bool has(int i) const { return example(i) < batch; }

    __device__ __forceinline__ void load(T (&values)[EXAMPLES], const T* row) const {
#pragma unroll
        for (int i = 0; i < EXAMPLES; i += 4) {
            const Four<T> four = *reinterpret_cast<const Four<T>*>(row + example(i));
#pragma unroll
            for (int j = 0; j < 4; ++j) values[i + j] = four.values[j];
        }
    }

    // Stores 0 where there is no example.
    __device__ __forceinline__ void store(T* row, const T (&values)[EXAMPLES]) const {
#pragma unroll
        for (int i = 0; i < EXAMPLES; i += 4) {
            Four<T> four;
#pragma unroll
            for (int j = 0; j < 4; ++j) four.values[j] = has(i + j) ? values[i + j] : T(0);
            *reinterpret_cast<Four<T>*>(row + example(i)) = four;
        }
    }

    // The value of the first example, in all threads. All threads of the warp must call.
    __device__ __forceinline__ T first_example(const T (&values)[EXAMPLES]) const {
        return __shfl_sync(0xffffffffu, values[0], 0, size);
    }

    // Subtracts `less` from every value; leaves 0 where there is no example.
    __device__ __forceinline__ void subtract(T (&values)[EXAMPLES], T less) const {
        if (full) {
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) values[i] -= less;
        } else {
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) values[i] = has(i) ? values[i] - less : T(0);
        }
    }

    // Sum over the subwarp, identical in all its threads. All threads of the warp must call.
    __device__ __forceinline__ T reduce(T own) const {
        if (size == 32) own += __shfl_xor_sync(0xffffffffu, own, 16);
        if (size >= 16) own += __shfl_xor_sync(0xffffffffu, own, 8);
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) own += __shfl_xor_sync(0xffffffffu, own, offset);
        return own;
    }

    // Sum over all examples; values without an example must be 0. Neighbours are added first: short chains.
    __device__ __forceinline__ T sum(const T (&values)[EXAMPLES]) const {
        T sums[EXAMPLES / 2];
#pragma unroll
        for (int i = 0; i < EXAMPLES / 2; ++i) sums[i] = values[2 * i] + values[2 * i + 1];
        return reduce((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }

    __device__ __forceinline__ T sum_of_products(const T (&a)[EXAMPLES], const T (&b)[EXAMPLES]) const {
        T sums[EXAMPLES / 2];
#pragma unroll
        for (int i = 0; i < EXAMPLES / 2; ++i) sums[i] = fma(a[2 * i], b[2 * i], a[2 * i + 1] * b[2 * i + 1]);
        return reduce((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }

    // values += sum_k weights[k step] rows[k]
    __device__ __forceinline__ void add_product(T (&values)[EXAMPLES], const T* weights, int step, const T* rows,
                                                int terms) const {
#pragma unroll 8
        for (int k = 0; k < terms; ++k) {
            T row[EXAMPLES];
            load(row, rows + k * pitch);
            const T weight = weights[k * step];
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) values[i] = fma(weight, row[i], values[i]);
        }
    }
};
