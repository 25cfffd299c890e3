// The 16-bit storage types: what lies in memory. Kernels load them into float, compute there, and round once to store.
//
// Float16 is IEEE binary16, BFloat16 the upper half of a float. Both conversions round to nearest, ties to even; too
// large becomes infinity, subnormals are kept, NaN stays NaN. On a GPU the bits of a NaN may differ from the host's. CuPy
// compiles with -ftz=true: arithmetic that follows flushes floats below 1.2e-38. That concerns the subnormals of BFloat16
// and none of Float16, all of whose numbers are normal floats.
#pragma once

#ifndef BNK_HALF_CONVERSIONS  // the tests' emulator defines it, with twins of these four functions
// The header of CUDA that wraps these instructions would be more text than all of our kernels.
__device__ __forceinline__ float bnk_half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned short bnk_float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ unsigned bnk_bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bnk_float_of(unsigned bits) { return __uint_as_float(bits); }
#endif

struct Float16 {
    unsigned short bits;

    __device__ __forceinline__ explicit Float16(float value) : bits(bnk_float_to_half(value)) {}
    __device__ __forceinline__ explicit operator float() const { return bnk_half_to_float(bits); }
};

struct BFloat16 {
    unsigned short bits;

    // Half of the last place that stays, less one if that place is even, carries into it exactly when rounding up is
    // due. It would carry a NaN into infinity or zero.
    __device__ __forceinline__ explicit BFloat16(float value) {
        const unsigned wide = bnk_bits_of(value);
        const unsigned rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
        const unsigned nan = ((wide >> 16) & 0x8000u) | 0x7fc0u;
        bits = (unsigned short)(value == value ? rounded : nan);
    }
    __device__ __forceinline__ explicit operator float() const { return bnk_float_of((unsigned)bits << 16); }
};

// Round once into memory.
template <typename T, typename A>
__device__ __forceinline__ void store(T& place, A value) {
    place = T(value);
}
