// Rows of a matrix that several blocks share, each of them the same columns of every row.
//
// The grid is (groups, splits): the blocks with the same blockIdx.x, a group, share a row; groups take the rows in
// turn. With more than one split the launch is cooperative, so that they may wait for one another. A block is (threads,
// 1, 1). It takes its columns in spans of `held` units a thread, which shared memory holds; see vector_rows.cuh. Where
// there is more than one span the last is full and stays, and the others are read again.
#pragma once

#include "lib/numbers/pair.cuh"
#include "lib/numbers/vector.cuh"
#include "lib/reduce/vector_rows.cuh"
#include "lib/sync/grid_barrier.cuh"

constexpr int CHUNK = 4;  // units that a thread takes at a time

template <typename T>
struct BlockColumns {
    long long begin;
    int pitch, spans, rest, shape;  // pitch: columns of a full span; rest: those of the first one

    // `part`: columns of a block, a whole number of units.
    __device__ __forceinline__ BlockColumns(long long columns, long long part, int held, int shape)
        : begin(blockIdx.y * part), pitch(held * (int)blockDim.x * UNIT<T>), shape(shape) {
        const long long all = min(part, columns - begin);
        spans = (int)((all - 1) / pitch) + 1;
        rest = (int)(all - (long long)(spans - 1) * pitch);
    }

    __device__ __forceinline__ long long first(int span) const {
        return begin + (span ? rest + (long long)(span - 1) * pitch : 0);
    }
    __device__ __forceinline__ int count(int span) const { return span ? pitch : rest; }
    __device__ __forceinline__ RowUnits<T> units(int span) const { return {count(span), (int)blockDim.x, shape}; }
};

// Calls work(k, values of unit k) for the thread's units of a span; load(k) finds unit k. UNROLL is CHUNK, or 1 for
// long work.
template <int UNROLL, typename T, typename Load, typename Work>
__device__ __forceinline__ void for_each_unit(const RowUnits<T>& units, int held, const Load& load, const Work& work) {
#pragma unroll 1
    for (int first = 0; first < held; first += CHUNK) {
        Vector chunk[CHUNK];
#pragma unroll
        for (int j = 0; j < CHUNK; ++j)
            if (units.has_unit(first + j)) chunk[j] = load(first + j);
#pragma unroll UNROLL
        for (int j = 0; j < CHUNK; ++j) {
            if (units.has_unit(first + j)) {
                Unpacked<T> unpacked;
                unpack<T>(chunk[0], unpacked);
                work(first + j, unpacked);
            }
            rotate(chunk);  // registers cannot be indexed
        }
    }
}

// Numbers that every block of a group shows to the others, `count` of each, in turns. Turns alternate between two
// places: another block may still read those of the turn before.
template <typename A>
struct GroupExchange {
    A* exchange;        // [2][group][split][count]
    unsigned* counter;  // one for every group
    int count;

    // The blocks' numbers of a turn, [split][count].
    __device__ __forceinline__ A* shown(int turn) const {
        return exchange + (turn % 2 * (long long)gridDim.x + blockIdx.x) * gridDim.y * count;
    }
    // The block's place, for thread 0 to fill.
    __device__ __forceinline__ A* own(int turn) const { return shown(turn) + blockIdx.y * count; }

    // Waits until all blocks of the group have filled their places. All threads must call.
    __device__ __forceinline__ void wait() const {
        grid_barrier(counter + blockIdx.x * BARRIER_PITCH, gridDim.y, blockIdx.y);
    }
};

// Column sums of every group, in global memory. A column is always the same thread's, until groups are merged.
template <typename A>
struct GroupSums {
    A* partial;  // [group][dgamma, dbeta][high, low][column]
    long long columns;

    __device__ __forceinline__ A* at(int group, int quantity, long long column) const {
        return partial + (group * 2 + quantity) * 2 * columns + column;
    }
    __device__ __forceinline__ Pair<A> load(int group, int quantity, long long column) const {
        const A* const from = at(group, quantity, column);
        return {from[0], from[columns]};
    }
    // Adds a term to the sum of the block's group, or is the first.
    __device__ __forceinline__ void add_term(int quantity, long long column, A term, bool first) const {
        Pair<A> sum = {term, A(0)};
        if (!first) sum = add(load(blockIdx.x, quantity, column), term);
        A* const to = at(blockIdx.x, quantity, column);
        to[0] = sum.high;
        to[columns] = sum.low;
    }
    // Sum over every `step`-th group.
    __device__ __forceinline__ Pair<A> of_all_groups(int quantity, long long column, int first, int step) const {
        Pair<A> sum = load(first, quantity, column);
#pragma unroll 1
        for (int group = first + step; group < gridDim.x; group += step) sum = add(sum, load(group, quantity, column));
        return sum;
    }
};
