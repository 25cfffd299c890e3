// How the blocks of a cooperative launch, which are all resident at once, wait for one another.
#pragma once

#ifndef BNK_WAIT  // the tests' emulator defines it
#define BNK_WAIT
// Until the counter has reached the target; it may wrap around.
__device__ __forceinline__ void bnk_wait(const unsigned* counter, unsigned target) {
    while ((int)(*(const volatile unsigned*)counter - target) < 0) {
    }
}
#endif

// Waits for the other blocks of the group; what any of them wrote before, all may read after. The counter was 0 once, and
// has counted arrivals ever since, in meetings of this size, which is a power of two. All threads must call.
__device__ __forceinline__ void meet(unsigned* counter, unsigned blocks) {
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        __threadfence();
        const unsigned ticket = atomicAdd(counter, 1u);
        bnk_wait(counter, (ticket / blocks + 1) * blocks);
        __threadfence();
    }
    __syncthreads();
}
