// Slices of channels whose rows several blocks share: ownership of rows, and reduction over threads and blocks.
//
// The grid is (columns, splits). The blocks of a column, `splits` of them, share the rows of a slice of channels; the
// columns take the slices in turn. With more than one split the launch is cooperative, so that all blocks are resident
// and may wait for each other. A row is a vector of 16 bytes: COUNT neighbouring channels of an example
// (CHANNELS_LAST), or COUNT neighbouring positions of one channel. Worker y of split g, the threads with threadIdx.y =
// y, is worker g * blockDim.y + y of the slice; the workers take the rows in turn, as in rows.cuh.
#pragma once

#include "lib/numbers/vector.cuh"
#include "lib/reduce/moments.cuh"
#include "lib/reduce/rows.cuh"
#include "lib/sync/grid_barrier.cuh"

constexpr int COOPERATIVE_FAN_IN = 8;  // partial results that one thread merges

// The rows of a thread, and their offsets in the tensor.
template <typename T, bool CHANNELS_LAST>
struct ThreadRows {
    static constexpr int COUNT = Packed<T>::COUNT;
    static constexpr int THREAD_CHANNELS = CHANNELS_LAST ? COUNT : 1;  // channels of a thread

    long long outer, inner;  // of the tensor; inner in vectors
    int worker, workers;

    __device__ __forceinline__ ThreadRows(long long outer, long long inner)
        : outer(outer),
          inner(CHANNELS_LAST ? 1 : inner / COUNT),
          worker(blockIdx.y * blockDim.y + threadIdx.y),
          workers(gridDim.y * blockDim.y) {}

    // Number of the thread's rows, at least one.
    __device__ __forceinline__ long long count() const { return (outer * inner - worker - 1) / workers + 1; }

    // The thread's rows, beginning with its row number `first`.
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

    // Offset of a row of the channels c, c + 1, ... in an array with these strides; the remaining stride is 1.
    __device__ __forceinline__ long long at(const Rows<CHANNELS_LAST>& row, long long outer_stride,
                                            long long channel_stride, long long c) const {
        return row.outer * outer_stride + (CHANNELS_LAST ? c : c * channel_stride + row.index * COUNT);
    }

    // The same in an output, which is in C order.
    __device__ __forceinline__ long long at_output(const Rows<CHANNELS_LAST>& row, long long channels,
                                                   long long c) const {
        return CHANNELS_LAST ? at(row, channels, 1, c) : at(row, channels * inner * COUNT, inner * COUNT, c);
    }
};

// Reduction of partial results of a slice over workers and splits. Partial::merge(to, to_plane, slots, plane, pitch,
// counts, first, last, step) merges the partial results of the workers first ... last - 1, as merge_workers of
// moments.cuh; `to` may alias `slots`. A partial result has Partial::QUANTITIES numbers a channel. All threads must
// call.
template <typename Partial>
struct SliceReduction {
    static constexpr int QUANTITIES = Partial::QUANTITIES;

    float* shared;  // [quantity][worker][channel of the slice]
    const RowCounts counts;
    int width, plane;

    __device__ __forceinline__ SliceReduction(float* shared, const RowCounts& counts, int width)
        : shared(shared), counts(counts), width(width), plane(width * blockDim.y) {}

    // Place of the thread's partial result, for the first of its channels.
    __device__ __forceinline__ float* slot(int own) const { return shared + threadIdx.y * width + threadIdx.x * own; }

    // Merges `slots` slots, each of `unit` workers from worker `first` on, into slot 0.
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

    // Merges over the block, then over the splits; every block gets the result in slot 0. `partial` is
    // [2][column][split][quantity][channel of the slice], used alternately: a slower block may still read the half of
    // the previous slice.
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
