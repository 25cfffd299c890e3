// Moments of the rows of each worker of a block, and their merge.
//
// A worker subtracts one of its own values from the others and takes plain sums of what is left: a shift within the
// spread of the values loses nothing, and of equal numbers nothing is left. The parts of all workers are merged about
// one of their shifts, so the mean is exact to far below the spread of the values, whatever its size: the sum of the
// shift and of the mean distance from it, a pair. The order is fixed, so the result is deterministic.
#pragma once

#include "lib/numbers/pair.cuh"
#include "lib/numbers/range.cuh"
#include "lib/reduce/rows.cuh"

// Moments of some rows of a channel: the mean is high + low, of which low need not be small; m2 is the sum of squared
// distances from it.
template <typename A>
struct alignas(16) Part {
    A high, low, m2, count;
};

// Parts whose loads are in flight together in a thread with so many values, which take registers too.
template <int VALUES>
constexpr int TOGETHER = VALUES > 4 ? 8 : 16;

// 1 / count, for a count of up to MOST values.
template <int MOST, typename A>
__device__ __forceinline__ A reciprocal_of(int count) {
    if (MOST > 4) return A(1) / A(count);
    return count > 3 ? A(0.25) : count > 2 ? A(1) / A(3) : count > 1 ? A(0.5) : A(1);
}

// M2 where a mean is not a small distance from a value, so that the variance is out of range; or where some value is no
// number and with it the mean.
template <typename A>
__device__ __forceinline__ A m2_out_of_range(A mean) {
    return A(1) / fabs(mean - mean);
}

// Moments of the valid rows of a chunk. Without a mask there is at least one.
template <int VALUES, typename A>
__device__ __forceinline__ Part<A> part_of(const A (&values)[VALUES], const ChunkRows& rows) {
    const int count = rows.valid_count();
    if (rows.masked && count == 0) return {A(0), A(0), A(0), A(0)};
    A shift = values[0];
    if (rows.masked) {
#pragma unroll
        for (int i = VALUES - 1; i >= 0; --i) shift = rows.has(i) ? values[i] : shift;
    }
    const A weight = reciprocal_of<VALUES, A>(count);
    A distances[VALUES], sum = A(0), m2 = A(0);
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        distances[i] = rows.has(i) ? values[i] - shift : A(0);
        sum += distances[i];
    }
    const A mean = sum * weight;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const A distance = rows.has(i) ? distances[i] - mean : A(0);
        m2 = fma(distance, distance, m2);
    }
    if (is_small(mean)) return {shift, mean, m2, A(count)};
    A half = A(0.5) * shift;  // halves, whose distances are in range
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (rows.has(i)) half = fma(A(0.5) * values[i] - A(0.5) * shift, weight, half);
    return {A(2) * half, A(0), m2_out_of_range(half), A(count)};
}

// Moments of rows that come in parts, of which some may be empty. The sums are long ones, and therefore pairs.
template <typename A>
struct PartSum {
    Pair<A> sum, m2;  // sum of distances from the shift
    A shift, mean, count;

    __device__ __forceinline__ explicit PartSum(const Part<A>& first)
        : sum({first.low * first.count, A(0)}),
          m2({first.m2, A(0)}),
          shift(first.high),
          mean(first.low),
          count(first.count) {}

    __device__ __forceinline__ void add_part(const Part<A>& part) {
        if (part.count == A(0)) return;
        if (count == A(0)) {
            *this = PartSum(part);
            return;
        }
        const A of_part = (part.high - shift) + part.low, rest = of_part - mean;
        const A all = count + part.count, share = part.count / all;
        if (is_small(of_part)) {
            sum = add(sum, of_part * part.count);
            m2 = add(add(m2, part.m2), rest * rest * (count * share));
            mean = value(sum) / all;
        } else {
            const A half = A(0.5) * (shift + mean);
            shift = A(2) * fma(A(0.5) * (part.high + part.low) - half, share, half);
            m2 = {m2_out_of_range(shift), A(0)};
            sum = {A(0), A(0)};
            mean = A(0);
        }
        count = all;
    }

    __device__ __forceinline__ Part<A> part() const {
        if (count == A(0)) return {A(0), A(0), A(0), A(0)};
        const Pair<A> all = add(divide(sum, count), shift);
        return {all.high, all.low, value(m2), count};
    }
};

// Number of rows of some parts, which are `pitch` places apart.
template <typename A>
__device__ __forceinline__ A count_of(const Part<A>* parts, int pitch, int number) {
    A count = A(0);
    for (int i = 0; i < number; ++i) count += parts[i * pitch].count;
    return count;
}

// Calls work(part, i) for the parts in order, i = 0, 1, 2, 3, 0, ... It takes them by value: one load reads a part.
template <int UNROLLED, typename A, typename Work>
__device__ __forceinline__ void for_each_part(const Part<A>* parts, int pitch, int number, const Work& work) {
#pragma unroll 1
    for (int first = 0; first < number; first += UNROLLED)
#pragma unroll
        for (int i = 0; i < UNROLLED; ++i)
            if (first + i < number) work(parts[(first + i) * pitch], i % 4);
}

// A number amid the means of parts. The shift of an empty part is none of them, and may be far away.
template <typename A>
__device__ __forceinline__ A shift_of(const Part<A>* parts, int pitch, int number, bool some_empty) {
    if (!some_empty)
        return number < 3 ? parts[0].high : median_of_three(parts[0].high, parts[pitch].high, parts[2 * pitch].high);
    A first = A(0), second = A(0), third = A(0);
    int found = 0;
#pragma unroll 1
    for (int i = 0; i < number && found < 3; ++i) {
        if (parts[i * pitch].count == A(0)) continue;
        third = second;
        second = first;
        first = parts[i * pitch].high;
        ++found;
    }
    return found < 3 ? (found == 2 ? second : first) : median_of_three(first, second, third);
}

// Merges parts of `count` rows, of which `inverse` is the reciprocal. Only with `some_empty` may parts be empty.
template <int UNROLLED, typename A>
__device__ __forceinline__ Part<A> merge_parts(const Part<A>* parts, int pitch, int number, A count, A inverse,
                                               bool some_empty) {
    const A shift = shift_of(parts, pitch, number, some_empty);
    A sums[4] = {}, squares[4] = {};  // in flight together
    for_each_part<UNROLLED>(parts, pitch, number, [&](Part<A> part, int i) {
        sums[i] = fma(part.count, (part.high - shift) + part.low, sums[i]);
    });
    const A sum = (sums[0] + sums[1]) + (sums[2] + sums[3]), distance = sum * inverse;
    if (!is_small(distance)) {
        A half = A(0.5) * shift;  // halves, whose distances are in range
#pragma unroll 1
        for (int i = 0; i < number; ++i) {
            const Part<A> part = parts[i * pitch];
            half = fma(A(0.5) * (part.high + part.low) - A(0.5) * shift, part.count * inverse, half);
        }
        return {A(2) * half, A(0), m2_out_of_range(half), count};
    }
    for_each_part<UNROLLED>(parts, pitch, number, [&](Part<A> part, int i) {
        const A rest = ((part.high - shift) + part.low) - distance;
        squares[i] = fma(rest * part.count, rest, squares[i] + part.m2);
    });
    Pair<A> mean = two_sum(shift, distance);
    mean = quick_two_sum(mean.high, fma(fma(-distance, count, sum), inverse, mean.low));
    return {mean.high, mean.low, (squares[0] + squares[1]) + (squares[2] + squares[3]), count};
}

// Place of a worker's part in shared memory: [channel of the slice][worker], and one more, so that neighbouring
// channels are in other banks.
__device__ __forceinline__ int place_of(int worker, int workers) { return threadIdx.x * (workers + 1) + worker; }

// Merges the workers of a channel, whose parts are in shared memory. All threads must call; those that are not active
// have no channel. `count` and `inverse` are those of all rows; if `masked`, the number of valid ones is counted.
template <int UNROLLED, typename A>
__device__ __forceinline__ Part<A> merge_workers(Part<A>* parts, int workers, bool active, A count, A inverse,
                                                 bool masked) {
    __syncthreads();
    Part<A>* const own = parts + place_of(threadIdx.y, workers);
    Part<A>* const channel = parts + place_of(0, workers);
    int pitch = 1;
    if (workers > SERIAL_WORKERS) {
        pitch = MERGE_FAN_IN;
        if (active && threadIdx.y % MERGE_FAN_IN == 0) {
            const A rows = count_of(own, 1, MERGE_FAN_IN);
            *own = merge_parts<UNROLLED>(own, 1, MERGE_FAN_IN, rows, A(1) / max(rows, A(1)), masked);
        }
        __syncthreads();
    }
    if (!active) return {};
    if (masked) {
        count = count_of(channel, pitch, workers / pitch);
        inverse = A(1) / max(count, A(1));
    }
    return merge_parts<UNROLLED>(channel, pitch, workers / pitch, count, inverse, masked);
}
