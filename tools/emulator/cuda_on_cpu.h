// CUDA C++ as a C++17 compiler sees it: included before every kernel source, whose text stays what NVRTC compiles.
//
// Only what the kernels use has a meaning here. A direct __global__ or __shared__ does not compile: kernels and shared
// memory are declared through macros, which cuda/lib/kernel.cuh defines for CUDA and this file for the CPU.
#pragma once
#include <math.h>

#include <cstring>

#include "engine/intrinsics.h"

#define __device__
#define __forceinline__ inline __attribute__((always_inline))

// The kernel becomes a function of the address of its argument's bytes, found by name in the shared library. The
// others let the caller refuse a record of the wrong size, a block beyond the launch bounds, more blocks that wait for one
// another than the registers of an SM are promised for, and part of a cluster.
#define BNK_TYPE(...) __VA_ARGS__
#define BNK_KERNEL(name, Arguments, max_threads, min_blocks, body) \
    BNK_KERNEL_CLUSTER(name, Arguments, max_threads, min_blocks, 1, body)
#define BNK_KERNEL_CLUSTER(name, Arguments, max_threads, min_blocks, cluster, body)                   \
    extern "C" void name(const void* bytes) { body(*static_cast<const BNK_TYPE Arguments*>(bytes)); } \
    extern "C" unsigned long long name##_argument_bytes() { return sizeof(BNK_TYPE Arguments); }      \
    extern "C" unsigned long long name##_max_threads() { return max_threads; }                        \
    extern "C" unsigned long long name##_min_blocks() { return min_blocks ? min_blocks : 1; }         \
    extern "C" unsigned long long name##_cluster() { return cluster; }

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

__forceinline__ int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename T>
__forceinline__ T min(T a, T b) {
    return b < a ? b : a;
}

template <typename T>
__forceinline__ T max(T a, T b) {
    return a < b ? b : a;
}

__forceinline__ unsigned atomicAdd(unsigned* address, unsigned value) { return bnk_atomic_add(address, value); }

// ---- cuda/lib/numbers/vector.cuh: one access, where a GPU has an instruction for it ---------------------------------------------
#define BNK_VECTOR_ACCESS

__forceinline__ void bnk_move_vector(void* to, const void* from) {
    typedef unsigned Words __attribute__((vector_size(16), may_alias));
    *static_cast<Words*>(to) = *static_cast<const Words*>(from);
}

__forceinline__ double bnk_double_of(unsigned high, unsigned low) {
    const unsigned long long bits = (unsigned long long)high << 32 | low;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

__forceinline__ unsigned bnk_high_bits_of(double value) {
    unsigned long long bits;
    memcpy(&bits, &value, sizeof bits);
    return (unsigned)(bits >> 32);
}

__forceinline__ unsigned bnk_low_bits_of(double value) {
    unsigned long long bits;
    memcpy(&bits, &value, sizeof bits);
    return (unsigned)bits;
}

// ---- cuda/lib/sync/grid_barrier.cuh: on a GPU a loop that reads the counter until it has turned, and the barrier of a cluster ----------
#define BNK_WAIT

enum MemoryOrder { RELAXED, RELEASE, ACQUIRE };

template <MemoryOrder ORDER>
__forceinline__ unsigned bnk_add(unsigned* counter, unsigned value) {
    return ORDER == RELEASE ? bnk_atomic_add_release(counter, value) : bnk_atomic_add(counter, value);
}

template <MemoryOrder ORDER>
__forceinline__ void bnk_wait(const unsigned* counter, unsigned ticket, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
    bnk_wait_for_counter(counter, ticket, ORDER == ACQUIRE, file, line);
}

#define BNK_CLUSTERS 1

__forceinline__ void bnk_arrive_in_cluster() { bnk_cluster_arrive(); }
__forceinline__ void bnk_wait_for_cluster(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    bnk_cluster_wait(file, line);
}

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

// ---- cuda/lib/numbers/half.cuh: what inline PTX does on a GPU -------------------------------------------------------------------
#define BNK_HALF_CONVERSIONS
#define BNK_SOFTWARE_CONVERSIONS

__forceinline__ unsigned bnk_bits_of(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

__forceinline__ float bnk_float_of(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

__forceinline__ float bnk_half_to_float(unsigned short bits) {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, digits = bits & 0x3ffu;
    if (exponent == 31) return bnk_float_of(sign | (digits ? 0x7fffffffu : 0x7f800000u));
    if (exponent != 0) return bnk_float_of(sign | ((exponent + 112) << 23) | (digits << 13));
    const float magnitude = (float)digits * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

__forceinline__ unsigned short bnk_float_to_half(float value) {
    const unsigned bits = bnk_bits_of(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return 0x7fffu;          // NaN
    if (size >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on: infinity
    if (size < 0x38800000u)                          // subnormal: the sum's last place is the half's
        return sign | (bnk_bits_of(bnk_float_of(size) + 0.5f) - bnk_bits_of(0.5f));
    return sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13);
}

// ---- cuda/lib/numbers/rsqrt.cuh: an approximation, as far from the truth as PTX allows --------------------------------------------
#define BNK_RSQRT

// BNKERNELS_EMULATOR_RSQRT chooses the end of the interval.
__forceinline__ float bnk_rsqrt_approximation(float value) {
    return (float)((1.0 + bnk_rsqrt_error()) / sqrt((double)value));
}

// ---- cuda/lib/sync/async_copy.cuh: nobody has the data before the wait ------------------------------------------------------------
#define BNK_ASYNC_COPY

// The copy happens at the wait; until then the destination is poisoned. Both are accesses of the kernel's own text, so
// sanitizers and counters see them.
template <int BYTES>
__forceinline__ void bnk_copy_async(void* shared, const void* global) {
    bnk_copy_begins(shared, global, BYTES);
}

// Zeros come from nowhere.
template <int BYTES>
__forceinline__ void bnk_copy_async_or_zero(void* shared, const void* global, bool inside) {
    bnk_copy_begins(shared, inside ? global : nullptr, BYTES);
}

__forceinline__ void bnk_commit_copies() { bnk_copies_are_a_group(); }

template <int PENDING>
__forceinline__ void bnk_wait_for_copies() {
    const void* from;
    unsigned bytes;
    while (void* const to = bnk_next_copy(PENDING, &from, &bytes)) {
        if (!from) {
            for (unsigned i = 0; i < bytes / 4; ++i) static_cast<unsigned*>(to)[i] = 0;
        } else if (bytes == 16) {
            bnk_move_vector(to, from);
        } else {
            for (unsigned i = 0; i < bytes / 4; ++i)
                static_cast<unsigned*>(to)[i] = static_cast<const unsigned*>(from)[i];
        }
    }
}

// ---- cuda/lib/gemm/tensor_product.cuh: tensor cores --------------------------------------------------------------------------
#define BNK_TENSOR_CORES 1

// cvt.rna.tf32.f32: half a last place more is added, then 13 bits are dropped. Infinity and NaN lose only the bits.
__forceinline__ unsigned bnk_float_to_tf32(float value) {
    const unsigned bits = bnk_bits_of(value), size = bits & 0x7fffffffu;
    return (bits + (size < 0x7f800000u ? 0x1000u : 0u)) & 0xffffe000u;
}

// mma.sync.aligned, m16n8k16 with 16-bit factors and m16n8k8 with TF32 ones. PTX ISA 9.2, section 9.7.14.5: thread t has,
// with g = t / 4, p = 2 (t % 4), of a (16, 16) the rows g (words 0, 2) and g + 8 (1, 3), columns p, p + 1 (words 0, 1)
// and 8 more (2, 3); of b (16, 8) column g, rows p, p + 1 (word 0) and 8 more (1); of d (16, 8) rows g (0, 1) and g + 8
// (2, 3), columns p and p + 1. A TF32 number takes the place of two of 16 bits. The products are exact, and here so is
// their sum but for one rounding: a GPU may round more often.
template <typename T>
__forceinline__ void bnk_mma(T number, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    constexpr int BITS = 8 * sizeof(T);  // of a number
    const auto value = [&](unsigned long long words) {
        if constexpr (BITS == 32) {
            return (double)bnk_float_of((unsigned)words & 0xffffe000u);  // no more is read
        } else {
            number.bits = (unsigned short)words;
            return (double)(float)number;
        }
    };
    const auto words = [&](unsigned low, unsigned high, unsigned lane) {
        return bnk::shuffle(0xffffffffu, (unsigned long long)high << 32 | low, lane, file, line);
    };
    const unsigned own_row = bnk_lane() & ~3u, first_column = bnk_lane() % 4 * 2 * 4;
    double sums[4] = {d[0], d[1], d[2], d[3]};
    for (unsigned t = 0; t < 4; ++t) {
        const unsigned long long above = words(a[0], a[2], own_row + t), below = words(a[1], a[3], own_row + t);
        const unsigned long long columns[2] = {words(b[0], b[1], first_column + t),
                                               words(b[0], b[1], first_column + 4 + t)};
        for (int at = 0; at < 64; at += BITS)
            for (int c = 0; c < 2; ++c) {
                sums[c] += value(above >> at) * value(columns[c] >> at);
                sums[2 + c] += value(below >> at) * value(columns[c] >> at);
            }
    }
    for (int i = 0; i < 4; ++i) d[i] = (float)sums[i];
}
