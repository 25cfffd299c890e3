// The affine map of a normalised channel: z = scale (x - mean) + shift.
#pragma once

#include "lib/numbers/pair.cuh"

template <typename A>
struct Affine {
    Pair<A> mean;
    A scale, shift;

    __device__ __forceinline__ A operator()(A x) const { return of_centred(subtract(x, mean)); }
    // The map of x - mean. Forward and backward both use it: the activation sees the same bits.
    __device__ __forceinline__ A of_centred(A centred) const { return fma(scale, centred, shift); }
};

// Statistics of a channel; m2 is the sum of squared differences from the mean.
template <typename A>
struct Statistics {
    Pair<A> mean;
    A m2, rstd;
};

template <typename A>
struct Normalisation : Affine<A> {
    A rstd;
};
