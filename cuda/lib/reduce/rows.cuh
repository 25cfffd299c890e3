// How batch norm sees a tensor: (outer, C, inner), the axes before and behind the channels' each taken together.
//
// A row is one position of a channel, and there are N = outer inner of them: row = outer index * inner + inner index. A
// matrix (N, C), and whatever lies channels-last, has inner = 1. Outputs lie in C order, inputs may have any strides.
// A thread owns the rows lane, lane + lanes, lane + 2 lanes, ... of one channel.
#pragma once

// Lanes above which partial results are merged in two levels: up to here every thread merges all of them itself, which is
// cheaper than a second barrier.
constexpr int SERIAL_WORKERS = 64;
constexpr int MERGE_FAN_IN = 32;  // lanes whose partial results one thread merges at the first level

// The rows of one thread, one after the other. MATRIX promises inner = 1.
template <bool MATRIX>
struct Rows {
    long long outers, inner;     // of the tensor
    long long outer, index;      // of the row
    int outer_step, index_step;  // to the next one

    __device__ __forceinline__ Rows(long long outers, long long inner, int worker, int workers)
        : outers(outers), inner(inner), outer(worker), index(0), outer_step(workers), index_step(0) {
        if (MATRIX) return;
        const int width = (int)min(inner, (long long)0x7fffffff);  // more than there are lanes
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

    // Where the row is in an array with these strides, in elements from the channel's first.
    __device__ __forceinline__ long long at(long long outer_stride, long long inner_stride) const {
        return MATRIX ? outer * outer_stride : outer * outer_stride + index * inner_stride;
    }

    // Where the row of channel c is in an output.
    __device__ __forceinline__ long long at_output(long long channels, long long c) const {
        return MATRIX ? outer * channels + c : (outer * channels + c) * inner + index;
    }
};
