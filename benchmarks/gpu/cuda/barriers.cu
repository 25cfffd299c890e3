// What it costs to wait: barriers of a whole grid and of clusters, in a row. The host takes the difference of two
// lengths of the row, so that the launch is not in the figure.
// With `check` every block writes the number of each round and reads a neighbour's after the barrier; `errors` counts
// the neighbours that had not arrived. Without it the figure is that of the barrier alone.
// Called by: ../facts.py

__device__ __forceinline__ unsigned acquired(const unsigned* address) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ void released_increment(unsigned* address) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" : : "l"(address) : "memory");
}

// One thread of a block tells that its block has arrived, and waits for as many arrivals as all blocks make.
__device__ __forceinline__ void grid_barrier(unsigned* arrivals, unsigned expected) {
    __syncthreads();
    if (threadIdx.x == 0) {
        released_increment(arrivals);
        while (acquired(arrivals) < expected) {
        }
    }
    __syncthreads();
}

// Launch: cooperative, one block per multiprocessor; `arrivals` and `errors` zero, `slots` one number per block.
extern "C" __global__ void bnk_grid_barriers(unsigned* arrivals, volatile unsigned* slots, unsigned* errors,
                                             long long rounds, int check) {
    for (unsigned round = 1; round <= rounds; ++round) {
        if (check && threadIdx.x == 0) slots[blockIdx.x] = round;
        grid_barrier(arrivals, round * gridDim.x);
        if (check && threadIdx.x == 0 && slots[(blockIdx.x + round) % gridDim.x] < round) atomicAdd(errors, 1u);
    }
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" : : : "memory");
}

__device__ __forceinline__ unsigned cluster_size() {
    unsigned size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// sizes: what each block finds as the size of its cluster.
template <unsigned N>
__device__ __forceinline__ void cluster_barriers(volatile unsigned* slots, unsigned* sizes, unsigned* errors,
                                                 long long rounds, int check) {
    const unsigned first = blockIdx.x / N * N;
    if (threadIdx.x == 0) sizes[blockIdx.x] = cluster_size();
    for (unsigned round = 1; round <= rounds; ++round) {
        if (check) {
            if (threadIdx.x == 0) slots[blockIdx.x] = round;
            __syncwarp();  // the barrier is .aligned: whole warps go to it
        }
        cluster_barrier();
        if (check) {
            if (threadIdx.x == 0 && slots[first + (blockIdx.x + round) % N] < round) atomicAdd(errors, 1u);
            __syncwarp();
        }
    }
}

#define CLUSTER_KERNEL(N)                                                                           \
    extern "C" __global__ void __cluster_dims__(N, 1, 1) bnk_cluster_barriers_##N(                  \
        volatile unsigned* slots, unsigned* sizes, unsigned* errors, long long rounds, int check) { \
        cluster_barriers<N>(slots, sizes, errors, rounds, check);                                   \
    }

CLUSTER_KERNEL(2)
CLUSTER_KERNEL(4)
CLUSTER_KERNEL(8)
#endif
