// Moments of a channel: count, mean, and sum of squared differences from the mean (M2).
#pragma once

#include "lib/numbers/pair.cuh"

// Moments of some rows of one channel.
template <typename A>
struct Moments {
    A count;
    Pair<A> mean, m2;
};

// Moments of the first `count` values of a thread; 1 <= count <= VALUES.
template <int VALUES, typename A>
__device__ __forceinline__ Moments<A> moments_of(const A (&values)[VALUES], int count) {
    Pair<A> sum = {A(0), A(0)};
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (i < count) sum = add(sum, values[i]);
    const Pair<A> mean = divide(sum, A(count));
    A m2 = A(0);
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (i < count) m2 += subtract(values[i], mean) * subtract(values[i], mean);
    return {A(count), mean, {m2, A(0)}};
}

// Moments of the values whose bit is set in `valid`, possibly none.
template <int VALUES, typename A>
__device__ __forceinline__ Moments<A> moments_of_valid(const A (&values)[VALUES], unsigned valid) {
    Pair<A> sum = {A(0), A(0)};
    int count = 0;
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (valid >> i & 1u) {
            sum = add(sum, values[i]);
            ++count;
        }
    const Pair<A> mean = divide(sum, A(max(count, 1)));
    A m2 = A(0);
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (valid >> i & 1u) m2 += subtract(values[i], mean) * subtract(values[i], mean);
    return {A(count), mean, {m2, A(0)}};
}

// Merges two disjoint sets of rows, after Chan, Golub and LeVeque.
template <typename A>
__device__ __forceinline__ Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
    const A count = a.count + b.count;
    const A delta = (b.mean.high - a.mean.high) + (b.mean.low - a.mean.low);
    const Pair<A> mean = divide(add(multiply(a.mean, a.count), multiply(b.mean, b.count)), count);
    const Pair<A> m2 = add(add(a.m2, b.m2), delta * delta * (a.count * (b.count / count)));
    return {count, mean, m2};
}

// Number of rows of each worker.
struct RowCounts {
    long long rounds;
    int longer, workers;  // the first `longer` workers have one row more than `rounds`
    int values;           // values of a row

    __device__ __forceinline__ RowCounts(long long rows, int workers, int values = 1)
        : rounds(rows / workers), longer((int)(rows - rounds * workers)), workers(workers), values(values) {}

    // Number of values of the workers first ... last - 1.
    __device__ __forceinline__ long long count(int first, int last) const {
        return values * (rounds * (last - first) + (longer < first  ? 0
                                                    : longer < last ? longer - first
                                                                    : last - first));
    }
};

// Merges the moments of the workers first ... last - 1. A slot holds mean, mean_low and M2, `plane` apart, of `step`
// workers; slots are `pitch` apart.
template <typename A>
__device__ __forceinline__ Moments<A> merge_workers(const A* slots, long long plane, long long pitch,
                                                    const RowCounts& counts, int first, int last, int step) {
    Pair<A> sum = {A(0), A(0)};
    const A* slot = slots;
    for (int j = first; j < last; j += step, slot += pitch) {
        const Pair<A> mean = {slot[0], slot[plane]};
        sum = add(sum, multiply(mean, A(counts.count(j, min(j + step, last)))));
    }
    const A count = A(counts.count(first, last));
    Moments<A> all = {count, divide(sum, count), {A(0), A(0)}};
    slot = slots;
    for (int j = first; j < last; j += step, slot += pitch) {
        const A delta = (slot[0] - all.mean.high) + (slot[plane] - all.mean.low);
        all.m2 = add(all.m2, slot[2 * plane]);
        all.m2 = add(all.m2, delta * delta * A(counts.count(j, min(j + step, last))));
    }
    return all;
}

// Merges moments with their counts, of which some may be 0. A slot holds count, mean, mean_low and M2, `plane` apart;
// slots are `pitch` apart.
template <typename A>
__device__ __forceinline__ Moments<A> merge_counted(const A* slots, long long plane, long long pitch, int parts) {
    Moments<A> all = {A(0), {A(0), A(0)}, {A(0), A(0)}};
    Pair<A> sum = {A(0), A(0)};
    const A* slot = slots;
#pragma unroll 1
    for (int i = 0; i < parts; ++i, slot += pitch) {
        if (slot[0] == A(0)) continue;  // its mean is undefined
        const Pair<A> mean = {slot[plane], slot[2 * plane]};
        sum = add(sum, multiply(mean, slot[0]));
        all.count += slot[0];
    }
    if (all.count == A(0)) return all;
    all.mean = divide(sum, all.count);
    slot = slots;
#pragma unroll 1
    for (int i = 0; i < parts; ++i, slot += pitch) {
        if (slot[0] == A(0)) continue;
        const A delta = (slot[plane] - all.mean.high) + (slot[2 * plane] - all.mean.low);
        all.m2 = add(all.m2, slot[3 * plane]);
        all.m2 = add(all.m2, delta * delta * slot[0]);
    }
    return all;
}
