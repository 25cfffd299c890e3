// What the emulated CUDA intrinsics (../cuda_on_cpu.h) call in the engine: the only functions a kernel reaches.
// Kernels never read the engine's memory, so that an instrumented kernel reports its own accesses and no others.
#pragma once
#include <cstdint>

struct BnkIndex {
    unsigned x, y, z;
};

extern "C" {
// Constant for a CUDA thread, so the compiler may fetch each of them once.
BnkIndex bnk_thread_index() __attribute__((const));
BnkIndex bnk_block_index() __attribute__((const));
BnkIndex bnk_block_dimensions() __attribute__((const));
BnkIndex bnk_grid_dimensions() __attribute__((const));
unsigned bnk_lane() __attribute__((const));
void* bnk_shared_memory() __attribute__((const));

// `file` and `line` are the place in the kernel.
void bnk_barrier(const char* file, int line);
void bnk_warp_barrier(unsigned mask, const char* file, int line);
uint64_t bnk_shuffle(unsigned mask, uint64_t value, unsigned source_lane, const char* file, int line);
void bnk_fence();
// Asynchronous copies of the caller: begun, made a group, and, one by one, the oldest of those that a wait for all but
// the last `pending` groups has to make; null when there is none.
void bnk_copy_begins(void* shared, const void* global, unsigned bytes);
void bnk_copies_are_a_group();
void* bnk_next_copy(unsigned pending, const void** from, unsigned* bytes);
double bnk_rsqrt_error();  // relative
unsigned bnk_atomic_add(unsigned* address, unsigned value);
unsigned bnk_atomic_add_release(unsigned* address, unsigned value);
// Until the counter's highest bit is another than the ticket's.
void bnk_wait_for_counter(const unsigned* counter, unsigned ticket, bool acquire, const char* file, int line);
// The two halves of the barrier of the caller's cluster: every thread of it arrives, and waits for all that did.
void bnk_cluster_arrive();
void bnk_cluster_wait(const char* file, int line);
}
