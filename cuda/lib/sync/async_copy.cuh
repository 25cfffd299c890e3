// Asynchronous copies from global to shared memory: no registers wait for the data, so many may be in flight.
//
// The copies since the last `commit_copies` are a group. `wait_for_copies<PENDING>` waits until all groups of the
// thread but the last PENDING are done; other threads see their data after a barrier behind that wait. Before the wait
// the source must not be written, nor the destination touched. A thread waits for all its copies before it ends.
#pragma once

#include "lib/numbers/vector.cuh"

#ifndef BNK_ASYNC_COPY  // the emulator defines it and these functions
#if __CUDA_ARCH__ >= 800
template <int BYTES>
__device__ __forceinline__ void bnk_copy_async(void* shared, const void* global) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(shared);
    if (BYTES == 16)  // past the L1 cache: no other thread reads the same vector
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global), "n"(BYTES) : "memory");
}
template <int BYTES>
__device__ __forceinline__ void bnk_copy_async_or_zero(void* shared, const void* global, bool inside) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(shared), read = inside ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(read) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(BYTES), "r"(read)
                     : "memory");
}
__device__ __forceinline__ void bnk_commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void bnk_wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#else  // older devices copy at once
template <int BYTES>
__device__ __forceinline__ void bnk_copy_async(void* shared, const void* global) {
    if (BYTES == 16) {
        *static_cast<Vector*>(shared) = bnk_load_vector(global);
    } else {
#pragma unroll
        for (int i = 0; i < BYTES / 4; ++i) static_cast<unsigned*>(shared)[i] = static_cast<const unsigned*>(global)[i];
    }
}
template <int BYTES>
__device__ __forceinline__ void bnk_copy_async_or_zero(void* shared, const void* global, bool inside) {
    if (inside) return bnk_copy_async<BYTES>(shared, global);
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) static_cast<unsigned*>(shared)[i] = 0;
}
__device__ __forceinline__ void bnk_commit_copies() {}
template <int PENDING>
__device__ __forceinline__ void bnk_wait_for_copies() {}
#endif
#endif

// Copies BYTES bytes, 2 to 16; both addresses are multiples of BYTES. Two are copied at once: no instruction does it.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    if constexpr (BYTES == 2)
        *static_cast<Words<2>*>(shared) = load_words<2>(global);
    else
        bnk_copy_async<BYTES>(shared, global);
}

// The same, or zeros where the address is not inside of an array.
template <int BYTES>
__device__ __forceinline__ void copy_async_or_zero(void* shared, const void* global, bool inside) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    bnk_copy_async_or_zero<BYTES>(shared, global, inside);
}

__device__ __forceinline__ void commit_copies() { bnk_commit_copies(); }

template <int PENDING = 0>
__device__ __forceinline__ void wait_for_copies() {
    bnk_wait_for_copies<PENDING>();
}
