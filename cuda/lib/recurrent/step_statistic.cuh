// The statistic of numbers that a recurrent layer normalises together in a time step.
#pragma once

#include "lib/kernel.cuh"
#include "lib/numbers/rsqrt.cuh"

// Shift, mean of what is left, and 1 / standard deviation, of numbers that are normalised together.
template <typename A>
struct Statistic {
    A shift, rest, rstd;

    __device__ __forceinline__ A centred(A x) const { return (x - shift) - rest; }
    __device__ __forceinline__ A operator()(A x) const { return centred(x) * rstd; }

    // Takes population statistics.
    __device__ __forceinline__ void take(const A* mean, const A* var, long long at, A eps) {
        shift = mean[at];
        rest = A(0);
        rstd = reciprocal_sqrt(var[at] + eps);
    }

    // Moves population statistics towards these, of the biased variance `var`.
    template <typename Arguments>
    __device__ __forceinline__ void move(const Arguments& a, A& mean, A& of_var, A var) const {
        const A keep = A(1) - a.momentum, unbiased = var * (a.count / (a.count - A(1)));
        const A moved = fma(a.momentum, unbiased, keep * of_var);
        mean = fma(a.momentum, shift + rest, keep * mean);
        of_var = moved;
    }
};
