// The accesses and the waits of a launch, one after the other as the emulator ran them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bnk::trace {

// `barrier`: all threads of the block met. `wait`: the thread has waited for other blocks.
enum class Kind : uint32_t { read, write, barrier, wait };

// Read by ../binding.py: keep both in step.
struct Event {
    uint64_t address;
    uint32_t bytes;
    Kind kind;
    uint32_t block, thread;
};

// Forgets the launch before.
void start_launch();
// Notes something that the running thread did, if the request wants it.
void note(Kind kind, const void* address, size_t bytes);

}  // namespace bnk::trace
