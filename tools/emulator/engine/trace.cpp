#include "trace.h"

#include <vector>

#include "scheduler.h"

namespace bnk::trace {

namespace {

std::vector<Event> events;

}  // namespace

void start_launch() { events.clear(); }

void note(Kind kind, const void* address, size_t bytes) {
    if (!running.request.trace) return;
    const Thread& thread = *running.thread;
    events.push_back({reinterpret_cast<uintptr_t>(address), uint32_t(bytes), kind,
                      uint32_t(block_number(*thread.block)), thread.number});
}

}  // namespace bnk::trace

// ---- for ../binding.py ---------------------------------------------------------------------------------------------

// Returns the events of the last launch, which the next one overwrites.
extern "C" const bnk::trace::Event* bnk_events(uint64_t* count) {
    *count = bnk::trace::events.size();
    return bnk::trace::events.data();
}
