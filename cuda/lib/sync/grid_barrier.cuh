// Barriers between blocks that are all resident: of a cooperative launch, or of a cluster.
#pragma once

constexpr int BARRIER_PITCH = 8;  // counters of a barrier: one sector of memory, whose first word is used

constexpr unsigned BARRIER_PHASE = 0x80000000u;  // the bit of a counter that a barrier flips

#ifndef BNK_WAIT  // the emulator defines it
#define BNK_WAIT
// RELEASE: what the thread did before, and what it saw, is seen by a thread that has acquired the value. By way of the
// block's barriers on both sides this holds for all threads of two blocks.
enum MemoryOrder { RELAXED, RELEASE, ACQUIRE };

// Adds to the counter and returns what it was before.
template <MemoryOrder ORDER>
__device__ __forceinline__ unsigned bnk_add(unsigned* counter, unsigned value) {
    unsigned before;
    if (ORDER == RELEASE)
        asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
                     : "=r"(before)
                     : "l"(counter), "r"(value)
                     : "memory");
    else
        before = atomicAdd(counter, value);
    return before;
}

// Spins until the phase bit of the counter differs from that of the token.
template <MemoryOrder ORDER>
__device__ __forceinline__ void bnk_wait(const unsigned* counter, unsigned token) {
    unsigned now;
    do {
        if (ORDER == ACQUIRE)
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
        else
            now = *(const volatile unsigned*)counter;
    } while ((int)(now ^ token) >= 0);
}
#endif

// Split grid barrier. Writes made before `arrive` are visible to all blocks after `wait`; independent work may go in
// between. Together the blocks add BARRIER_PHASE to the counter: 1 each, and block 0 the rest. The lower bits are thus
// 0 before and after every barrier, whatever the number of blocks, so barriers of different sizes may use one counter
// in turn. It must be 0 initially. All threads must call; the values that thread (0, 0) passes count.
__device__ __forceinline__ unsigned arrive(unsigned* counter, unsigned blocks, unsigned block) {
    __syncthreads();
    if (threadIdx.x || threadIdx.y) return 0;
    return bnk_add<RELEASE>(counter, block == 0 ? BARRIER_PHASE - (blocks - 1) : 1u);
}

__device__ __forceinline__ void wait(const unsigned* counter, unsigned token) {
    if (threadIdx.x == 0 && threadIdx.y == 0) bnk_wait<ACQUIRE>(counter, token);
    __syncthreads();
}

__device__ __forceinline__ void grid_barrier(unsigned* counter, unsigned blocks, unsigned block) {
    wait(counter, arrive(counter, blocks, block));
}

// Barrier that the last block to arrive opens, after it has used what all blocks wrote before they arrived.
//
// Every block adds 1 to the counter. The last one finds the others' number in its lower bits; `open` clears these and
// flips the phase, for which the others `wait` as above. Returns whether the block is the last, to all its threads
// through `is_last` in shared memory, and the token to thread (0, 0). Blocks must not arrive again before it is open.
__device__ __forceinline__ bool arrive_last(unsigned* counter, unsigned blocks, unsigned& token, unsigned* is_last) {
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        __threadfence();
        token = atomicAdd(counter, 1u);
        __threadfence();
        *is_last = (token & ~BARRIER_PHASE) == blocks - 1;
    }
    __syncthreads();
    return *is_last;
}

__device__ __forceinline__ void open(unsigned* counter, unsigned blocks) {
    __syncthreads();
    if (threadIdx.x || threadIdx.y) return;
    bnk_add<RELEASE>(counter, BARRIER_PHASE - blocks);
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
