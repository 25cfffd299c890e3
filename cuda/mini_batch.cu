// Copies the mini-batch whose turn it is, by a counter on the device: the first launch of a captured step.
//
// Formulas:  s = counter[0];  x_out[n] = x[r], labels_out[n] = labels[r],  r = s N + n, or indices[s N + n]
//            scalars_out = schedule[s];  then counter[0] = s + 1
// Arrays:    x (rows, K) of type T, labels (rows,), indices (steps, N) or null, schedule (steps, S) of type T; x_out
//            (N, K), labels_out (N,), scalars_out (S,). counter (2,): the step, and the number of finished blocks, 0
//            between launches. C order. The result is undefined beyond the last step, and for rows that x does not
//            have.
// Launch:    Block (t, e, 1), grid (ceil(N/e), 1, 1); no shared memory. The t threads of an example copy its units, t
//            apart: vectors of 16 bytes (variant vectors; rows of x and x_out are whole, aligned vectors) or single
//            numbers. The last block to finish increments the step.
// Traffic:   N (K + 1) numbers and S scalars read and written once, and the counter. Three dependent reads: counter,
//            index, row.
// Numerics:  none: a copy.
// Called by: bnkernels/ops/mini_batch/op.py
#include "lib/kernel.cuh"
#include "lib/numbers/vector.cuh"

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

__device__ __forceinline__ void copy(Vector* to, const Vector* from) { bnk_store_vector(to, bnk_load_vector(from)); }
template <typename T>
__device__ __forceinline__ void copy(T* to, const T* from) {
    *to = *from;
}

// Unit is Vector or T.
template <typename Unit, typename T>
__device__ __forceinline__ void mini_batch(const MiniBatch<T>& a) {
    const long long step = *(const volatile unsigned*)a.counter;
    const long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y, position = step * a.batch + n;
    const int units = (int)(a.inputs * sizeof(T) / sizeof(Unit));
    if (n < a.batch) {
        const long long row = a.indices ? a.indices[position] : position;
        const Unit* const from = reinterpret_cast<const Unit*>(a.x + row * a.inputs);
        Unit* const to = reinterpret_cast<Unit*>(a.x_out + n * a.inputs);
        for (int i = threadIdx.x; i < units; i += blockDim.x) copy(to + i, from + i);
        if (threadIdx.x == 0) a.labels_out[n] = a.labels[row];
    }
    if (n == 0)
        for (long long i = threadIdx.x; i < a.scalars; i += blockDim.x)
            a.scalars_out[i] = a.schedule[step * a.scalars + i];
    __syncthreads();  // all threads of the block have read the counter
    if (threadIdx.x != 0 || threadIdx.y != 0) return;
    __threadfence();
    if (atomicAdd(a.counter + 1, 1u) != gridDim.x - 1) return;
    __threadfence();
    a.counter[0] = (unsigned)step + 1;
    a.counter[1] = 0;
}

BNK_KERNEL(bnk_mini_batch_f32, (MiniBatch<float>), 256, 1, (mini_batch<float, float>))
BNK_KERNEL(bnk_mini_batch_f64, (MiniBatch<double>), 256, 1, (mini_batch<double, double>))
BNK_KERNEL(bnk_mini_batch_vectors_f32, (MiniBatch<float>), 256, 1, (mini_batch<Vector, float>))
BNK_KERNEL(bnk_mini_batch_vectors_f64, (MiniBatch<double>), 256, 1, (mini_batch<Vector, double>))
