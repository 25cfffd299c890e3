// The view of a tensor in batch norm: (outer, C, inner), where outer and inner are the axes before and behind the
// channel axis, flattened.
//
// A row is one position of a channel: row = outer index * inner + inner index, of N = outer * inner rows. A matrix (N,
// C) and channels-last tensors have inner = 1. Outputs are in C order, inputs may have any strides. The threads of a
// block with the same threadIdx.x share a channel. Worker y, the threads with threadIdx.y = y, takes the rows y, y +
// workers, y + 2 workers, ...
#pragma once

// Largest number of workers whose partial results are merged in one level: every thread merges all of them, which is
// cheaper than a second barrier.
constexpr int SERIAL_WORKERS = 64;
constexpr int MERGE_FAN_IN = 32;  // partial results that one thread merges at the first of two levels

// Iterator over the rows of a thread. MATRIX asserts inner = 1.
template <bool MATRIX>
struct Rows {
    long long outers, inner;     // of the tensor
    long long outer, index;      // of the row
    int outer_step, index_step;  // to the next row

    __device__ __forceinline__ Rows(long long outers, long long inner, int worker, int workers)
        : outers(outers), inner(inner), outer(worker), index(0), outer_step(workers), index_step(0) {
        if (MATRIX) return;
        const int width = (int)min(inner, (long long)0x7fffffff);  // more than there are workers
        outer = worker / width;
        index = worker % width;
        outer_step = workers / width;
        index_step = workers % width;
    }

    __device__ __forceinline__ bool inside() const { return outer < outers; }

    __device__ __forceinline__ void advance() {
        outer += outer_step;
        if (MATRIX) return;
        index += index_step;
        if (index >= inner) {
            index -= inner;
            ++outer;
        }
    }

    // Offset of the row in an array with these strides, in elements from the channel's first.
    __device__ __forceinline__ long long at(long long outer_stride, long long inner_stride) const {
        return MATRIX ? outer * outer_stride : outer * outer_stride + index * inner_stride;
    }

    // Offset of the row of channel c in an output.
    __device__ __forceinline__ long long at_output(long long channels, long long c) const {
        return MATRIX ? outer * channels + c : (outer * channels + c) * inner + index;
    }
};
