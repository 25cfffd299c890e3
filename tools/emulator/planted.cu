// Kernels with a planted bug each, and a few correct ones: what the emulator has to report, and what it has to count.
// Called by: ../test_emulator.py, planted.py
#include "lib/kernel.cuh"
#include "lib/sync/async_copy.cuh"

struct Planted {
    const float* x;
    float* y;
    unsigned* ticket;
    long long n;
    int choice;
};

#define PLANTED(name) PLANTED_WITH_BOUNDS(name, 1024)
#define PLANTED_WITH_BOUNDS(name, threads)                                  \
    __device__ __forceinline__ void planted_##name(const Planted& a);       \
    BNK_KERNEL(bnk_planted_##name, (Planted), threads, 0, (planted_##name)) \
    __device__ __forceinline__ void planted_##name([[maybe_unused]] const Planted& a)

// ---- correct --------------------------------------------------------------------------------------------------------

// Reads x once, writes y once, one barrier.
PLANTED(reverse) {
    BNK_DYNAMIC_SHARED(float, tile);
    const int t = threadIdx.x;
    const long long first = (long long)blockIdx.x * blockDim.x;
    tile[t] = a.x[first + t];
    __syncthreads();
    a.y[first + t] = tile[blockDim.x - 1 - t];
}

// No block of more than 64 threads.
PLANTED_WITH_BOUNDS(bounded, 64) { a.y[threadIdx.x] = a.x[threadIdx.x]; }

PLANTED(copy_vectors) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    reinterpret_cast<Vector*>(a.y)[i] = reinterpret_cast<const Vector*>(a.x)[i];
}

// Every kind of shuffle, one row of y each, in segments of `choice` lanes.
PLANTED(shuffles) {
    const int t = threadIdx.x, T = blockDim.x;
    const unsigned mask = 0xffffffffu;
    a.y[t] = __shfl_sync(mask, a.x[t], 3, a.choice);
    a.y[T + t] = __shfl_xor_sync(mask, a.x[t], 5, a.choice);
    a.y[2 * T + t] = __shfl_down_sync(mask, a.x[t], 2, a.choice);
    a.y[3 * T + t] = (float)__shfl_xor_sync(mask, (double)a.x[t], 1, a.choice);
}

// y[i] tells when thread i ran, before its barrier and after it.
PLANTED(order) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    a.y[2 * i] = (float)atomicAdd(a.ticket, 1);
    __syncthreads();
    a.y[2 * i + 1] = (float)atomicAdd(a.ticket, 1);
}

PLANTED(where) {
    const long long thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * (long long)threadIdx.z);
    const long long block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * (long long)blockIdx.z);
    const long long i = block * blockDim.x * blockDim.y * blockDim.z + thread;
    a.y[i] = a.x[i];
}

// The sum of all x in the order of the blocks: the last block to finish adds what every block has left in y.
// choice: 3 is correct; 1 lacks the fence before the atomic, 2 the one behind it, 0 both; 4 has the first too early.
PLANTED(last_block) {
    BNK_DYNAMIC_SHARED(unsigned, is_last);
    const bool release = a.choice == 2 || a.choice == 3, acquire = a.choice == 1 || a.choice >= 3;
    if (a.choice == 4) __threadfence();
    if (threadIdx.x == 0) {
        a.y[1 + blockIdx.x] = a.x[blockIdx.x];
        if (release) __threadfence();
        is_last[0] = atomicAdd(a.ticket, 1) == gridDim.x - 1;
        if (acquire) __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 1 && is_last[0]) {
        float sum = 0;
        for (unsigned block = 0; block < gridDim.x; ++block) sum += a.y[1 + block];
        a.y[0] = sum;
    }
}

// Blocks meet, and every one takes what its neighbour has left in y. choice: 3 is correct; 1 adds to the counter without
// release, 2 waits without acquire, 0 does both.
PLANTED(meeting) {
    const unsigned blocks = gridDim.x, block = blockIdx.x;
    const bool release = a.choice >= 2, acquire = a.choice == 1 || a.choice == 3;
    a.y[block * blockDim.x + threadIdx.x] = a.x[block];
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned added = block == 0 ? 0x80000000u - (blocks - 1) : 1u;
        const unsigned token = release ? bnk_add<RELEASE>(a.ticket, added) : bnk_add<RELAXED>(a.ticket, added);
        if (acquire)
            bnk_wait<ACQUIRE>(a.ticket, token);
        else
            bnk_wait<RELAXED>(a.ticket, token);
    }
    __syncthreads();
    a.y[(blocks + block) * blockDim.x + threadIdx.x] = a.y[(block + 1) % blocks * blockDim.x + threadIdx.x];
}

// Neighbours in a warp exchange x through shared memory. choice: 1 is correct, 0 lacks the barrier.
PLANTED(warp_exchange) {
    BNK_DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x] = a.x[threadIdx.x];
    if (a.choice) __syncwarp();
    a.y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Columns of 32 rows of `choice` words in shared memory, one after the other: a word of its own for every thread.
PLANTED(columns) {
    BNK_DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x * a.choice] = a.x[threadIdx.x];
    a.y[threadIdx.x] = tile[threadIdx.x * a.choice];
}

// Every thread copies its neighbour's x to shared memory, twice, and adds both. choice: 0 is correct; 1 reads before the
// wait, 2 waits for the first of the two only, 3 commits neither, 4 ends without a wait, 5 copies past the end.
PLANTED(async_copy) {
    BNK_DYNAMIC_SHARED(float, tile);
    const unsigned t = threadIdx.x, beyond = a.choice == 5 ? 1 : 0;
    copy_async<4>(tile + t, a.x + (t ^ 1));
    if (a.choice != 3) commit_copies();
    copy_async<4>(tile + blockDim.x + t + beyond, a.x + (t ^ 1));
    if (a.choice != 3) commit_copies();
    if (a.choice == 0 || a.choice == 3 || a.choice == 5) wait_for_copies();
    if (a.choice == 2) wait_for_copies<1>();
    a.y[t] = tile[t] + tile[blockDim.x + t];
    if (a.choice == 1 || a.choice == 2) wait_for_copies();
}

// ---- barriers and warps ---------------------------------------------------------------------------------------------

PLANTED(missing_barrier) {
    BNK_DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x] = a.x[threadIdx.x];
    a.y[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

PLANTED(barrier_not_reached_by_all) {
    if (threadIdx.x < 16) return;
    __syncthreads();
}

PLANTED(divergent_barrier) {
    if (threadIdx.x < 16)
        __syncthreads();
    else
        __syncthreads();
}

// Launched with a block that ends within a warp.
PLANTED(absent_lane) { a.y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, a.x[threadIdx.x], 1); }

PLANTED(returned_lane) {
    if (threadIdx.x == 0) return;
    __syncwarp();
}

PLANTED(caller_outside_mask) { a.y[threadIdx.x] = __shfl_xor_sync(0xfffffffeu, a.x[threadIdx.x], 1); }

PLANTED(source_outside_mask) {
    if (threadIdx.x < 16) a.y[threadIdx.x] = __shfl_sync(0x0000ffffu, a.x[threadIdx.x], 20);
}

PLANTED(differing_masks) { __syncwarp(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u); }

PLANTED(divergent_shuffle) {
    const float x = a.x[threadIdx.x];
    if (threadIdx.x < 16)
        a.y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x, 1);
    else
        a.y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x, 2);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

PLANTED(read_past_the_end) { a.y[threadIdx.x] = a.x[threadIdx.x + 1]; }

PLANTED(write_before_the_start) { (a.y - 1)[threadIdx.x] = a.x[threadIdx.x]; }

PLANTED(shared_past_the_end) {
    BNK_DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x + 1] = a.x[threadIdx.x];
}

PLANTED(write_to_the_argument) { const_cast<Planted&>(a).n = 0; }

PLANTED(misaligned) { a.y[threadIdx.x] = (float)reinterpret_cast<const double*>(a.x + 1)[threadIdx.x]; }

PLANTED(misaligned_vector) { reinterpret_cast<Vector*>(a.y)[0] = reinterpret_cast<const Vector*>(a.x + 2)[0]; }

PLANTED(uninitialised_shared) {
    BNK_DYNAMIC_SHARED(float, tile);
    a.y[threadIdx.x] = tile[threadIdx.x];
}

// choice is the number of elements a block skips; beyond 2^31 an int does not reach.
PLANTED(narrow_index) {
    const int first = (int)(blockIdx.x + 1) * a.choice;
    if (threadIdx.x < 1) a.y[0] = (float)first;
}

PLANTED(blocks_write_the_same) { a.y[threadIdx.x] = a.x[threadIdx.x]; }
