// In the counting builds a kernel is compiled with -fsanitize=thread, which calls a function before every access to
// memory, and linked with the functions below instead of TSan's.
#include "access.h"

#include <cstdint>

#include "banks.h"
#include "memory.h"
#include "scheduler.h"
#include "trace.h"

namespace bnk {

#ifdef BNK_COUNT

namespace {

bool within(const void* address, size_t bytes, const void* first, size_t size) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(first);
    return first && offset <= size && bytes <= size - offset;
}

std::string judge(const void* address, size_t bytes, size_t alignment, bool is_write, const void* instruction) {
    Running& r = running;
    if (reinterpret_cast<uintptr_t>(address) % alignment) return "at a misaligned address";
    if (within(address, bytes, r.thread->block->shared, r.request.shared_bytes)) {
        (is_write ? r.totals.shared_bytes_written : r.totals.shared_bytes_read) += bytes;
        if (r.request.count_turns)
            banks::note(static_cast<const char*>(address) - r.thread->block->shared, bytes, instruction);
        return {};
    }
    if (within(address, bytes, r.request.arguments, r.request.argument_bytes))
        return is_write ? "to the kernel's argument" : "";
    trace::note(is_write ? trace::Kind::write : trace::Kind::read, address, bytes);
    const std::string wrong = memory::access(reinterpret_cast<uintptr_t>(address), bytes, is_write);
    if (!wrong.empty() && within(address, 0, r.thread->block->shared, r.request.shared_bytes + 4096))
        return "past the end of the " + std::to_string(r.request.shared_bytes) + " bytes of shared memory";
    return wrong;
}

}  // namespace

void access(const void* address, size_t bytes, size_t alignment, bool is_write, void* instruction) {
    if (running.thread->fiber.on_stack(address, bytes)) return;  // the thread's own variables
    const std::string wrong = judge(address, bytes, alignment, is_write, instruction);
    if (wrong.empty()) return;
    running.totals.error_address = reinterpret_cast<uint64_t>(instruction);
    fail((is_write ? "write of " : "read of ") + std::to_string(bytes) + " bytes " + wrong);
}

#else

void access(const void*, size_t, size_t, bool, void*) {}

#endif

}  // namespace bnk

#ifdef BNK_COUNT

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// The hardware demands natural alignment. Two doubles in one access are taken for a vector.
#define BNK_ACCESSES(bytes, alignment)                                                                         \
    void __tsan_read##bytes(void* p) { bnk::access(p, bytes, alignment, false, __builtin_return_address(0)); } \
    void __tsan_write##bytes(void* p) { bnk::access(p, bytes, alignment, true, __builtin_return_address(0)); }
BNK_ACCESSES(1, 1)
BNK_ACCESSES(2, 2)
BNK_ACCESSES(4, 4)
BNK_ACCESSES(8, 8)
BNK_ACCESSES(16, 16)
#undef BNK_ACCESSES

// The counters of a coverage build, and nothing else: kernels use CUDA's atomics.
uint64_t __tsan_atomic64_fetch_add(uint64_t* counter, uint64_t value, int) {
    const uint64_t old = *counter;
    *counter = old + value;
    return old;
}

void __tsan_read_range(void* p, size_t bytes) { bnk::access(p, bytes, 1, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { bnk::access(p, bytes, 1, true, __builtin_return_address(0)); }
}

#endif
