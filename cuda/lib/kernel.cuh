// How a kernel is declared: its launch bounds, its one argument, its dynamic shared memory.
//
// The text of this folder is compiled twice: by NVRTC for GPUs, and by a C++ compiler for the CPU emulator, which defines
// the macros below itself. Nothing else differs. Both compilations contract a product and a sum into one rounding only
// where the code says fma(), so both compute the same bits.
#pragma once

#ifndef BNK_KERNEL
// A type in parentheses, since it may hold a comma: BNK_TYPE (Struct<T, A>) is Struct<T, A>.
#define BNK_TYPE(...) __VA_ARGS__

// A kernel. `name` is not mangled, so that CuPy can cache it. `Arguments` is the type of its one argument, a struct by
// value, in parentheses. `max_threads` and `min_blocks` are those of __launch_bounds__: the threads of the largest block,
// and the blocks that registers leave room for on a multiprocessor; 0 leaves that to the compiler. `body` is the device
// function, in parentheses.
#define BNK_KERNEL(name, Arguments, max_threads, min_blocks, body)                                                   \
    extern "C" __global__ void __launch_bounds__(max_threads, min_blocks) name(const BNK_TYPE Arguments arguments) { \
        body(arguments);                                                                                             \
    }

// The same, launched in clusters of `cluster` blocks, from sm_90 on.
#define BNK_KERNEL_CLUSTER(name, Arguments, max_threads, min_blocks, cluster, body)                       \
    extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(max_threads, min_blocks) \
        name(const BNK_TYPE Arguments arguments) {                                                        \
        body(arguments);                                                                                  \
    }
#endif

#ifndef BNK_DYNAMIC_SHARED
// The block's shared memory, of the size the launch asked for, as an array of T.
#define BNK_DYNAMIC_SHARED(T, name)                               \
    extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    T* const name = reinterpret_cast<T*>(name##_bytes)
#endif
