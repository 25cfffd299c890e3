// The affine map of a normalised channel: z = scale (x - mean) + shift.
//
// An element loses the high part of the mean, exactly where it is near; the low part goes into the shift, once. No
// element is nearer to the mean than the high part, the nearest of all numbers: so low rstd is at most 1, and takes no
// digits from z.
#pragma once

#include "lib/numbers/pair.cuh"

template <typename A>
struct Affine {
    Pair<A> mean;
    A scale, shift;

    // Once the others are known.
    __device__ __forceinline__ void fold_low() { shift = fma(-scale, mean.low, shift); }

    __device__ __forceinline__ A operator()(A x) const { return of_centred(x - mean.high); }
    // The map of x - mean.high. Forward and backward both use it: the activation sees the same bits.
    __device__ __forceinline__ A of_centred(A centred) const { return fma(scale, centred, shift); }
};

// The mean, or 0 where the variance is out of range: rstd is 0 there and xhat too, although x - mean may overflow.
template <typename A>
__device__ __forceinline__ Pair<A> centre_of(Pair<A> mean, A rstd) {
    return rstd == A(0) ? Pair<A>{A(0), A(0)} : mean;
}

// The map with these statistics, of one with gamma and beta.
template <typename A>
__device__ __forceinline__ Affine<A> with_statistics(Affine<A> map, Pair<A> mean, A rstd) {
    map.mean = centre_of(mean, rstd);
    map.scale *= rstd;
    map.fold_low();
    return map;
}

// Loads the maps of the thread's neighbouring channels from shared memory, [mean.high, scale, shift][channel].
template <int THREAD_CHANNELS, typename A>
__device__ __forceinline__ void load_maps(Affine<A> (&channels)[THREAD_CHANNELS], const A* maps, int width) {
#pragma unroll
    for (int i = 0; i < THREAD_CHANNELS; ++i) channels[i] = {{maps[i], A(0)}, maps[width + i], maps[2 * width + i]};
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
    A rest = A(0);  // xhat of mean.high

    // Once the others are known.
    __device__ __forceinline__ void fold_low() {
        Affine<A>::fold_low();
        rest = -this->mean.low * rstd;
    }
    __device__ __forceinline__ A xhat(A centred) const { return fma(centred, rstd, rest); }
};
