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

template <bool MATRIX>
struct IndexOf {
    using Type = long long;
};
template <>
struct IndexOf<true> {
    using Type = int;
};

// Iterator over the rows of a thread. MATRIX asserts inner = 1. Offsets are of the type Index: int where no element of
// a tensor is 2^31 or more from the first.
template <bool MATRIX, typename Index = long long>
struct Rows {
    Index outers, inner;         // of the tensor
    Index outer, index;          // of the row
    int outer_step, index_step;  // to the next row

    __device__ __forceinline__ Rows(Index outers, Index inner, int worker, int workers)
        : outers(outers), inner(inner), outer(worker), index(0), outer_step(workers), index_step(0) {
        if (MATRIX) return;
        const int width = (int)min(inner, (Index)0x7fffffff);  // more than there are workers
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
    __device__ __forceinline__ Index at(Index outer_stride, Index inner_stride) const {
        return MATRIX ? outer * outer_stride : outer * outer_stride + index * inner_stride;
    }

    // Offset of the row of channel c in an output.
    __device__ __forceinline__ Index at_output(Index channels, Index c) const {
        return MATRIX ? outer * channels + c : (outer * channels + c) * inner + index;
    }
};

// The rows of a chunk: the first `count`, or those of them that the mask does not exclude, which have a bit in `valid`.
struct ChunkRows {
    int count;
    unsigned valid;
    bool masked;

    __device__ __forceinline__ bool has(int i) const { return masked ? (valid >> i & 1u) != 0 : i < count; }
    __device__ __forceinline__ int valid_count() const { return masked ? __popc(valid) : count; }

    // Takes the next VALUES rows, or as many as are left.
    template <int VALUES, bool MATRIX, typename Index>
    __device__ __forceinline__ void take_valid(const char* mask, Index outer_stride, Index inner_stride,
                                               Rows<MATRIX, Index> rows) {
        valid = 0;
#pragma unroll
        for (int i = 0; i < VALUES; ++i)
            if (rows.inside()) {
                if (mask[rows.at(outer_stride, inner_stride)] != 0) valid |= 1u << i;
                rows.advance();
            }
    }
};
