// One fiber per CUDA thread: a stack, a saved context, and the annotations that sanitizers need to follow a switch.
#pragma once
#include <ucontext.h>

#include <cstddef>

namespace bnk {

#ifdef BNK_TSAN
constexpr size_t most_resident_threads = 512;  // or one block: TSan needs no overlap to see a race
#else
constexpr size_t most_resident_threads = 4096;
#endif

class Fiber {
  public:
    Fiber() = default;
    Fiber(const Fiber&) = delete;
    ~Fiber();

    // Gets a stack from the pool, once; the first resume() calls `entry`.
    void start(void (*entry)());
    // Runs the fiber until it suspends. Call from the scheduler.
    void resume();
    // Goes back to the scheduler. Call from the running fiber; for ever = it will never be resumed.
    void suspend(bool for_ever);
    // The first thing `entry` has to do.
    static void entered();

    bool on_stack(const void* address, size_t bytes) const {
        const char* first = static_cast<const char*>(address);
        return first >= stack_ && first + bytes <= stack_ + stack_bytes;
    }
    void* order() const { return order_; }  // happens_before.h
    static void* scheduler_order();
    // All that the launch did now happens before the next one: what followed its threads may follow others.
    static void launch_ended();

  private:
    static constexpr size_t stack_bytes = 64 * 1024;  // a sanitizer writes its report on the stack of the culprit
    friend class StackPool;
    char* stack_ = nullptr;
    void* order_ = nullptr;
    void* fake_stack_ = nullptr;
    ucontext_t context_;  // to begin with
    bool started_ = false;
    void* registers_[5];  // to go on with, as __builtin_setjmp wants it
};

}  // namespace bnk
