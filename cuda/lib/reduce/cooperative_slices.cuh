// Slices of channels that several blocks share: which rows are whose, what stays on the chip, how the blocks meet.
//
// The grid is (groups, G): the G blocks blockIdx.y of a group share the rows of a slice of channels, and the groups take
// the slices in turn. All blocks are resident at once where G > 1 (a cooperative launch), so they may wait for each other.
// A row is 16 bytes: COUNT neighbouring channels of an example (CHANNELS: the tensor lies channels-last), or COUNT
// neighbouring positions of one channel. Lane y of block g is lane g * lanes + y of the group; the lanes take the rows
// in turn, as in channel.cuh.
#pragma once

#include "lib/numbers/vector.cuh"
#include "lib/reduce/moments.cuh"
#include "lib/reduce/rows.cuh"
#include "lib/sync/grid_barrier.cuh"

constexpr int COOPERATIVE_FAN_IN = 8;  // partial results that one thread merges

// Where a thread is in the tensor.
template <typename T, bool CHANNELS_LAST>
struct ThreadRows {
    static constexpr int COUNT = Packed<T>::COUNT;
    static constexpr int THREAD_CHANNELS = CHANNELS_LAST ? COUNT : 1;  // channels of a thread

    long long outer, inner;  // of the tensor; inner in rows
    int worker, workers;

    __device__ __forceinline__ ThreadRows(long long outer, long long inner)
        : outer(outer),
          inner(CHANNELS_LAST ? 1 : inner / COUNT),
          worker(blockIdx.y * blockDim.y + threadIdx.y),
          workers(gridDim.y * blockDim.y) {}

    // How many rows the thread has, at least one.
    __device__ __forceinline__ long long count() const { return (outer * inner - worker - 1) / workers + 1; }

    // The thread's rows from its row number `first` on.
    __device__ __forceinline__ Rows<CHANNELS_LAST> from(long long first) const {
        Rows<CHANNELS_LAST> rows(outer, inner, worker, workers);
        const long long row = worker + first * workers;
        if (CHANNELS_LAST || first == 0) {
            rows.outer = CHANNELS_LAST ? row : rows.outer;
        } else {
            rows.outer = row / inner;
            rows.index = row - rows.outer * inner;
        }
        return rows;
    }

    __device__ __forceinline__ RowCounts counts() const {
        return RowCounts(outer * inner, workers, CHANNELS_LAST ? 1 : COUNT);
    }

    // Where a row of the channels from c on begins, in an array with these strides; the other stride is 1.
    __device__ __forceinline__ long long at(const Rows<CHANNELS_LAST>& row, long long outer_stride,
                                            long long channel_stride, long long c) const {
        return row.outer * outer_stride + (CHANNELS_LAST ? c : c * channel_stride + row.index * COUNT);
    }

    // The same in an output, which lies in C order.
    __device__ __forceinline__ long long at_output(const Rows<CHANNELS_LAST>& row, long long channels,
                                                   long long c) const {
        return CHANNELS_LAST ? at(row, channels, 1, c) : at(row, channels * inner * COUNT, inner * COUNT, c);
    }
};

// How what the lanes of a block, and the blocks of a group, know of the channels of a slice becomes one. Partial merges:
// Partial::merge(to, slots, plane, pitch, shares, first, last, step), as merge_lanes of moments.cuh; `to` may be `slots`.
// It has QUANTITIES numbers a channel. All threads must call.
template <typename Partial>
struct SliceReduction {
    static constexpr int QUANTITIES = Partial::QUANTITIES;

    float* shared;  // [quantity][lane][channel of the slice]
    const RowCounts counts;
    int width, plane;

    __device__ __forceinline__ SliceReduction(float* shared, const RowCounts& counts, int width)
        : shared(shared), counts(counts), width(width), plane(width * blockDim.y) {}

    // Where a thread stores what its lane knows of the first of its channels.
    __device__ __forceinline__ float* slot(int own) const { return shared + threadIdx.y * width + threadIdx.x * own; }

    // From the slots 0, 1, ..., each of `unit` lanes from the lane `first` on, into slot 0.
    __device__ __forceinline__ void merge_slots(int slots, int first, int unit) const {
        const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
        for (int step = 1; step < slots; step *= COOPERATIVE_FAN_IN) {
            const int merged = (slots + step * COOPERATIVE_FAN_IN - 1) / (step * COOPERATIVE_FAN_IN);
            __syncthreads();
            for (int item = thread; item < width * merged; item += threads) {
                const int slot = item / width * step * COOPERATIVE_FAN_IN,
                          last = min(slot + step * COOPERATIVE_FAN_IN, slots);
                float* const at = shared + slot * width + item % width;
                Partial::merge(at, plane, at, plane, step * width, counts, first + slot * unit, first + last * unit,
                               step * unit);
            }
        }
        __syncthreads();
    }

    // Over the block and then over its group; the result is in slot 0 of every block. `partial` holds
    // [2][group][block][quantity][channel of the slice]: while one half is written, a block that is behind may still read
    // the other.
    __device__ __forceinline__ void merge(float* partial, unsigned* barrier_counter, bool odd) const {
        const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
        const int block_workers = blockDim.y, blocks = gridDim.y, size = QUANTITIES * width;
        merge_slots(block_workers, blockIdx.y * block_workers, 1);
        if (blocks == 1) return;
        float* const slice_partials = partial + (long long)((odd ? gridDim.x : 0) + blockIdx.x) * blocks * size;
        for (int item = thread; item < size; item += threads)
            slice_partials[blockIdx.y * size + item] = shared[item / width * plane + item % width];
        grid_barrier(barrier_counter + blockIdx.x * BARRIER_PITCH, blocks, blockIdx.y);
        const int merged = (blocks + COOPERATIVE_FAN_IN - 1) / COOPERATIVE_FAN_IN;
        for (int item = thread; item < width * merged; item += threads) {
            const int slot = item / width, first = slot * COOPERATIVE_FAN_IN,
                      last = min(first + COOPERATIVE_FAN_IN, blocks);
            Partial::merge(shared + slot * width + item % width, plane, slice_partials + first * size + item % width,
                           width, size, counts, first * block_workers, last * block_workers, block_workers);
        }
        merge_slots(merged, 0, COOPERATIVE_FAN_IN * block_workers);
    }
};
