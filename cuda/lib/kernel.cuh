// Declaration of kernels: launch bounds, one argument, dynamic shared memory.
//
// This folder is compiled twice: by NVRTC for GPUs, and by a C++ compiler for the CPU emulator, which defines the
// macros below itself. The rest of the text is the same. Neither compiler contracts a product and a sum into one
// rounding, except where the code says fma(), so both compute the same bits.
#pragma once

#ifndef BNK_KERNEL
// A type in parentheses, since it may contain a comma: BNK_TYPE (Struct<T, A>) is Struct<T, A>.
#define BNK_TYPE(...) __VA_ARGS__

// Defines a kernel. `name` is not mangled, so that CuPy can look it up in its cache. `Arguments` is the type of the
// only argument, a struct passed by value, in parentheses. `max_threads` and `min_blocks` are the numbers of
// __launch_bounds__: threads of a block, at most, and resident blocks of a multiprocessor, at least; 0 leaves the
// latter to the compiler. `body` is the device function to call, in parentheses.
#define BNK_KERNEL(name, Arguments, max_threads, min_blocks, body)                                                   \
    extern "C" __global__ void __launch_bounds__(max_threads, min_blocks) name(const BNK_TYPE Arguments arguments) { \
        body(arguments);                                                                                             \
    }

// Defines a kernel that is launched in clusters of `cluster` blocks; requires sm_90.
#define BNK_KERNEL_CLUSTER(name, Arguments, max_threads, min_blocks, cluster, body)                       \
    extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(max_threads, min_blocks) \
        name(const BNK_TYPE Arguments arguments) {                                                        \
        body(arguments);                                                                                  \
    }
#endif

#ifndef BNK_DYNAMIC_SHARED
// Declares the dynamic shared memory of the block as an array of T. The launch determines its size.
#define BNK_DYNAMIC_SHARED(T, name)                               \
    extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    T* const name = reinterpret_cast<T*>(name##_bytes)
#endif

// A kernel may be compiled for one kind of call: members of its argument then become constants, and code that they rule
// out is not compiled. Python defines BNK_CONSTANTS(a), as (a.batch = 64, a.activation = 1, ...), with the values that
// the argument has anyway.
template <typename Arguments>
__device__ __forceinline__ void take_constants([[maybe_unused]] Arguments& a) {
#ifdef BNK_CONSTANTS
    BNK_CONSTANTS(a);
#endif
}
