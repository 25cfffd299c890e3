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

constexpr int FAN_IN = 8;  // partial results that one thread merges

// Where a thread is in the tensor.
template <typename T, bool CHANNELS>
struct Place {
    static constexpr int COUNT = Packed<T>::COUNT;
    static constexpr int OWN = CHANNELS ? COUNT : 1;  // channels of a thread

    long long outer, inner;  // of the tensor; inner in rows
    int lane, group_lanes;

    __device__ __forceinline__ Place(long long outer, long long inner)
        : outer(outer),
          inner(CHANNELS ? 1 : inner / COUNT),
          lane(blockIdx.y * blockDim.y + threadIdx.y),
          group_lanes(gridDim.y * blockDim.y) {}

    // How many rows the thread has, at least one.
    __device__ __forceinline__ long long rows() const { return (outer * inner - lane - 1) / group_lanes + 1; }

    // The thread's rows from its row number `first` on.
    __device__ __forceinline__ Rows<CHANNELS> from(long long first) const {
        Rows<CHANNELS> rows(outer, inner, lane, group_lanes);
        const long long row = lane + first * group_lanes;
        if (CHANNELS || first == 0) {
            rows.outer = CHANNELS ? row : rows.outer;
        } else {
            rows.outer = row / inner;
            rows.index = row - rows.outer * inner;
        }
        return rows;
    }

    __device__ __forceinline__ Shares shares() const {
        return Shares(outer * inner, group_lanes, CHANNELS ? 1 : COUNT);
    }

    // Where a row of the channels from c on begins, in an array with these strides; the other stride is 1.
    __device__ __forceinline__ long long at(const Rows<CHANNELS>& row, long long outer_stride, long long channel_stride,
                                            long long c) const {
        return row.outer * outer_stride + (CHANNELS ? c : c * channel_stride + row.index * COUNT);
    }

    // The same in an output, which lies in C order.
    __device__ __forceinline__ long long at_output(const Rows<CHANNELS>& row, long long channels, long long c) const {
        return CHANNELS ? at(row, channels, 1, c) : at(row, channels * inner * COUNT, inner * COUNT, c);
    }
};

// How what the lanes of a block, and the blocks of a group, know of the channels of a slice becomes one. Partial merges:
// Partial::merge(to, slots, plane, pitch, shares, first, last, step), as merge_lanes of moments.cuh; `to` may be `slots`.
// It has QUANTITIES numbers a channel. All threads must call.
template <typename Partial>
struct Meeting {
    static constexpr int QUANTITIES = Partial::QUANTITIES;

    float* shared;  // [quantity][lane][channel of the slice]
    const Shares shares;
    int width, plane;

    __device__ __forceinline__ Meeting(float* shared, const Shares& shares, int width)
        : shared(shared), shares(shares), width(width), plane(width * blockDim.y) {}

    // Where a thread stores what its lane knows of the first of its channels.
    __device__ __forceinline__ float* slot(int own) const { return shared + threadIdx.y * width + threadIdx.x * own; }

    // From the slots 0, 1, ..., each of `unit` lanes from the lane `first` on, into slot 0.
    __device__ __forceinline__ void merge_slots(int slots, int first, int unit) const {
        const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
        for (int step = 1; step < slots; step *= FAN_IN) {
            const int merged = (slots + step * FAN_IN - 1) / (step * FAN_IN);
            __syncthreads();
            for (int item = thread; item < width * merged; item += threads) {
                const int slot = item / width * step * FAN_IN, last = min(slot + step * FAN_IN, slots);
                float* const at = shared + slot * width + item % width;
                Partial::merge(at, plane, at, plane, step * width, shares, first + slot * unit, first + last * unit,
                               step * unit);
            }
        }
        __syncthreads();
    }

    // Over the block and then over its group; the result is in slot 0 of every block. `partial` holds
    // [2][group][block][quantity][channel of the slice]: while one half is written, a block that is behind may still read
    // the other.
    __device__ __forceinline__ void merge(float* partial, unsigned* arrivals, bool odd) const {
        const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
        const int lanes = blockDim.y, blocks = gridDim.y, size = QUANTITIES * width;
        merge_slots(lanes, blockIdx.y * lanes, 1);
        if (blocks == 1) return;
        float* const group = partial + (long long)((odd ? gridDim.x : 0) + blockIdx.x) * blocks * size;
        for (int item = thread; item < size; item += threads)
            group[blockIdx.y * size + item] = shared[item / width * plane + item % width];
        meet(arrivals + blockIdx.x * BARRIER_PITCH, blocks, blockIdx.y);
        const int merged = (blocks + FAN_IN - 1) / FAN_IN;
        for (int item = thread; item < width * merged; item += threads) {
            const int slot = item / width, first = slot * FAN_IN, last = min(first + FAN_IN, blocks);
            Partial::merge(shared + slot * width + item % width, plane, group + first * size + item % width, width,
                           size, shares, first * lanes, last * lanes, lanes);
        }
        merge_slots(merged, 0, FAN_IN * lanes);
    }
};
