// How the blocks of a cooperative launch, which are all resident at once, wait for one another.
#pragma once

constexpr int BARRIER_PITCH = 8;  // counters of a group: a sector of memory, one of them in use

constexpr unsigned BARRIER_PHASE = 0x80000000u;  // the bit of a counter that a meeting turns over

#ifndef BNK_WAIT  // the tests' emulator defines it
#define BNK_WAIT
// Until the counter's highest bit is another than the ticket's.
__device__ __forceinline__ void bnk_wait(const unsigned* counter, unsigned token) {
    while ((int)(*(const volatile unsigned*)counter ^ token) >= 0) {
    }
}
#endif

// The two halves of a meeting of the blocks of a group: what any of them wrote before it arrived, all may read after they
// have waited, and in between each does what concerns nobody else. Together the blocks add MEETING to the counter, the
// first one what the others leave of it. So the lower bits are zero before and after a meeting of any number of blocks:
// groups of all sizes take turns at one counter, which was 0 once, also where a launch got fewer blocks than it was planned
// with. All threads must call, with the number of blocks and that of their own; what the first one gets counts.
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

// The meetings of a group of the blocks of a cooperative launch, or of a single block.
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
struct ClusterBarrier {
    __device__ __forceinline__ unsigned arrive() const {
        __syncthreads();
        bnk_arrive_in_cluster();
        return 0;
    }
    __device__ __forceinline__ void wait(unsigned) const {
        bnk_wait_for_cluster();
        __syncthreads();  // for what the block's own threads did since they arrived
    }
};
#endif
