// Threads, blocks and launches: what the scheduler and the intrinsics share.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fiber.h"
#include "happens_before.h"
#include "intrinsics.h"

namespace bnk {

struct Block;

struct Site {  // a place in a kernel
    std::string_view file;
    int line;
    bool operator!=(const Site& other) const { return line != other.line || file != other.file; }
};

enum class State { ready, at_barrier, at_warp_barrier, at_shuffle, at_counter, done };

// An asynchronous copy to shared memory that was not waited for yet.
struct Copy {
    void* to;
    const void* from;
    unsigned bytes, group;
};

struct Thread {
    Fiber fiber;
    Block* block;
    BnkIndex index;
    unsigned number, lane;
    State state = State::ready;
    Site site = {};  // where it waits

    unsigned mask;         // of the warp operation it waits in
    uint64_t value;        // what it brings to a shuffle, then what it takes away
    unsigned source_lane;  // whose value it takes away

    const unsigned* counter;  // that it waits for
    unsigned awaited;         // what `reached` compares it with
    bool (*reached)(unsigned counter, unsigned awaited);
    unsigned cluster_phases = 0;  // barriers of its cluster at which it has arrived

    std::vector<Copy> copies;
    size_t copied = 0;         // of them
    unsigned copy_groups = 0;  // committed

    bool fenced = false;  // has called __threadfence
    order::Tag before_fence, before_atomics;

    bool counter_reached() const { return reached(*counter, awaited); }
};

struct Block {
    BnkIndex index;
    std::vector<Thread> threads;
    char* shared = nullptr;
    unsigned barriers = 0;    // passed
    unsigned at_barrier = 0;  // threads that wait in the next one
    Site barrier_site = {};   // where the first of them waits
    order::Tag barrier_tag;
    std::map<std::pair<unsigned, unsigned>, order::Tag> warp_tags;  // by warp and mask: always the same lanes
};

// The blocks of a cluster meet at barriers, of which at most two are in use: some may not have left the one before.
struct Cluster {
    unsigned arrived = 0;  // threads, at all barriers so far
    order::Tag tags[2];
};

// Read by ../binding.py: keep both in step.
struct Request {
    void (*kernel)(const void*);
    const void* arguments;
    uint64_t argument_bytes;
    BnkIndex grid, block;
    uint64_t shared_bytes;
    uint64_t seed;         // 0: blocks and threads in their natural order
    uint64_t resident;     // blocks in flight at once
    uint64_t cooperative;  // all blocks are, and may wait for one another
    uint64_t count_turns;  // of shared memory
    uint64_t trace;        // note every access and every wait
    double rsqrt_error;    // relative error of the approximation
    uint64_t cluster;      // blocks of one; of more than one, all are in flight, too
    const uint64_t* only;  // the blocks to run; none: all of them
    uint64_t only_count;
};

// Read by ../binding.py: keep both in step.
struct Totals {
    uint64_t shared_bytes_read, shared_bytes_written;
    uint64_t shared_turns, fewest_shared_turns;  // where the request wants them
    uint64_t barriers;                           // the most that one block passed
    uint64_t error_address;                      // of the instruction that failed, where that is known
};

struct Running {
    Request request;
    Totals totals;
    Thread* thread;                                 // null while the scheduler runs
    std::map<const void*, order::Tag> atomic_tags;  // by the address of the atomic
    std::map<uint64_t, Cluster> clusters;           // by number
    std::string error;
};

extern Running running;

// x + gridDim.x (y + gridDim.y z)
inline uint64_t block_number(const Block& block) {
    const BnkIndex grid = running.request.grid;
    return block.index.x + uint64_t(grid.x) * (block.index.y + uint64_t(grid.y) * block.index.z);
}

// Ends the launch with an error. Call from a CUDA thread.
[[noreturn]] void fail(const std::string& what);

std::string text(BnkIndex index);
std::string text(Site site);

}  // namespace bnk
