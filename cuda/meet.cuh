// How the blocks of a cooperative launch, which are all resident at once, wait for one another.
#pragma once

constexpr int ARRIVALS_PITCH = 8;  // counters of a group: a sector of memory, one of them in use

#ifndef BNK_WAIT  // the tests' emulator defines it
#define BNK_WAIT
// Until the counter has reached the target; it may wrap around.
__device__ __forceinline__ void bnk_wait(const unsigned* counter, unsigned target) {
    while ((int)(*(const volatile unsigned*)counter - target) < 0) {
    }
}
#endif

// The two halves of a meeting of the blocks of a group: what any of them wrote before it arrived, all may read after they
// have waited, and in between each does what concerns nobody else. The counter was 0 once, and has counted arrivals ever
// since, in meetings of this size, which is a power of two. All threads must call; what the first one gets counts.
__device__ __forceinline__ unsigned arrive(unsigned* counter, unsigned blocks) {
    __syncthreads();
    if (threadIdx.x || threadIdx.y) return 0;
    __threadfence();
    const unsigned ticket = atomicAdd(counter, 1u);
    return (ticket / blocks + 1) * blocks;
}

__device__ __forceinline__ void wait_for(const unsigned* counter, unsigned arrivals) {
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        bnk_wait(counter, arrivals);
        __threadfence();
    }
    __syncthreads();
}

__device__ __forceinline__ void meet(unsigned* counter, unsigned blocks) { wait_for(counter, arrive(counter, blocks)); }

// The meetings of a group of the blocks of a cooperative launch, or of a single block.
struct GridMeeting {
    unsigned* arrivals;
    unsigned blocks;

    __device__ __forceinline__ unsigned arrive() const {
        if (blocks > 1) return ::arrive(arrivals, blocks);
        __syncthreads();
        return 0;
    }
    __device__ __forceinline__ void wait_for(unsigned target) const {
        if (blocks > 1)
            ::wait_for(arrivals, target);
        else
            __syncthreads();
    }
};

// Those of a cluster, whose blocks the hardware keeps together: from sm_90 on.
constexpr int CLUSTER = 8;  // blocks, as many as every such device grants

#ifndef BNK_CLUSTERS  // the tests' emulator defines it
#define BNK_CLUSTERS (__CUDA_ARCH__ >= 900)
#if BNK_CLUSTERS
__device__ __forceinline__ void bnk_arrive_in_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void bnk_wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
#endif
#endif

#if BNK_CLUSTERS
struct ClusterMeeting {
    __device__ __forceinline__ unsigned arrive() const {
        __syncthreads();
        bnk_arrive_in_cluster();
        return 0;
    }
    __device__ __forceinline__ void wait_for(unsigned) const {
        bnk_wait_for_cluster();
        __syncthreads();  // for what the block's own threads did since they arrived
    }
};
#endif
