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

// Loads the maps of the thread's neighbouring channels from shared memory, [mean, mean_low, scale, shift][channel].
template <int THREAD_CHANNELS, typename A>
__device__ __forceinline__ void load_maps(Affine<A> (&channels)[THREAD_CHANNELS], const A* maps, int width) {
    maps += threadIdx.x * THREAD_CHANNELS;
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i)
        channels[i] = {{maps[i], maps[width + i]}, maps[2 * width + i], maps[3 * width + i]};
}

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

// The mean, or 0 where the variance is out of range: rstd is 0 there and xhat too, although x - mean may overflow.
template <typename A>
__device__ __forceinline__ Pair<A> centre_of(Pair<A> mean, A rstd) {
    return rstd == A(0) ? Pair<A>{A(0), A(0)} : mean;
}
