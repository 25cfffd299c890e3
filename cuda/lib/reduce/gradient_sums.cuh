// Sums of g and of g xhat over the rows of a channel: of each worker of a block, and their merge.
//
// The order is fixed, so the result is deterministic. Sums that are out of range although their terms are not are
// formed anew in a unit of 2^40: their means are within range.
#pragma once

#include "lib/numbers/pair.cuh"
#include "lib/numbers/range.cuh"
#include "lib/reduce/rows.cuh"

template <typename A>
struct alignas(2 * sizeof(A)) GradientSums {
    A g, g_xhat;

    __device__ __forceinline__ void add(A gradient, A xhat) {
        g += gradient;
        g_xhat = fma(gradient, xhat, g_xhat);
    }
    __device__ __forceinline__ void add(const GradientSums& other, A unit = A(1)) {
        g = fma(other.g, unit, g);
        g_xhat = fma(other.g_xhat, unit, g_xhat);
    }
    __device__ __forceinline__ bool small() const { return is_small(g) & is_small(g_xhat); }
};

template <typename A>
constexpr int UNROLLED_SUMS = 64 / sizeof(A);         // whose loads are in flight together
constexpr float SUM_UNIT = 1.0f / 1048576 / 1048576;  // 2^-40, exactly

// Sums, divided by 2^40 if they are not small otherwise; and, with a mask, the number of their rows.
template <typename A>
struct ScaledSums {
    GradientSums<A> sums;
    bool scaled;
    A count;

    // Factor of the sums.
    __device__ __forceinline__ A unit() const { return scaled ? A(1) / A(SUM_UNIT) : A(1); }
};

// The sums of a channel's workers in shared memory, [channel of the slice][worker], and one place more, so that
// neighbouring channels are in other banks. A worker whose sums are not small has the scaled ones beside them; with a
// mask, the numbers of rows lie behind these.
template <typename A>
struct SharedSums {
    GradientSums<A>*sums, *scaled;
    A* counts;
    int workers;
    bool masked;

    __device__ __forceinline__ SharedSums(GradientSums<A>* shared, int width, int workers, bool masked)
        : sums(shared + threadIdx.x * (workers + 1)),
          scaled(sums + width * (workers + 1)),
          counts(&shared[2 * width * (workers + 1)].g + threadIdx.x * (workers + 1)),
          workers(workers),
          masked(masked) {}

    __device__ __forceinline__ void set(const ScaledSums<A>& own) const {
        sums[threadIdx.y] = own.sums;
        if (masked) counts[threadIdx.y] = own.count;
        if (!own.scaled) return;
        sums[threadIdx.y].g = A(1) / A(0);
        scaled[threadIdx.y] = own.sums;
    }

    // Merges `number` workers, `pitch` places apart.
    __device__ __forceinline__ ScaledSums<A> merge(int worker, int pitch, int number) const {
        A count = A(0);
        if (masked)
            for (int i = 0; i < number; ++i) count += counts[worker + i * pitch];
        GradientSums<A> totals[4] = {};  // in flight together
#pragma unroll 1
        for (int first = 0; first < number; first += UNROLLED_SUMS<A>)
#pragma unroll
            for (int i = 0; i < UNROLLED_SUMS<A>; ++i)
                if (first + i < number) totals[i % 4].add(sums[worker + (first + i) * pitch]);
        totals[0].add(totals[1]);
        totals[2].add(totals[3]);
        totals[0].add(totals[2]);
        if (totals[0].small()) return {totals[0], false, count};
        GradientSums<A> total = {};
#pragma unroll 1
        for (int i = 0; i < number; ++i) {
            const int place = worker + i * pitch;
            const bool small = sums[place].small();
            total.add(small ? sums[place] : scaled[place], small ? A(SUM_UNIT) : A(1));
        }
        return {total, true, count};
    }

    // Merges the workers of a channel. All threads must call; those that are not active have no channel.
    __device__ __forceinline__ ScaledSums<A> merge_workers(const ScaledSums<A>& own, bool active) const {
        if (active) set(own);
        __syncthreads();
        int pitch = 1;
        if (workers > SERIAL_WORKERS) {
            pitch = MERGE_FAN_IN;
            if (active && threadIdx.y % MERGE_FAN_IN == 0) set(merge(threadIdx.y, 1, MERGE_FAN_IN));
            __syncthreads();
        }
        return active ? merge(0, pitch, workers / pitch) : ScaledSums<A>{};
    }
};
