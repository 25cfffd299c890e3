// Mean and variance of a row, or of some of its columns, from two plain sums; the merge of such parts; and what follows
// from them for the row's output. Where rows are not centred, as in RMS norm, the mean counts as 0 everywhere: moments
// are about 0 and one sum is enough.
//
// The first sum finds a number near the mean, from half distances to one of the row's numbers, each divided by their
// count before it is added: they cannot overflow, and equal numbers have exactly their mean. The second sums, of
// distances from that number and of their squares, have no digits to lose.
#pragma once

#include "lib/numbers/activation.cuh"
#include "lib/numbers/pair.cuh"
#include "lib/reduce/vector_rows.cuh"

// The moments of `count` numbers; m2: sum of their squared distances from the mean, not finite if that is out of range.
template <typename A>
struct RowMoments {
    A count;
    Pair<A> mean;
    A m2;
};

// The terms of unit k in the first sum: a quarter of the distance of the mean. half_share: 1 / (2 count).
template <typename T, typename A>
__device__ __forceinline__ A near_terms(const RowUnits<T>& units, int k, const Unpacked<T>& x, A half_first,
                                        A half_share) {
    A sum = A(0);
#pragma unroll
    for (int i = 0; i < UNIT<T>; ++i)
        if (units.has(k, i)) sum = fma(fma(A(0.5), x[i], -half_first), half_share, sum);
    return sum;
}

// Adds the distances of unit k from a number near the mean, and their squares.
template <typename T, typename A>
__device__ __forceinline__ void add_distances(A (&sums)[2], const RowUnits<T>& units, int k, const Unpacked<T>& x,
                                              A centre) {
    A sum = A(0), squares = A(0);
#pragma unroll
    for (int i = 0; i < UNIT<T>; ++i)
        if (units.has(k, i)) {
            const A distance = x[i] - centre;
            sum += distance;
            squares = fma(distance, distance, squares);
        }
    sums[0] += sum;
    sums[1] += squares;
}

// Adds the squares of a unit. Elements beyond the end of the row are 0.
template <typename T, typename A>
__device__ __forceinline__ void add_squares(A& sum, const Unpacked<T>& x) {
    A squares = A(0);
#pragma unroll
    for (int i = 0; i < UNIT<T>; ++i) squares = fma(x[i], x[i], squares);
    sum += squares;
}

// The moments from these sums. share: 1 / count.
template <typename A>
__device__ __forceinline__ RowMoments<A> moments_about(A centre, const A (&sums)[2], A count, A share) {
    A low = sums[0] * share, m2 = fma(-sums[0], low, sums[1]);
    if (sums[1] * A(0) != A(0)) {  // not finite: then the sum of distances may be anything
        low = A(0);
        m2 = sums[1];
    }
    return {count, two_sum(centre, low), m2};
}

// The moments of all numbers of two parts, either of which may be empty. Distances of means are halved, so that they
// are finite; where the means are equal the result has exactly that mean.
template <typename A>
__device__ __forceinline__ RowMoments<A> merge(const RowMoments<A>& a, const RowMoments<A>& b) {
    if (b.count == A(0)) return a;
    if (a.count == A(0)) return b;
    const A count = a.count + b.count, share = b.count / count;
    const A half = fma(A(0.5), b.mean.high, -A(0.5) * a.mean.high) + A(0.5) * (b.mean.low - a.mean.low);
    const A shift = share * half, high = fma(A(2), shift, a.mean.high);
    const A low = fma(A(2), fma(A(0.5), a.mean.high, -A(0.5) * high) + shift, a.mean.low);
    return {count, two_sum(high, low), fma(A(4) * share * a.count * half, half, a.m2 + b.m2)};
}

// The moments of the parts of the first `lanes` lanes, merged in a tree of their order, by lane 0; for all lanes.
template <typename A>
__device__ __forceinline__ RowMoments<A> merge_warp(RowMoments<A> own, int lanes) {
    const auto of_lane = [&](int lane) {
        const auto take = [&](A number) { return __shfl_sync(0xffffffffu, number, lane); };
        return RowMoments<A>{take(own.count), {take(own.mean.high), take(own.mean.low)}, take(own.m2)};
    };
    const int lane = threadIdx.x % WARP;
#pragma unroll 1
    for (int offset = 1; offset < min(lanes, WARP); offset *= 2) own = merge(own, of_lane((lane + offset) % WARP));
    return of_lane(0);
}

// Writes the statistics of row n: mean, mean_low and rstd, or rstd alone.
template <typename A, typename Arguments>
__device__ __forceinline__ void store_statistics(const Arguments& a, long long n, Pair<A> mean, A rstd) {
    if (a.centred) {
        a.statistics[n] = mean.high;
        a.statistics[a.rows + n] = mean.low;
    }
    a.statistics[a.centred ? 2 * a.rows + n : n] = rstd;
}

// Writes unit k of y. With rstd = 0 the numbers are finite, but their distance from the mean may not be: then the mean
// given is 0.
template <typename T, typename A, typename Units, typename Arguments>
__device__ __forceinline__ void write_normalised(const Arguments& a, const Units& units, T* y,
                                                 const ParameterPlace& place, int k, const Unpacked<T>& x, Pair<A> mean,
                                                 A rstd) {
    Unpacked<T> gamma, z;
    units.load_parameters(gamma, a.gamma, a.scaled, place, k, A(1));
    units.load_parameters(z, a.beta, a.shifted, place, k, A(0));
    const A rest = -mean.low * rstd;
#pragma unroll
    for (int i = 0; i < UNIT<T>; ++i) z[i] = fma(gamma[i], fma(x[i] - mean.high, rstd, rest), z[i]);
    activate_all(z, a.activation, a.alpha);
    units.store(y, k, z);
}
