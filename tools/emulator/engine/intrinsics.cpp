// The CUDA intrinsics, as the running thread calls them.
#include "intrinsics.h"

#include <cstdio>
#include <utility>

#include "access.h"
#include "scheduler.h"
#include "trace.h"

using namespace bnk;

namespace {

Thread& self() { return *running.thread; }

// What the engine does on a thread's behalf, such as allocating memory, is none of the thread's own accesses.
class EngineWork {
  public:
    EngineWork() { order::switch_to(Fiber::scheduler_order()); }
    ~EngineWork() { order::switch_to(self().fiber.order()); }
};

// The threads of a warp operation; a vector would ask for memory at each of them.
struct Lanes {
    std::array<Thread*, 32> threads;
    unsigned count = 0;

    Thread** begin() { return threads.data(); }
    Thread** end() { return threads.data() + count; }
};

// Orders what each of the threads did before this meeting before what all of them do after it. In EngineWork.
template <typename Threads>
void meet(Threads& threads, order::Tag& tag) {
    for (const Thread* thread : threads) {
        order::switch_to(thread->fiber.order());
        order::release(tag);
    }
    for (const Thread* thread : threads) {
        order::switch_to(thread->fiber.order());
        order::acquire(tag);
    }
    order::switch_to(Fiber::scheduler_order());
}

// What happened before `from` now happens before `to`; the caller itself neither gives nor gets. In EngineWork.
void pass_on(order::Tag& from, order::Tag& to) {
    void* const messenger = order::create();
    order::switch_to(messenger);
    order::acquire(from);
    order::release(to);
    order::switch_to(Fiber::scheduler_order());
    order::destroy(messenger);
}

template <typename Threads>
void let_go(Threads& threads) {
    for (Thread* thread : threads) thread->state = State::ready;
}

std::string lane_text(unsigned lane, unsigned mask) {
    char text[64];
    snprintf(text, sizeof text, "lane %u of mask 0x%08x", lane, mask);
    return text;
}

void arrive_at_barrier(Site site) {
    const EngineWork work;
    Thread& me = self();
    Block& block = *me.block;
    me.state = State::at_barrier;
    me.site = site;
    if (block.at_barrier == 0) block.barrier_site = site;
    if (block.barrier_site != site)
        fail("divergent __syncthreads: here at " + text(site) + ", elsewhere at " + text(block.barrier_site));
    if (++block.at_barrier < block.threads.size()) return;
    block.at_barrier = 0;
    ++block.barriers;
    trace::note(trace::Kind::barrier, nullptr, 0);
    std::vector<Thread*> all;
    for (Thread& thread : block.threads) all.push_back(&thread);
    meet(all, block.barrier_tag);
    let_go(all);
}

// Joins the operation `state` of the caller's warp. Returns the threads that the mask names once all of them wait in
// it; until then, none. Where all is well the last lane comes last: the search for a missing one begins there.
Lanes arrive_in_warp(State state, unsigned mask, Site site) {
    Thread& me = self();
    const auto refuse = [&](unsigned lane, const std::string& why) {
        fail((state == State::at_shuffle ? "shuffle at " : "__syncwarp at ") + text(site) + ": " +
             lane_text(lane, mask) + why);
    };
    if (!(mask >> me.lane & 1)) refuse(me.lane, " calls, and is not in the mask");
    me.state = state;
    me.site = site;
    me.mask = mask;
    Lanes lanes;
    for (unsigned lane = 32; lane-- > 0;) {
        if (!(mask >> lane & 1)) continue;
        const unsigned number = me.number - me.lane + lane;
        if (number >= me.block->threads.size()) refuse(lane, " does not exist in this block");
        Thread& other = me.block->threads[number];
        if (other.state == State::done) refuse(lane, " has returned");
        if (other.state != state || other.mask != mask) {
            lanes.count = 0;
            return lanes;
        }
        if (state == State::at_shuffle && other.site != site) refuse(lane, " shuffles at " + text(other.site));
        lanes.threads[lanes.count++] = &other;
    }
    return lanes;
}

void arrive_at_warp_barrier(unsigned mask, Site site) {
    const EngineWork work;
    Lanes lanes = arrive_in_warp(State::at_warp_barrier, mask, site);
    if (lanes.count == 0) return;
    meet(lanes, self().block->warp_tags[{self().number / 32, mask}]);
    let_go(lanes);
}

// A shuffle exchanges values but orders no memory.
void arrive_at_shuffle(unsigned mask, uint64_t value, unsigned source_lane, Site site) {
    const EngineWork work;
    self().value = value;
    self().source_lane = source_lane;
    Lanes lanes = arrive_in_warp(State::at_shuffle, mask, site);
    if (!(mask >> source_lane & 1))
        fail("shuffle at " + text(site) + ": " + lane_text(source_lane, mask) + " is a source, and is not in the mask");
    if (lanes.count == 0) return;
    std::array<uint64_t, 32> brought;
    for (const Thread* thread : lanes) brought[thread->lane] = thread->value;
    for (Thread* thread : lanes) thread->value = brought[thread->source_lane];
    let_go(lanes);
}

// Counts an atomic as a read and a write; returns where its address keeps what was published there. In EngineWork.
order::Tag& announce_atomic(unsigned* address, void* place) {
    for (const bool is_write : {false, true}) bnk::access(address, sizeof *address, sizeof *address, is_write, place);
    return running.atomic_tags[address];
}

}  // namespace

BnkIndex bnk_thread_index() { return self().index; }
BnkIndex bnk_block_index() { return self().block->index; }
BnkIndex bnk_block_dimensions() { return running.request.block; }
BnkIndex bnk_grid_dimensions() { return running.request.grid; }
unsigned bnk_lane() { return self().lane; }
void* bnk_shared_memory() { return self().block->shared; }

void bnk_barrier(const char* file, int line) {
    arrive_at_barrier({file, line});
    self().fiber.suspend(false);
}

void bnk_warp_barrier(unsigned mask, const char* file, int line) {
    arrive_at_warp_barrier(mask, {file, line});
    self().fiber.suspend(false);
}

uint64_t bnk_shuffle(unsigned mask, uint64_t value, unsigned source_lane, const char* file, int line) {
    arrive_at_shuffle(mask, value, source_lane, {file, line});
    self().fiber.suspend(false);
    return self().value;
}

// One block hands its results to another by fence + atomic there, then atomic + fence here. Neither of the two orders
// anything alone: an atomic publishes what its thread did before its last fence, and what the atomic saw of other
// threads counts from the next fence on.
void bnk_fence() {
    order::release(self().before_fence);
    order::acquire(self().before_atomics);
    self().fenced = true;
}

unsigned bnk_atomic_add(unsigned* address, unsigned value) {
    const EngineWork work;
    order::Tag& published = announce_atomic(address, __builtin_return_address(0));
    pass_on(published, self().before_atomics);
    if (self().fenced) pass_on(self().before_fence, published);
    return std::exchange(*address, *address + value);
}

// Publishes all that its thread did and saw before, without a fence.
unsigned bnk_atomic_add_release(unsigned* address, unsigned value) {
    order::Tag* published;
    {
        const EngineWork work;
        published = &announce_atomic(address, __builtin_return_address(0));
    }
    order::release(*published);
    const EngineWork work;
    pass_on(*published, self().before_atomics);
    return std::exchange(*address, *address + value);
}

void bnk_copy_begins(void* shared, const void* global, unsigned bytes) {
    const EngineWork work;
    Thread& me = self();
    const uintptr_t offset = static_cast<char*>(shared) - me.block->shared;
    if (offset > running.request.shared_bytes || bytes > running.request.shared_bytes - offset)
        fail("asynchronous copy of " + std::to_string(bytes) + " bytes to outside of the block's shared memory");
    if (offset % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
        fail("asynchronous copy of " + std::to_string(bytes) + " bytes at a misaligned address");
    // NaN. Not by memset, which TSan would take for an access.
    for (unsigned i = 0; i < bytes / 4; ++i) static_cast<volatile unsigned*>(shared)[i] = 0xffffffffu;
    me.copies.push_back({shared, global, bytes, me.copy_groups});
}

void bnk_copies_are_a_group() { ++self().copy_groups; }

void* bnk_next_copy(unsigned pending, const void** from, unsigned* bytes) {
    const EngineWork work;
    Thread& me = self();
    // A copy without a commit is in the group that is not committed yet, for which no wait waits.
    if (me.copied == me.copies.size() || me.copies[me.copied].group + pending >= me.copy_groups) return nullptr;
    const Copy copy = me.copies[me.copied++];
    if (me.copied == me.copies.size()) {
        me.copies.clear();
        me.copied = 0;
    }
    *from = copy.from;
    *bytes = copy.bytes;
    return copy.to;
}

double bnk_rsqrt_error() { return running.request.rsqrt_error; }

void bnk_wait_for_counter(const unsigned* counter, unsigned ticket, bool acquire, const char* file, int line) {
    Thread& me = self();
    me.counter = counter;
    me.awaited = ticket;
    me.reached = [](unsigned now, unsigned before) { return int(now ^ before) < 0; };
    while (!me.counter_reached()) {
        {
            const EngineWork work;
            me.state = State::at_counter;
            me.site = {file, line};
        }
        me.fiber.suspend(false);
    }
    order::Tag* published;
    {
        const EngineWork work;
        bnk::access(counter, sizeof *counter, sizeof *counter, false, __builtin_return_address(0));
        trace::note(trace::Kind::wait, counter, 0);
        published = &running.atomic_tags[counter];
        pass_on(*published, me.before_atomics);
    }
    if (acquire) order::acquire(*published);
}

namespace {

Cluster& own_cluster() { return running.clusters[block_number(*self().block) / running.request.cluster]; }

}  // namespace

void bnk_cluster_arrive() {
    Cluster* cluster;
    {
        const EngineWork work;
        cluster = &own_cluster();
    }
    order::release(cluster->tags[self().cluster_phases % 2]);
    const EngineWork work;
    ++cluster->arrived;
    ++self().cluster_phases;
}

void bnk_cluster_wait(const char* file, int line) {
    Cluster* cluster;
    {
        const EngineWork work;
        Thread& me = self();
        cluster = &own_cluster();
        me.counter = &cluster->arrived;
        me.awaited = me.cluster_phases * unsigned(running.request.cluster * me.block->threads.size());
        me.reached = [](unsigned arrived, unsigned wanted) { return int(arrived - wanted) >= 0; };
        me.site = {file, line};
        if (!me.counter_reached()) me.state = State::at_counter;
    }
    while (!self().counter_reached()) self().fiber.suspend(false);
    order::acquire(cluster->tags[(self().cluster_phases - 1) % 2]);
}
