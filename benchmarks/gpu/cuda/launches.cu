// What a launch costs: kernels that do next to nothing, and count that they ran with the right arguments.
// Called by: ../facts.py

struct Arguments {
    const float *a, *b, *c, *d, *e, *f;
    unsigned* count;
    long long rows, channels;
    float eps;
};

__device__ __forceinline__ bool complete(const Arguments& given) {
    const bool pointers = given.a && given.b && given.c && given.d && given.e && given.f;
    return pointers && given.rows == 64 && given.channels == 20 && given.eps == 0.5f;
}

// One argument, a struct by value, as the kernels of bnkernels have.
extern "C" __global__ void bnk_count_struct(const Arguments given) {
    if (threadIdx.x == 0 && complete(given)) atomicAdd(given.count, 1u);
}

// The same as ten arguments.
extern "C" __global__ void bnk_count_arguments(const float* a, const float* b, const float* c, const float* d,
                                               const float* e, const float* f, unsigned* count, long long rows,
                                               long long channels, float eps) {
    if (threadIdx.x == 0 && complete({a, b, c, d, e, f, count, rows, channels, eps})) atomicAdd(count, 1u);
}

extern "C" __global__ void bnk_nothing(long long) {}

// Keeps the device busy while the host enqueues what is to be timed behind it.
extern "C" __global__ void bnk_hold(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {
    }
}
