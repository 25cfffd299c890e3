// What every kernel here shares: the launch macros, and arithmetic in pairs of floating-point numbers.
//
// The text of this folder is compiled twice: by NVRTC for GPUs, and by a C++ compiler for the CPU emulator of the
// tests, which defines the two macros below before it gets here. Nothing else differs. Both compilations contract a
// product and a sum into one rounding only where the code says fma(), so both compute the same bits.
#pragma once

#ifndef BNK_KERNEL
// One kernel: its name (unmangled, so that CuPy can cache it), its one argument (a struct, by value), the most threads
// a block of it may have, and the templated device function that is its body, in parentheses.
#define BNK_KERNEL(name, Arguments, threads, body) \
    extern "C" __global__ void __launch_bounds__(threads) name(const Arguments arguments) { body(arguments); }

// The same, with as many registers as it needs: the compiler would rather spill than fit fewer blocks on a multiprocessor.
#define BNK_KERNEL_ROOMY(name, Arguments, threads, body) \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(const Arguments arguments) { body(arguments); }

// The same, with so few registers that two blocks fit on a multiprocessor: while one waits, the other works.
#define BNK_KERNEL_PAIRED(name, Arguments, threads, body) \
    extern "C" __global__ void __launch_bounds__(threads, 2) name(const Arguments arguments) { body(arguments); }

// The same as BNK_KERNEL_ROOMY, in clusters of so many blocks, which may wait for one another: from sm_90 on.
#define BNK_KERNEL_CLUSTER(name, Arguments, threads, blocks, body)                          \
    extern "C" __global__ void __cluster_dims__(blocks, 1, 1) __launch_bounds__(threads, 1) \
        name(const Arguments arguments) {                                                   \
        body(arguments);                                                                    \
    }
#endif

#ifndef BNK_DYNAMIC_SHARED
// The block's shared memory, of the size the launch asked for, as an array of T.
#define BNK_DYNAMIC_SHARED(T, name)                               \
    extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    T* const name = reinterpret_cast<T*>(name##_bytes)
#endif

// ---- pairs: the unevaluated sum high + low, about twice the precision of A ------------------------------------------
// Error-free transformations after Dekker (1971) and Knuth (TAOCP 2, 4.2.2). They are what keeps a mean of 1e7 exact
// to far below a standard deviation of 1 in float32, at full float32 speed on every GPU.

template <typename A>
struct Pair {
    A high, low;
};

// a + b exactly.
template <typename A>
__device__ __forceinline__ Pair<A> two_sum(A a, A b) {
    const A high = a + b;
    const A of_b = high - a;
    return {high, (a - (high - of_b)) + (b - of_b)};
}

// a + b exactly, where |a| >= |b|. An infinite `a` keeps its value: the rest of an infinity is NaN.
template <typename A>
__device__ __forceinline__ Pair<A> quick_two_sum(A a, A b) {
    const A high = a + b;
    return high == high ? Pair<A>{high, b - (high - a)} : Pair<A>{a, b};
}

template <typename A>
__device__ __forceinline__ Pair<A> add(Pair<A> a, Pair<A> b) {
    const Pair<A> sum = two_sum(a.high, b.high);
    return quick_two_sum(sum.high, sum.low + (a.low + b.low));
}

template <typename A>
__device__ __forceinline__ Pair<A> add(Pair<A> a, A b) {
    const Pair<A> sum = two_sum(a.high, b);
    return quick_two_sum(sum.high, sum.low + a.low);
}

template <typename A>
__device__ __forceinline__ Pair<A> multiply(Pair<A> a, A b) {
    const A high = a.high * b;
    return quick_two_sum(high, fma(a.high, b, -high) + a.low * b);
}

// The remainder of the high quotient is exact, so n equal numbers have exactly that number as their mean.
template <typename A>
__device__ __forceinline__ Pair<A> divide(Pair<A> a, A b) {
    const A high = a.high / b;
    return quick_two_sum(high, (fma(-high, b, a.high) + a.low) / b);
}

// The nearest A; an infinite sum stays infinite although its low part is NaN.
template <typename A>
__device__ __forceinline__ A value(Pair<A> a) {
    return a.low == a.low ? a.high + a.low : a.high;
}

// x - a, rounded about once.
template <typename A>
__device__ __forceinline__ A subtract(A x, Pair<A> a) {
    return (x - a.high) - a.low;
}
