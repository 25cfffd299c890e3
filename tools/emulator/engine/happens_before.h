// What orders CUDA threads, told to ThreadSanitizer; in every other build, nothing.
//
// A CUDA thread is a TSan fiber. Switching between fibers orders nothing: the edges drawn here are all there are.
#pragma once

namespace bnk::order {

// Where a clock is kept: what was released there happened before what acquires it later.
struct alignas(8) Tag {  // TSan has one clock for 8 bytes
    char unused;
};

}  // namespace bnk::order

#ifdef BNK_TSAN

extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
}

namespace bnk::order {

inline void* current() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }  // ordered after what the creating fiber has done
inline void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: no edge
inline void release(Tag& tag) { __tsan_release(&tag); }
inline void acquire(Tag& tag) { __tsan_acquire(&tag); }

}  // namespace bnk::order

#else

namespace bnk::order {

inline void* current() { return nullptr; }
inline void* create() { return nullptr; }
inline void destroy(void*) {}
inline void switch_to(void*) {}
inline void release(Tag&) {}
inline void acquire(Tag&) {}

}  // namespace bnk::order

#endif
