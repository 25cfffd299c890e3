// Vectors: what a thread accesses at once, of 2 to 16 bytes; 16 is the widest access of a thread.
#pragma once

#include "lib/numbers/half.cuh"

template <int BYTES>
struct alignas(BYTES) Words {
    unsigned words[BYTES / 4];
};
template <>
struct alignas(2) Words<2> {
    unsigned short words[1];
};

using Vector = Words<16>;

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

template <int BYTES>
__device__ __forceinline__ Words<BYTES> load_words(const void* address) {
    if constexpr (BYTES == 16)
        return bnk_load_vector(address);
    else
        return *static_cast<const Words<BYTES>*>(address);
}

template <int BYTES>
__device__ __forceinline__ void store_words(void* address, const Words<BYTES>& words) {
    if constexpr (BYTES == 16)
        bnk_store_vector(address, words);
    else
        *static_cast<Words<BYTES>*>(address) = words;
}

// Element i of a vector of T, converted to and from the accumulator's type. COUNT: elements in 16 bytes.
template <typename T>
struct Packed;

template <>
struct Packed<float> {
    using Number = float;
    static constexpr int COUNT = 4;
    template <typename Vector>
    static __device__ __forceinline__ float get(const Vector& vector, int i) {
        return bnk_float_of(vector.words[i]);
    }
    template <typename Vector>
    static __device__ __forceinline__ void set(Vector& vector, int i, float value) {
        vector.words[i] = bnk_bits_of(value);
    }
};

template <>
struct Packed<double> {
    using Number = double;
    static constexpr int COUNT = 2;
    template <typename Vector>
    static __device__ __forceinline__ double get(const Vector& vector, int i) {
        return bnk_double_of(vector.words[2 * i + 1], vector.words[2 * i]);
    }
    template <typename Vector>
    static __device__ __forceinline__ void set(Vector& vector, int i, double value) {
        vector.words[2 * i] = bnk_low_bits_of(value);
        vector.words[2 * i + 1] = bnk_high_bits_of(value);
    }
};

struct PackedHalves {
    using Number = float;
    static constexpr int COUNT = 8;
    template <typename Vector>
    static __device__ __forceinline__ unsigned short bits(const Vector& vector, int i) {
        return (unsigned short)(vector.words[i / 2] >> (16 * (i % 2)));
    }
    template <typename Vector>
    static __device__ __forceinline__ void set_bits(Vector& vector, int i, unsigned short bits) {
        const unsigned other = i % 2 ? vector.words[i / 2] & 0xffffu : 0u;  // elements are set in ascending order
        vector.words[i / 2] = other | (unsigned)bits << (16 * (i % 2));
    }
};

template <>
struct Packed<Float16> : PackedHalves {
    static __device__ __forceinline__ unsigned word(float first, float second) {
        return bnk_floats_to_halves(first, second);
    }
    template <typename Vector>
    static __device__ __forceinline__ float get(const Vector& vector, int i) {
        return bnk_half_to_float(bits(vector, i));
    }
    template <typename Vector>
    static __device__ __forceinline__ void set(Vector& vector, int i, float value) {
        set_bits(vector, i, Float16(value).bits);
    }
};

template <>
struct Packed<BFloat16> : PackedHalves {
    static __device__ __forceinline__ unsigned word(float first, float second) {
        return bnk_floats_to_bfloats(first, second);
    }
    template <typename Vector>
    static __device__ __forceinline__ float get(const Vector& vector, int i) {
        return bnk_float_of((unsigned)bits(vector, i) << 16);
    }
    template <typename Vector>
    static __device__ __forceinline__ void set(Vector& vector, int i, float value) {
        set_bits(vector, i, BFloat16(value).bits);
    }
};

template <typename T>
using Unpacked = typename Packed<T>::Number[Packed<T>::COUNT];

// All elements of a vector of T.
template <typename T, int COUNT>
__device__ __forceinline__ void unpack(const Words<COUNT*(int)sizeof(T)>& vector,
                                       typename Packed<T>::Number (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = Packed<T>::get(vector, i);
}

template <typename T, int COUNT>
__device__ __forceinline__ Words<COUNT*(int)sizeof(T)> pack(const typename Packed<T>::Number (&values)[COUNT]) {
    Words<COUNT*(int)sizeof(T)> vector = {};
    if constexpr (sizeof(T) == 2 && COUNT > 1) {  // an instruction converts two
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) vector.words[i] = Packed<T>::word(values[2 * i], values[2 * i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) Packed<T>::set(vector, i, values[i]);
    }
    return vector;
}

// Places of a thread in shared memory, interleaved with those of the block's other threads.
template <typename Kept>
struct ThreadPlaces {
    Kept* own;
    int threads;

    __device__ __forceinline__ explicit ThreadPlaces(void* shared)
        : own(static_cast<Kept*>(shared) + threadIdx.y * blockDim.x + threadIdx.x), threads(blockDim.x * blockDim.y) {}
    __device__ __forceinline__ ThreadPlaces(Kept* own, int threads) : own(own), threads(threads) {}
    __device__ __forceinline__ Kept& operator[](int i) const { return own[i * threads]; }

    // Those from number `first` on.
    __device__ __forceinline__ ThreadPlaces from(int first) const { return {own + first * threads, threads}; }
};

using ThreadVectors = ThreadPlaces<Vector>;
