// Sums over the rows of a channel. Every worker sums its rows in pairs; a block merges the workers through shared
// memory.
//
// The order is fixed, so the result is deterministic: workers merge in ascending order, more than SERIAL_WORKERS of
// them first MERGE_FAN_IN at a time. Shared memory: COUNT values of A for each thread.
#pragma once
#include "lib/kernel.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/rows.cuh"

template <typename A, int COUNT>
struct ChannelSums {
    Pair<A> sums[COUNT];

    __device__ __forceinline__ void add_row(const A (&terms)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] = add(sums[i], terms[i]);
    }

    // Stores the sums in the thread's place in shared memory, [sum][worker][channel of the slice].
    __device__ __forceinline__ void share(A* partial) const {
        A* slot = partial + threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) slot[i * blockDim.x * blockDim.y] = value(sums[i]);
    }
};

// Merges the workers first, first + step, ... below last from shared memory.
template <typename A, int COUNT>
__device__ __forceinline__ ChannelSums<A, COUNT> merge_workers(const A* partial, int first, int last, int step) {
    const int width = blockDim.x, plane = width * blockDim.y;
    ChannelSums<A, COUNT> total = {};
#pragma unroll 1
    for (int worker = first; worker < last; worker += step) {
        const A* slot = partial + worker * width + threadIdx.x;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) total.sums[i] = add(total.sums[i], slot[i * plane]);
    }
    return total;
}

// Sums of one channel over the block, identical in all its threads. All threads must call.
template <typename A, int COUNT>
__device__ __forceinline__ ChannelSums<A, COUNT> merge_block(const ChannelSums<A, COUNT>& own) {
    BNK_DYNAMIC_SHARED(A, partial);
    const int worker = threadIdx.y, workers = blockDim.y;
    own.share(partial);
    __syncthreads();
    if (workers > SERIAL_WORKERS) {
        if (worker % MERGE_FAN_IN == 0)
            merge_workers<A, COUNT>(partial, worker, min(worker + MERGE_FAN_IN, workers), 1).share(partial);
        __syncthreads();
    }
    return merge_workers<A, COUNT>(partial, 0, workers, workers > SERIAL_WORKERS ? MERGE_FAN_IN : 1);
}
