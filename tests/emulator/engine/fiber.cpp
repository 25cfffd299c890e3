#include "fiber.h"

#include <sys/mman.h>

#include <deque>
#include <new>
#include <vector>

#include "happens_before.h"

#ifdef BNK_ASAN
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace bnk {

namespace {

struct Scheduler {  // the context that every launch runs in: Python's own thread
    ucontext_t context;
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

// ASan's own swapcontext would warn that it cannot follow fibers, and erase red zones. The two announcements above and
// below tell it all it needs, so it is passed over.
void swap_contexts(ucontext_t* from, const ucontext_t* to) {
#ifdef BNK_ASAN
    static const auto swap =
        reinterpret_cast<decltype(&swapcontext)>(dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), "swapcontext"));
    swap(from, to);
#else
    swapcontext(from, to);
#endif
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
    order::switch_to(order_);
    about_to_switch(&scheduler.fake_stack, stack_, stack_bytes);
    swap_contexts(&scheduler.context, &context_);
    switched(scheduler.fake_stack, nullptr, nullptr);
}

void Fiber::suspend(bool for_ever) {
    order::switch_to(scheduler.order);
    about_to_switch(for_ever ? nullptr : &fake_stack_, scheduler.stack, scheduler.stack_bytes);
    swap_contexts(&context_, &scheduler.context);
    switched(fake_stack_, &scheduler.stack, &scheduler.stack_bytes);
}

void Fiber::entered() { switched(nullptr, &scheduler.stack, &scheduler.stack_bytes); }

void Fiber::launch_ended() { orders.launch_ended(); }

void* Fiber::scheduler_order() { return scheduler.order; }

}  // namespace bnk
