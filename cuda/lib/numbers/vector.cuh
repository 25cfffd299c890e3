// Vectors of 16 bytes, the widest memory access of a thread.
#pragma once

#include "lib/numbers/half.cuh"

struct alignas(16) Vector {
    unsigned words[4];
};

#ifndef BNK_VECTOR_ACCESS  // the emulator defines it and these functions
// Inline PTX, since the compiler splits some of these accesses. Volatile keeps them in program order.
__device__ __forceinline__ Vector bnk_load_vector(const void* address) {
    Vector v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void bnk_store_vector(void* address, const Vector& v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(address), "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
                 : "memory");
}

__device__ __forceinline__ double bnk_double_of(unsigned high, unsigned low) {
    return __hiloint2double((int)high, (int)low);
}
__device__ __forceinline__ unsigned bnk_high_bits_of(double value) { return (unsigned)__double2hiint(value); }
__device__ __forceinline__ unsigned bnk_low_bits_of(double value) { return (unsigned)__double2loint(value); }
#else
__device__ __forceinline__ Vector bnk_load_vector(const void* address) {
    Vector v;
    bnk_move_vector(v.words, address);
    return v;
}

__device__ __forceinline__ void bnk_store_vector(void* address, const Vector& v) { bnk_move_vector(address, v.words); }
#endif

// Element i of a vector of T, converted to and from the accumulator's type.
template <typename T>
struct Packed;

template <>
struct Packed<float> {
    using Number = float;
    static constexpr int COUNT = 4;
    static __device__ __forceinline__ float get(const Vector& vector, int i) { return bnk_float_of(vector.words[i]); }
    static __device__ __forceinline__ void set(Vector& vector, int i, float value) {
        vector.words[i] = bnk_bits_of(value);
    }
};

template <>
struct Packed<double> {
    using Number = double;
    static constexpr int COUNT = 2;
    static __device__ __forceinline__ double get(const Vector& vector, int i) {
        return bnk_double_of(vector.words[2 * i + 1], vector.words[2 * i]);
    }
    static __device__ __forceinline__ void set(Vector& vector, int i, double value) {
        vector.words[2 * i] = bnk_low_bits_of(value);
        vector.words[2 * i + 1] = bnk_high_bits_of(value);
    }
};

struct PackedHalves {
    using Number = float;
    static constexpr int COUNT = 8;
    static __device__ __forceinline__ unsigned short bits(const Vector& vector, int i) {
        return (unsigned short)(vector.words[i / 2] >> (16 * (i % 2)));
    }
    static __device__ __forceinline__ void set_bits(Vector& vector, int i, unsigned short bits) {
        const unsigned other = i % 2 ? vector.words[i / 2] & 0xffffu : 0u;  // elements are set in ascending order
        vector.words[i / 2] = other | (unsigned)bits << (16 * (i % 2));
    }
};

template <>
struct Packed<Float16> : PackedHalves {
    static __device__ __forceinline__ float get(const Vector& vector, int i) {
        return bnk_half_to_float(bits(vector, i));
    }
    static __device__ __forceinline__ void set(Vector& vector, int i, float value) {
        set_bits(vector, i, Float16(value).bits);
    }
};

template <>
struct Packed<BFloat16> : PackedHalves {
    static __device__ __forceinline__ float get(const Vector& vector, int i) {
        return bnk_float_of((unsigned)bits(vector, i) << 16);
    }
    static __device__ __forceinline__ void set(Vector& vector, int i, float value) {
        set_bits(vector, i, BFloat16(value).bits);
    }
};

// The vectors that a thread keeps in shared memory, interleaved with those of the block's other threads.
struct ThreadVectors {
    Vector* own;
    int threads;

    __device__ __forceinline__ explicit ThreadVectors(void* shared)
        : own(static_cast<Vector*>(shared) + threadIdx.y * blockDim.x + threadIdx.x),
          threads(blockDim.x * blockDim.y) {}
    __device__ __forceinline__ Vector& operator[](long long i) const { return own[i * threads]; }
};
