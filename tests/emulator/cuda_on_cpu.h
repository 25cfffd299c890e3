// CUDA C++ as a C++17 compiler sees it: included before every kernel source, whose text stays what NVRTC compiles.
//
// Only what the kernels use has a meaning here. A direct __global__ or __shared__ does not compile: kernels and shared
// memory are declared through the two macros, which cuda/common.cuh defines for CUDA and this file for the CPU.
#pragma once
#include <math.h>

#include <cstring>

#include "engine/intrinsics.h"

#define __device__
#define __forceinline__ inline __attribute__((always_inline))

// The kernel becomes a function of the address of its argument's bytes, found by name in the shared library. The two
// others let the caller refuse a record of the wrong size and a block beyond the launch bounds.
#define BNK_KERNEL(name, Arguments, threads, body)                                           \
    extern "C" void name(const void* bytes) { body(*static_cast<const Arguments*>(bytes)); } \
    extern "C" unsigned long long name##_argument_bytes() { return sizeof(Arguments); }      \
    extern "C" unsigned long long name##_most_threads() { return threads; }

#define BNK_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(bnk_shared_memory())

#define threadIdx (bnk_thread_index())
#define blockIdx (bnk_block_index())
#define blockDim (bnk_block_dimensions())
#define gridDim (bnk_grid_dimensions())

__forceinline__ void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    bnk_barrier(file, line);
}

__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                                int line = __builtin_LINE()) {
    bnk_warp_barrier(mask, file, line);
}

__forceinline__ void __threadfence() { bnk_fence(); }

__forceinline__ unsigned atomicAdd(unsigned* address, unsigned value) { return bnk_atomic_add(address, value); }

namespace bnk {
template <typename T>
__forceinline__ T shuffle(unsigned mask, T value, unsigned source_lane, const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 32 or 64 bits");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = bnk_shuffle(mask, bits, source_lane, file, line);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
}  // namespace bnk

// `width` splits the warp into segments; a source beyond the end of the caller's segment means the caller itself.
template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, unsigned source, unsigned width = 32,
                              const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const unsigned first = bnk_lane() & ~(width - 1);
    return bnk::shuffle(mask, value, first | (source & (width - 1)), file, line);
}

template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, unsigned lanes, unsigned width = 32,
                                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const unsigned lane = bnk_lane(), source = lane ^ lanes, last = lane | (width - 1);
    return bnk::shuffle(mask, value, source <= last ? source : lane, file, line);
}

template <typename T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, unsigned width = 32,
                                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const unsigned lane = bnk_lane(), source = lane + delta, last = lane | (width - 1);
    return bnk::shuffle(mask, value, source <= last ? source : lane, file, line);
}
