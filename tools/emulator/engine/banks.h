// Bank conflicts of shared memory: what the lanes of a warp ask for at once, and in how many turns it is served.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bnk::banks {

// Forgets the launch before.
void start_launch();
// Notes an access of the running thread. A warp executes an instruction for all its lanes at once: the n-th executions
// of one instruction by its threads are one access of the warp.
void note(size_t offset, size_t bytes, const void* instruction);
// Turns that all accesses of the launch take, and those that they would take without conflicts.
struct Turns {
    uint64_t taken, fewest;
};
Turns turns();

}  // namespace bnk::banks
