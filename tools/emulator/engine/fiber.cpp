#include "fiber.h"

#include <sys/mman.h>

#include <deque>
#include <new>
#include <vector>

#include "happens_before.h"

#ifdef BNK_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace bnk {

namespace {

struct Scheduler {  // the context that every launch runs in: Python's own thread
    void* registers[5];
    void* order = nullptr;
    void* fake_stack = nullptr;
    const void* stack = nullptr;
    size_t stack_bytes = 0;
} scheduler;

// Announce a switch to the stack of `bytes` bytes at `stack`; `fake_stack` is null when nobody will come back.
void about_to_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* stack,
                     [[maybe_unused]] size_t bytes) {
#ifdef BNK_ASAN
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
}

// swapcontext would ask the system for the mask of signals at every switch, and ASan's own erases red zones; what the
// compiler makes of these two, who may not share a function, are a few moves.
[[noreturn, gnu::noinline]] void jump(void** to) { __builtin_longjmp(to, 1); }

// Leaves `from` to be jumped to, and begins or goes on with what the arguments say.
[[gnu::noinline]] void swap(void** from, void** to, const ucontext_t* first) {
    if (__builtin_setjmp(from) != 0) return;
    if (first) setcontext(first);
    jump(to);
}

void switched([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** from, [[maybe_unused]] size_t* bytes) {
#ifdef BNK_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, from, bytes);
#endif
}

}  // namespace

// Stacks with a page without access below them: what overruns one fails instead of spoiling its neighbour. The system
// counts mappings, so beyond many stacks, of a large cooperative launch, the others do without.
class StackPool {
  public:
    char* take() {
        if (free_.empty()) return map();
        char* const stack = free_.back();
        free_.pop_back();
#ifdef BNK_ASAN
        // A thread that was abandoned in a failed launch left its red zones behind.
        __asan_unpoison_memory_region(stack, Fiber::stack_bytes);
#endif
#ifdef BNK_TSAN
        // A new mapping makes TSan forget the last owner, which may well be unordered with the next one.
        mmap(stack, Fiber::stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
#endif
        return stack;
    }
    void give_back(char* stack) { free_.push_back(stack); }

  private:
    static constexpr size_t guard_bytes = 64 * 1024;  // at least one page, whatever the machine's page size

    static constexpr size_t most_guarded = 8192;

    char* map() {
        void* const mapped = mmap(nullptr, guard_bytes + Fiber::stack_bytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        if (++mapped_ <= most_guarded) mprotect(mapped, guard_bytes, PROT_NONE);
        return static_cast<char*>(mapped) + guard_bytes;
    }

    std::vector<char*> free_;
    size_t mapped_ = 0;
};

// TSan takes a millisecond and two megabytes to make a fiber, so not many of them serve again and again: those that
// rested since the launch before, where nothing is lost, then the one that has rested longest. Whoever gets that one is
// ordered after the thread that had it, which ran many blocks ago.
class OrderPool {
  public:
    void* take() {
        if (rested_.empty() && (made_ < most || used_.empty())) {
            ++made_;
            return order::create();
        }
        std::deque<void*>& pool = rested_.empty() ? used_ : rested_;
        void* const fiber = pool.front();
        pool.pop_front();
        return fiber;
    }
    void give_back(void* fiber) { used_.push_back(fiber); }
    void launch_ended() {
        rested_.insert(rested_.end(), used_.begin(), used_.end());
        used_.clear();
    }

  private:
    static constexpr size_t most = 1024 + most_resident_threads;
    size_t made_ = 0;
    std::deque<void*> rested_, used_;
};

static StackPool stacks;
static OrderPool orders;

void Fiber::start(void (*entry)()) {
    stack_ = stacks.take();
    scheduler.order = order::current();
    order_ = orders.take();
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = stack_bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
}

Fiber::~Fiber() {
    if (!stack_) return;
    orders.give_back(order_);
    stacks.give_back(stack_);
}

void Fiber::resume() {
    const ucontext_t* const first = started_ ? nullptr : &context_;
    started_ = true;
    order::switch_to(order_);
    about_to_switch(&scheduler.fake_stack, stack_, stack_bytes);
    swap(scheduler.registers, registers_, first);
    switched(scheduler.fake_stack, nullptr, nullptr);
}

void Fiber::suspend(bool for_ever) {
    order::switch_to(scheduler.order);
    about_to_switch(for_ever ? nullptr : &fake_stack_, scheduler.stack, scheduler.stack_bytes);
    swap(registers_, scheduler.registers, nullptr);
    switched(fake_stack_, &scheduler.stack, &scheduler.stack_bytes);
}

void Fiber::entered() { switched(nullptr, &scheduler.stack, &scheduler.stack_bytes); }

void Fiber::launch_ended() { orders.launch_ended(); }

void* Fiber::scheduler_order() { return scheduler.order; }

}  // namespace bnk
