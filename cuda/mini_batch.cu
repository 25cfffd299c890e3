// Copies the mini-batch whose turn it is, by a counter on the device: the first launch of a captured step.
//
// Formulas:  s = counter[0];  x_out[n] = x[r], labels_out[n] = labels[r],  r = s N + n, or indices[s N + n]
//            scalars_out = schedule[s];  then counter[0] = s + 1
// Arrays:    x (rows, K) of type T, labels (rows,), indices (steps, N) or null, schedule (steps, S) of type T; x_out
//            (N, K), labels_out (N,), scalars_out (S,). counter (2,): the step, and the number of finished blocks, 0
//            between launches. C order. The result is undefined beyond the last step, and for rows that x does not
//            have.
// Launch:    Block (256, 1, 1), grid (b, 1, 1), any b; no shared memory. The last block to finish increments the step.
// Traffic:   N (K + 1) numbers and S scalars read and written once, and the counter.
// Numerics:  none: a copy.
// Called by: bnkernels/ops/mini_batch/op.py
#include "lib/kernel.cuh"

template <typename T>
struct MiniBatch {
    const T* x;
    const int* labels;
    const int* indices;
    const T* schedule;
    T* x_out;
    int* labels_out;
    T* scalars_out;
    unsigned* counter;
    long long batch, inputs, scalars;
};

// Row of example n of the mini-batch.
template <typename T>
__device__ __forceinline__ long long row_of(const MiniBatch<T>& a, long long step, long long n) {
    const long long position = step * a.batch + n;
    return a.indices ? a.indices[position] : position;
}

template <typename T>
__device__ __forceinline__ void mini_batch(const MiniBatch<T>& a) {
    const long long step = *(const volatile unsigned*)a.counter;
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x,
                    threads = (long long)gridDim.x * blockDim.x;
#pragma unroll 4
    for (long long i = thread; i < a.batch * a.inputs; i += threads)
        a.x_out[i] = a.x[row_of(a, step, i / a.inputs) * a.inputs + i % a.inputs];
    for (long long n = thread; n < a.batch; n += threads) a.labels_out[n] = a.labels[row_of(a, step, n)];
    for (long long i = thread; i < a.scalars; i += threads) a.scalars_out[i] = a.schedule[step * a.scalars + i];
    __syncthreads();  // all threads of the block have read the counter
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(a.counter + 1, 1u) != gridDim.x - 1) return;
    __threadfence();
    a.counter[0] = (unsigned)step + 1;
    a.counter[1] = 0;
}

#define MINI_BATCH(suffix, T) BNK_KERNEL(bnk_mini_batch_##suffix, (MiniBatch<T>), 256, 1, (mini_batch<T>))

MINI_BATCH(f32, float)
MINI_BATCH(f64, double)
