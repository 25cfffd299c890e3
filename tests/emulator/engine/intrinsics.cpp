// The CUDA intrinsics, as the running thread calls them.
#include "intrinsics.h"

#include <cstdio>

#include "access.h"
#include "happens_before.h"
#include "scheduler.h"

using namespace bnk;

namespace {

Thread& self() { return *running.thread; }

// Orders what each of the threads did before this meeting before what all of them do after it.
void meet(const std::vector<Thread*>& threads, char* tag) {
    for (const Thread* thread : threads) {
        order::switch_to(thread->fiber.order());
        order::release(tag);
    }
    for (const Thread* thread : threads) {
        order::switch_to(thread->fiber.order());
        order::acquire(tag);
    }
    order::switch_to(self().fiber.order());
}

void wait(State state, Site site) {
    self().state = state;
    self().site = site;
}

std::string lane_text(unsigned lane, unsigned mask) {
    char text[64];
    snprintf(text, sizeof text, "lane %u of mask 0x%08x", lane, mask);
    return text;
}

// The threads of the caller's warp that the mask names, once all of them wait in this operation; empty until then.
std::vector<Thread*> gather(unsigned mask, const char* what) {
    Thread& me = self();
    const auto refuse = [&](unsigned lane, const std::string& why) {
        fail(std::string(what) + " at " + text(me.site) + ": " + lane_text(lane, mask) + why);
    };
    std::vector<Thread*> lanes;
    bool complete = true;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const unsigned number = me.number - me.lane + lane;
        if (number >= me.block->threads.size()) refuse(lane, " does not exist in this block");
        Thread& other = me.block->threads[number];
        if (other.state == State::done) refuse(lane, " has returned");
        lanes.push_back(&other);
        complete = complete && other.state == me.state && other.mask == mask;
        if (complete && me.state == State::at_shuffle && other.site != me.site)
            refuse(lane, " shuffles elsewhere, at " + text(other.site));
    }
    if (!complete) lanes.clear();
    return lanes;
}

void check_mask(unsigned mask, const char* what, Site site) {
    if (!(mask >> self().lane & 1))
        fail(std::string(what) + " at " + text(site) + ": the caller is not in its mask: " +
             lane_text(self().lane, mask));
}

}  // namespace

BnkIndex bnk_thread_index() { return self().index; }
BnkIndex bnk_block_index() { return self().block->index; }
BnkIndex bnk_block_dimensions() { return running.request.block; }
BnkIndex bnk_grid_dimensions() { return running.request.grid; }
unsigned bnk_lane() { return self().lane; }
void* bnk_shared_memory() { return self().block->shared; }

void bnk_barrier(const char* file, int line) {
    Thread& me = self();
    Block& block = *me.block;
    wait(State::at_barrier, {file, line});
    std::vector<Thread*> arrived;
    for (Thread& other : block.threads) {
        if (other.state != State::at_barrier) continue;
        if (other.site != me.site)
            fail("divergent __syncthreads: here at " + text(me.site) + ", elsewhere at " + text(other.site));
        arrived.push_back(&other);
    }
    if (arrived.size() == block.threads.size()) {
        ++block.barriers;
        meet(arrived, &block.barrier_tag);
        for (Thread* thread : arrived) thread->state = State::ready;
    }
    me.fiber.suspend(false);
}

void bnk_warp_barrier(unsigned mask, const char* file, int line) {
    Thread& me = self();
    check_mask(mask, "__syncwarp", {file, line});
    wait(State::at_warp_barrier, {file, line});
    me.mask = mask;
    const std::vector<Thread*> lanes = gather(mask, "__syncwarp");
    if (!lanes.empty()) meet(lanes, &me.block->warp_tags[{me.number / 32, mask}]);
    for (Thread* thread : lanes) thread->state = State::ready;
    me.fiber.suspend(false);
}

// A shuffle exchanges values but orders no memory.
uint64_t bnk_shuffle(unsigned mask, uint64_t value, unsigned source_lane, const char* file, int line) {
    Thread& me = self();
    check_mask(mask, "shuffle", {file, line});
    if (!(mask >> source_lane & 1))
        fail("shuffle at " + text(Site{file, line}) + ": the source is not in the mask: " +
             lane_text(source_lane, mask));
    wait(State::at_shuffle, {file, line});
    me.mask = mask;
    me.value = value;
    me.source_lane = source_lane;
    const std::vector<Thread*> lanes = gather(mask, "shuffle");
    if (!lanes.empty()) {
        std::array<uint64_t, 32> brought;
        for (const Thread* thread : lanes) brought[thread->lane] = thread->value;
        for (Thread* thread : lanes) {
            thread->value = brought[thread->source_lane];
            thread->state = State::ready;
        }
    }
    me.fiber.suspend(false);
    return me.value;
}

// ---- fences and atomics: one block hands its results to another by fence + atomic, then atomic + fence --------------
// A fence alone orders nothing, and an atomic alone orders nothing: what a thread did before its last fence reaches
// an atomic's address, and what it saw there counts from its next fence on.

namespace {

// What happened before `from` now happens before `to`; the caller itself neither gives nor gets anything.
void pass_on(void* from, void* to) {
    order::switch_to(Fiber::scheduler_order());
    void* const messenger = order::create();
    order::switch_to(messenger);
    order::acquire(from);
    order::release(to);
    order::switch_to(Fiber::scheduler_order());
    order::destroy(messenger);
    order::switch_to(self().fiber.order());
}

}  // namespace

void bnk_fence() {
    order::release(&self().before_fence);
    order::acquire(&self().before_atomics);
    self().fenced = true;
}

unsigned bnk_atomic_add(unsigned* address, unsigned value) {
    for (const bool is_write : {false, true})
        bnk::access(address, sizeof *address, sizeof *address, is_write, __builtin_return_address(0));
    pass_on(address, &self().before_atomics);
    if (self().fenced) pass_on(&self().before_fence, address);
    const unsigned old = *address;
    *address = old + value;
    return old;
}
