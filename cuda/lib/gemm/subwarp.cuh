// Teams of neighbouring threads that own a neuron for a whole mini-batch, and the shared memory they work on.
//
// A team has 8, 16 or 32 threads, each with EXAMPLES examples in registers: what a neuron needs of its mini-batch is added
// up by shuffles, without a barrier. In shared memory a row holds one value of every example, in their order.
#pragma once

constexpr int EXAMPLES = 8;  // of a thread

template <typename T>
struct alignas(16) Four {
    T values[4];
};

// The examples of a thread, and the sums of its team.
template <typename T>
struct Subwarp {
    int size, rank, index, count;  // count: teams of the block
    int first;                     // the number of the first team of the warp
    int batch, pitch;              // pitch: from a row of examples to the next
    bool full;                     // whether every thread has EXAMPLES of them

    __device__ __forceinline__ Subwarp(int size, int batch)
        : size(size),
          rank(threadIdx.x % size),
          index(threadIdx.x / size),
          count(blockDim.x / size),
          first(threadIdx.x / 32 * 32 / size),
          batch(batch),
          pitch(EXAMPLES * size + 4),  // 4 more: rows one below the other begin in different banks
          full(batch == EXAMPLES * size) {}

    // Which example the i-th of a thread is: four side by side, as one access takes them.
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

    // 0 where there is no example.
    __device__ __forceinline__ void store(T* row, const T (&values)[EXAMPLES]) const {
#pragma unroll
        for (int i = 0; i < EXAMPLES; i += 4) {
            Four<T> four;
#pragma unroll
            for (int j = 0; j < 4; ++j) four.values[j] = has(i + j) ? values[i + j] : T(0);
            *reinterpret_cast<Four<T>*>(row + example(i)) = four;
        }
    }

    // Takes `less` off every value, and leaves 0 where there is no example.
    __device__ __forceinline__ void subtract(T (&values)[EXAMPLES], T less) const {
        if (full) {
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) values[i] -= less;
        } else {
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) values[i] = has(i) ? values[i] - less : T(0);
        }
    }

    // Over the threads of the team, the same in each of them. All threads of the warp must call.
    __device__ __forceinline__ T reduce(T own) const {
        if (size == 32) own += __shfl_xor_sync(0xffffffffu, own, 16);
        if (size >= 16) own += __shfl_xor_sync(0xffffffffu, own, 8);
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) own += __shfl_xor_sync(0xffffffffu, own, offset);
        return own;
    }

    // Over all examples; the values are 0 where there is none.
    __device__ __forceinline__ T sum(const T (&values)[EXAMPLES]) const {
        T total = values[0];
#pragma unroll
        for (int i = 1; i < EXAMPLES; ++i) total += values[i];
        return reduce(total);
    }

    __device__ __forceinline__ T sum_of_products(const T (&a)[EXAMPLES], const T (&b)[EXAMPLES]) const {
        T total = a[0] * b[0];
#pragma unroll
        for (int i = 1; i < EXAMPLES; ++i) total = fma(a[i], b[i], total);
        return reduce(total);
    }

    // values += sum_k weights[k step] rows[k]
    __device__ __forceinline__ void add_product(T (&values)[EXAMPLES], const T* weights, int step, const T* rows,
                                                int terms) const {
#pragma unroll 4
        for (int k = 0; k < terms; ++k) {
            T row[EXAMPLES];
            load(row, rows + k * pitch);
            const T weight = weights[k * step];
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) values[i] = fma(weight, row[i], values[i]);
        }
    }
};
