// Runs a launch: some blocks at a time, one thread after the other, each until it has to wait.
#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>

#include "banks.h"
#include "memory.h"
#include "trace.h"

namespace bnk {

Running running;

namespace {

constexpr unsigned warp_size = 32;
order::Tag block_start, launch_end;

BnkIndex unravel(uint64_t number, BnkIndex extent) {
    return {unsigned(number % extent.x), unsigned(number / extent.x % extent.y),
            unsigned(number / (uint64_t(extent.x) * extent.y))};
}

// Shared memory is fresh for every block, so that TSan does not take its last owner for a rival, poisoned with NaN,
// and for ASan of the exact size.
char* take_shared(size_t bytes) {
    if (bytes == 0) return nullptr;
#ifdef BNK_ASAN
    void* const shared = malloc(bytes);
#else
    void* const shared = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) throw std::bad_alloc();
#endif
    // A number near 0 where the order is another: a result that depends on what was there depends on the seed.
    memset(shared, running.request.seed ? 0x01 : 0xff, bytes);
    return static_cast<char*>(shared);
}

void give_back_shared(char* shared, [[maybe_unused]] size_t bytes) {
    if (!shared) return;
#ifdef BNK_ASAN
    free(shared);
#else
    munmap(shared, bytes);
#endif
}

void thread_entry() {
    Fiber::entered();
    Thread& self = *running.thread;
    order::acquire(block_start);
    running.request.kernel(running.request.arguments);
    if (const size_t left = self.copies.size() - self.copied)
        fail(std::to_string(left) + " asynchronous copies were never waited for");
    self.state = State::done;
    self.fiber.suspend(true);
}

std::unique_ptr<Block> start_block(uint64_t number) {
    const Request& request = running.request;
    auto block = std::make_unique<Block>();
    block->index = unravel(number, request.grid);
    block->shared = take_shared(request.shared_bytes);
    block->threads = std::vector<Thread>(uint64_t(request.block.x) * request.block.y * request.block.z);
    for (unsigned i = 0; i < block->threads.size(); ++i) {
        Thread& thread = block->threads[i];
        thread.block = block.get();
        thread.index = unravel(i, request.block);
        thread.number = i;
        thread.lane = i % warp_size;
        thread.fiber.start(thread_entry);
    }
    order::release(block_start);  // what the scheduler has prepared; it never learns what the blocks do
    return block;
}

// Also of a block that was abandoned.
void end_block(std::unique_ptr<Block>& block) {
    for (const Thread& thread : block->threads) {
        order::switch_to(thread.fiber.order());
        order::release(launch_end);
    }
    order::switch_to(Fiber::scheduler_order());
    running.totals.barriers = std::max<uint64_t>(running.totals.barriers, block->barriers);
    give_back_shared(block->shared, running.request.shared_bytes);
    block.reset();
}

const char* waiting_for(State state) {
    switch (state) {
        case State::at_barrier: return "wait at __syncthreads";
        case State::at_warp_barrier: return "wait at __syncwarp";
        case State::at_shuffle: return "wait at a shuffle";
        case State::at_counter: return "wait for a counter";
        case State::done: return "have returned";
        default: return "are ready";
    }
}

// Who waits where, in the first block that waits: one clause per state, each with one thread as an example.
std::string deadlock(const std::vector<std::unique_ptr<Block>>& resident) {
    const Block& block = **std::find_if(resident.begin(), resident.end(), [](const auto& b) { return b != nullptr; });
    std::string what = "deadlock in block " + text(block.index) + ":";
    for (const State state :
         {State::at_barrier, State::at_warp_barrier, State::at_shuffle, State::at_counter, State::done}) {
        const auto in_state = [state](const Thread& thread) { return thread.state == state; };
        const auto count = std::count_if(block.threads.begin(), block.threads.end(), in_state);
        if (count == 0) continue;
        const Thread& first = *std::find_if(block.threads.begin(), block.threads.end(), in_state);
        what += " " + std::to_string(count) + " of " + std::to_string(block.threads.size()) + " threads " +
                waiting_for(state) + " (thread " + text(first.index);
        if (state != State::done) what += " at " + text(first.site);
        if (state == State::at_warp_barrier || state == State::at_shuffle) {
            char mask[32];
            snprintf(mask, sizeof mask, " with mask 0x%08x", first.mask);
            what += mask;
        }
        what += ");";
    }
    what.back() = '.';
    return what;
}

// The numbers 0 .. count - 1 in a random order, a few instructions each: first + k step, step prime to count.
class Sequence {
  public:
    Sequence(uint64_t count, std::mt19937_64* random) : count_(count) {
        if (!random) return;
        next_ = (*random)() % count;
        do step_ = 1 + (*random)() % count;
        while (std::gcd(step_, count) != 1);
    }
    bool more() const { return taken_ < count_; }
    uint64_t take() {
        const uint64_t number = next_;
        next_ = (next_ + step_) % count_;
        ++taken_;
        return number;
    }

  private:
    uint64_t count_, taken_ = 0, next_ = 0, step_ = 1;
};

// Runs every ready thread of the block once; returns how many there were.
unsigned run_ready(Block& block, std::mt19937_64* random) {
    unsigned ran = 0;
    for (Sequence order(block.threads.size(), random); order.more() && running.error.empty();) {
        Thread& thread = block.threads[order.take()];
        if (thread.state == State::at_counter && thread.counter_reached()) thread.state = State::ready;
        if (thread.state != State::ready) continue;
        ++ran;
        running.thread = &thread;
        thread.fiber.resume();
        running.thread = nullptr;
    }
    return ran;
}

bool finished(const Block& block) {
    return std::all_of(block.threads.begin(), block.threads.end(),
                       [](const Thread& thread) { return thread.state == State::done; });
}

void run_blocks() {
    const Request& request = running.request;
    const uint64_t threads = uint64_t(request.block.x) * request.block.y * request.block.z;
    const uint64_t blocks =
        request.only_count ? request.only_count : uint64_t(request.grid.x) * request.grid.y * request.grid.z;
    std::mt19937_64 generator(request.seed);
    std::mt19937_64* const random = request.seed ? &generator : nullptr;
    const uint64_t most = std::max<uint64_t>(1, most_resident_threads / threads);
    std::vector<std::unique_ptr<Block>> resident(
        request.cooperative || request.cluster > 1 ? blocks : std::min({request.resident, blocks, most}));

    Sequence numbers(blocks, random);
    for (uint64_t left = blocks; left > 0;) {
        unsigned ran = 0;
        bool passed_over = false;
        for (auto& block : resident) {
            if (!block && numbers.more()) {
                const uint64_t number = numbers.take();
                block = start_block(request.only_count ? request.only[number] : number);
            }
            if (!block) continue;
            if (random && generator() % 4 == 0) {  // so that blocks do not march in step
                passed_over = true;
                continue;
            }
            ran += run_ready(*block, random);
            if (!running.error.empty()) break;
            if (finished(*block)) {
                end_block(block);
                --left;
            }
        }
        if (running.error.empty() && left > 0 && ran == 0 && !passed_over) running.error = deadlock(resident);
        if (!running.error.empty()) break;
    }
    for (auto& block : resident)
        if (block) end_block(block);
}

}  // namespace

void fail(const std::string& what) {
    const Thread& self = *running.thread;
    running.error = what + ", by thread " + text(self.index) + " of block " + text(self.block->index);
    running.thread->fiber.suspend(true);
    std::terminate();  // an abandoned fiber is never resumed
}

std::string text(BnkIndex index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

}  // namespace bnk

// ---- for ../binding.py ---------------------------------------------------------------------------------------------

// Runs a launch to its end; returns the error that ended it, or null.
extern "C" const char* bnk_launch(const bnk::Request* request, bnk::Totals* totals) {
    using namespace bnk;
    // An aligned copy: the record of the caller has the alignment of bytes.
    std::vector<std::max_align_t> arguments(request->argument_bytes / sizeof(std::max_align_t) + 1);
    memcpy(arguments.data(), request->arguments, request->argument_bytes);
    running = {*request, {}, nullptr, {}, {}, {}};
    running.request.arguments = arguments.data();
    memory::start_launch();
    banks::start_launch();
    trace::start_launch();
    run_blocks();
    const banks::Turns turns = banks::turns();
    running.totals.shared_turns = turns.taken;
    running.totals.fewest_shared_turns = turns.fewest;
    order::acquire(launch_end);
    Fiber::launch_ended();
    *totals = running.totals;
    return running.error.empty() ? nullptr : running.error.c_str();
}
