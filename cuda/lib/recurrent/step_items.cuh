// A time step of a recurrent layer, as the threads of a block see it: pairs of an example and a unit, and the sums over
// what is normalised together.
//
// By unit: block (w, l, 1), thread (i, j) owns unit w blockIdx.x + i of the examples j, j + l, ...: the statistics of a
// unit's gates, its cell update and the statistics of its cell are all within the threads with its i. By example: block
// (w, r, 1), thread (i, j) owns example r blockIdx.x + j of the units i, i + w, ...: those of an example are within the
// threads with its j. Either way neighbouring threads read neighbouring units. w is a power of two; w l, and by example
// w itself, is a multiple of 32.
#pragma once

#include "lib/kernel.cuh"
#include "lib/reduce/warp.cuh"

constexpr int GATES = 4, PARTS = 2;  // gates: i, f, g, o; parts: of the input, of the hidden state
constexpr int HELD = 2;              // pairs of a thread that stay in registers, at most

// Numbers that one access of 16 bytes moves, or of double two: the gates of a unit, or neighbouring ones.
template <typename A>
struct alignas(16) Four {
    A of[4];
};

enum StepNorm { PLAIN = 0, BATCH = 1, LAYER = 2 };

// A thread's pairs.
template <int NORM>
struct Items {
    const long long rows, units;
    long long n, u;
    const int next_n, next_u;

    template <typename Arguments>
    __device__ __forceinline__ explicit Items(const Arguments& a)
        : rows(a.rows),
          units(a.units),
          n(NORM == LAYER ? (long long)blockIdx.x * blockDim.y + threadIdx.y : threadIdx.y),
          u(NORM == LAYER ? threadIdx.x : (long long)blockIdx.x * blockDim.x + threadIdx.x),
          next_n(NORM == LAYER ? 0 : blockDim.y),
          next_u(NORM == LAYER ? blockDim.x : 0) {}

    __device__ __forceinline__ bool inside() const { return n < rows && u < units; }
    __device__ __forceinline__ void advance() {
        n += next_n;
        u += next_u;
    }
    // Places of the unit's state and of its gate.
    __device__ __forceinline__ long long state() const { return n * units + u; }
    __device__ __forceinline__ long long gate(int number) const { return (n * GATES + number) * units + u; }
    // Place of the unit's gate in a vector of all gates.
    __device__ __forceinline__ long long column(int number) const { return number * units + u; }
    // Pitch of the recurrent weights that a block of a sequence keeps, of its units or of all, and the unit's place
    // among them. It is odd where a warp writes a column.
    __device__ __forceinline__ int pitch() const { return NORM == LAYER ? (int)units | 1 : blockDim.x; }
    __device__ __forceinline__ int place() const { return NORM == LAYER ? (int)u : threadIdx.x; }
    // Whether the thread speaks for all that are normalised together.
    __device__ __forceinline__ bool speaks() const { return (NORM == LAYER ? threadIdx.x : threadIdx.y) == 0; }
};

// Whether an example has a step, and whether it is the last.
template <typename Arguments>
__device__ __forceinline__ bool has_step(const Arguments& a, long long n) {
    return !a.lengths || a.lengths[n] > a.step;
}
template <typename Arguments>
__device__ __forceinline__ bool ends_with_step(const Arguments& a, long long n) {
    return a.lengths ? a.lengths[n] == a.step + 1 : a.step == a.end;
}

// The threads that share statistics, and their sums: of a warp by shuffles, of warps through shared memory, in a fixed
// order. Two buffers take turns, so that a sum needs one barrier.
template <typename A, int NORM, int MOST>
struct Team {
    A* shared;
    int turn = 0;

    __device__ __forceinline__ explicit Team(A* shared) : shared(shared) {}

    __device__ __forceinline__ static int low() { return NORM == LAYER ? 1 : min((int)blockDim.x, WARP); }
    __device__ __forceinline__ static int all_warps() { return (int)(blockDim.x * blockDim.y) / WARP; }
    __device__ __forceinline__ A* next_buffer() {
        A* const buffer = shared + (turn % 2 ? MOST * all_warps() * low() : 0);
        ++turn;
        return buffer;
    }

    // Replaces the sums by those of the team. All threads must call.
    template <int COUNT>
    __device__ __forceinline__ void sum(A (&sums)[COUNT]) {
        const int linear = threadIdx.y * blockDim.x + threadIdx.x, lane = linear % WARP, width = low();
        const int warps = all_warps(), plane = warps * width;
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2)
            if (offset >= width)
#pragma unroll
                for (int i = 0; i < COUNT; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
        A* const buffer = next_buffer();
        if (lane < width)
#pragma unroll
            for (int i = 0; i < COUNT; ++i) buffer[i * plane + linear / WARP * width + lane] = sums[i];
        __syncthreads();
        const int own = NORM == LAYER ? blockDim.x / WARP : warps;
        const A* const first = buffer + (NORM == LAYER ? threadIdx.y * own : lane % width);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            A total = A(0);
#pragma unroll 4
            for (int warp = 0; warp < own; ++warp) total += first[i * plane + warp * width];
            sums[i] = total;
        }
    }

    // The number of one thread of the team, whose `mine` is true. All threads must call.
    __device__ __forceinline__ A take(A number, bool mine) {
        A* const place = next_buffer() + (NORM == LAYER ? threadIdx.y * (blockDim.x / WARP) : threadIdx.x % low());
        if (mine) *place = number;
        __syncthreads();
        return *place;
    }
};
