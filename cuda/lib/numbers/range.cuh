// Numbers of which sums stay in range, and a number amid others.
#pragma once

// Whether a number, possibly NaN, is below 2^-41 of the largest: sums of up to 2^31 such numbers, and their products
// with counts up to that, are finite.
__device__ __forceinline__ bool is_small(float value) { return fabs(value) < 1.5e26f; }
__device__ __forceinline__ bool is_small(double value) { return fabs(value) < 8.1e295; }

// A number that one outlier does not draw away.
template <typename A>
__device__ __forceinline__ A median_of_three(A a, A b, A c) {
    return max(min(a, b), min(max(a, b), c));
}
