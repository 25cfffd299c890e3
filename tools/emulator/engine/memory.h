// Global memory: the arrays that kernels may touch, and what they did to them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace bnk {

// Of one array during one launch. Read by ../binding.py: keep both in step.
struct Traffic {
    uint64_t address, bytes;
    uint64_t reads, writes;                            // accesses
    uint64_t bytes_read, bytes_written;                // a byte counts each time
    uint64_t unique_bytes_read, unique_bytes_written;  // a byte counts once
    uint64_t vector_accesses;                          // of 16 bytes
};

namespace memory {

// Forgets the traffic of the launch before.
void start_launch();
// Counts an access to global memory. Returns what is wrong with it, or nothing.
std::string access(uintptr_t address, size_t bytes, bool is_write);

}  // namespace memory
}  // namespace bnk
