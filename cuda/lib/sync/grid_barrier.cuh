// Barriers between blocks that are all resident: of a cooperative launch, or of a cluster.
#pragma once

constexpr int BARRIER_PITCH = 8;  // counters of a barrier: one sector of memory, whose first word is used

constexpr unsigned BARRIER_PHASE = 0x80000000u;  // the bit of a counter that a barrier flips

#ifndef BNK_WAIT  // the emulator defines it
#define BNK_WAIT
// Spins until the phase bit of the counter differs from that of the token.
__device__ __forceinline__ void bnk_wait(const unsigned* counter, unsigned token) {
    while ((int)(*(const volatile unsigned*)counter ^ token) >= 0) {
    }
}
#endif

// Split grid barrier. Writes made before `arrive` are visible to all blocks after `wait`; independent work may go in
// between. Together the blocks add BARRIER_PHASE to the counter: 1 each, and block 0 the rest. The lower bits are thus
// 0 before and after every barrier, whatever the number of blocks, so barriers of different sizes may use one counter
// in turn. It must be 0 initially. All threads must call; the values that thread (0, 0) passes count.
__device__ __forceinline__ unsigned arrive(unsigned* counter, unsigned blocks, unsigned block) {
    __syncthreads();
    if (threadIdx.x || threadIdx.y) return 0;
    __threadfence();
    return atomicAdd(counter, block == 0 ? BARRIER_PHASE - (blocks - 1) : 1u);
}

__device__ __forceinline__ void wait(const unsigned* counter, unsigned token) {
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        bnk_wait(counter, token);
        __threadfence();
    }
    __syncthreads();
}

__device__ __forceinline__ void grid_barrier(unsigned* counter, unsigned blocks, unsigned block) {
    wait(counter, arrive(counter, blocks, block));
}

// Barrier between the blocks of a cooperative launch that share a counter, or within a single block.
struct GridBarrier {
    unsigned* counter;
    unsigned blocks, block;

    __device__ __forceinline__ unsigned arrive() const {
        if (blocks > 1) return ::arrive(counter, blocks, block);
        __syncthreads();
        return 0;
    }
    __device__ __forceinline__ void wait(unsigned token) const {
        if (blocks > 1)
            ::wait(counter, token);
        else
            __syncthreads();
    }
};

// Barrier between the blocks of a cluster; requires sm_90.
constexpr int CLUSTER = 8;  // blocks; the largest size that every such device supports

#ifndef BNK_CLUSTERS  // the emulator defines it
#define BNK_CLUSTERS (__CUDA_ARCH__ >= 900)
#if BNK_CLUSTERS
__device__ __forceinline__ void bnk_arrive_in_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void bnk_wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
#endif
#endif

#if BNK_CLUSTERS
struct ClusterBarrier {
    __device__ __forceinline__ unsigned arrive() const {
        __syncthreads();
        bnk_arrive_in_cluster();
        return 0;
    }
    __device__ __forceinline__ void wait(unsigned) const {
        bnk_wait_for_cluster();
        __syncthreads();  // orders the writes of the block's own threads since they arrived
    }
};
#endif
