// The 16-bit storage types. Kernels load them into float, compute in float, and round once to store.
//
// Float16 is IEEE binary16, BFloat16 the upper half of a float. Both conversions round to nearest, ties to even;
// overflow gives infinity, subnormals are kept, NaN stays NaN. The bits of a NaN may differ between GPU and CPU. CuPy
// compiles with -ftz=true: later arithmetic flushes floats below 1.2e-38 to zero. This affects subnormals of BFloat16,
// but not Float16, all of whose numbers are normal floats.
#pragma once

#ifndef BNK_HALF_CONVERSIONS  // the emulator defines it and these functions
// CUDA's header that wraps these instructions is longer than all kernels together.
__device__ __forceinline__ unsigned bnk_bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bnk_float_of(unsigned bits) { return __uint_as_float(bits); }

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

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned short bnk_float_to_bfloat(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Two at a time, the first in the lower half of the word.
__device__ __forceinline__ unsigned bnk_floats_to_halves(float first, float second) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

__device__ __forceinline__ unsigned bnk_floats_to_bfloats(float first, float second) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
#else
#define BNK_SOFTWARE_CONVERSIONS
#endif
#endif

#ifdef BNK_SOFTWARE_CONVERSIONS  // of devices before sm_80, and of the emulator
// Adding half a unit in the last place kept, less one if that place is even, carries exactly when rounding up is due.
// NaN is handled apart: the carry would turn it into infinity or zero.
__device__ __forceinline__ unsigned short bnk_float_to_bfloat(float value) {
    const unsigned wide = bnk_bits_of(value);
    return (unsigned short)(value == value ? (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16 : 0x7fffu);
}

__device__ __forceinline__ unsigned bnk_floats_to_halves(float first, float second) {
    return bnk_float_to_half(first) | (unsigned)bnk_float_to_half(second) << 16;
}

__device__ __forceinline__ unsigned bnk_floats_to_bfloats(float first, float second) {
    return bnk_float_to_bfloat(first) | (unsigned)bnk_float_to_bfloat(second) << 16;
}
#endif

struct Float16 {
    unsigned short bits;

    Float16() = default;
    __device__ __forceinline__ explicit Float16(float value) : bits(bnk_float_to_half(value)) {}
    __device__ __forceinline__ explicit operator float() const { return bnk_half_to_float(bits); }
};

struct BFloat16 {
    unsigned short bits;

    BFloat16() = default;
    __device__ __forceinline__ explicit BFloat16(float value) : bits(bnk_float_to_bfloat(value)) {}
    __device__ __forceinline__ explicit operator float() const { return bnk_float_of((unsigned)bits << 16); }
};

// Rounds once to the storage type.
template <typename T, typename A>
__device__ __forceinline__ void store(T& place, A value) {
    place = T(value);
}
