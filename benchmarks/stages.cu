// Batch norm's forward for mini-batches of 64 examples in three stages of one kernel, for the notebook that explains it.
//
// Formulas:  y = gamma (x - mean) / sqrt(var + eps) + beta, mean and var over the examples.
// Arrays:    x, y (64, C), C order; gamma, beta (C,); float.
// Launch:    three_reads: ceil(C / 32) blocks of (32, 1) threads, a thread for each neuron. on_chip: as many of (32, 16),
//            16 threads for each neuron. vectors: ceil(C / 128) of (32, 16), 16 threads for four neurons; C % 4 == 0.
//            Shared memory of the latter two: a number, or four, for each thread.
// Traffic:   three_reads reads x three times, the others once; all write y once.
// Numerics:  in float; squares are of distances from the mean. Sums of the 16 threads are added in their order.
// Called by: benchmarks/stages.py

#include "lib/kernel.cuh"

constexpr int ROWS = 64, WORKERS = 16, OWN = ROWS / WORKERS;

struct Arguments {
    const float *x, *gamma, *beta;
    float* y;
    long long channels;
    float eps;
};

// Stage 1: what a loop in Python becomes, a thread for each neuron.
__device__ __forceinline__ void three_reads(const Arguments& a) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= a.channels) return;
    float mean = 0.0f, var = 0.0f;
#pragma unroll
    for (int n = 0; n < ROWS; n++) mean += a.x[n * a.channels + c];
    mean /= ROWS;
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        // volatile: else the compiler keeps all 64 numbers in registers, as it can for this one size
        const float d = *(const volatile float*)(a.x + n * a.channels + c) - mean;
        var += d * d;
    }
    const float scale = a.gamma[c] / sqrt(var / ROWS + a.eps);
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        const float d = *(const volatile float*)(a.x + n * a.channels + c) - mean;
        a.y[n * a.channels + c] = d * scale + a.beta[c];
    }
}

// Adds up what the 16 threads of a column have; every one of them gets the sum.
template <typename T>
__device__ __forceinline__ T sum_of_workers(T own, T* shared) {
    __syncthreads();  // whoever reads the numbers of an earlier call is done
    shared[threadIdx.y * 32 + threadIdx.x] = own;
    __syncthreads();
    T sum = shared[threadIdx.x];
#pragma unroll
    for (int worker = 1; worker < WORKERS; worker++) sum = sum + shared[worker * 32 + threadIdx.x];
    return sum;
}

// Stage 2: 16 threads for each neuron, which keep its numbers in registers and exchange sums on the chip.
__device__ __forceinline__ void on_chip(const Arguments& a) {
    BNK_DYNAMIC_SHARED(float, shared);
    const int c = blockIdx.x * 32 + threadIdx.x;
    const bool active = c < a.channels;
    float x[OWN], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        x[i] = active ? a.x[(threadIdx.y + i * WORKERS) * a.channels + c] : 0.0f;
        sum += x[i];
    }
    const float mean = sum_of_workers(sum, shared) / ROWS;
#pragma unroll
    for (int i = 0; i < OWN; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float var = sum_of_workers(squares, shared) / ROWS;
    if (!active) return;
    const float scale = a.gamma[c] / sqrt(var + a.eps), beta = a.beta[c];
#pragma unroll
    for (int i = 0; i < OWN; i++) a.y[(threadIdx.y + i * WORKERS) * a.channels + c] = (x[i] - mean) * scale + beta;
}

struct alignas(16) Four {
    float x, y, z, w;
};

__device__ __forceinline__ Four operator+(Four a, Four b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
__device__ __forceinline__ Four operator-(Four a, Four b) { return {a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w}; }
__device__ __forceinline__ Four operator*(Four a, Four b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }
__device__ __forceinline__ Four all_four(float a) { return {a, a, a, a}; }

// Stage 3: the same with four neighbouring neurons a thread, which it reads and writes with one instruction.
__device__ __forceinline__ void vectors(const Arguments& a) {
    BNK_DYNAMIC_SHARED(Four, shared);
    const int c = 4 * (blockIdx.x * 32 + threadIdx.x);
    const bool active = c < a.channels;
    Four x[OWN], sum = {}, squares = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        x[i] = active ? *(const Four*)(a.x + (threadIdx.y + i * WORKERS) * a.channels + c) : all_four(0.0f);
        sum = sum + x[i];
    }
    const Four part = all_four(1.0f / ROWS), mean = sum_of_workers(sum, shared) * part;
#pragma unroll
    for (int i = 0; i < OWN; i++) squares = squares + (x[i] - mean) * (x[i] - mean);
    const Four var = sum_of_workers(squares, shared) * part + all_four(a.eps);
    if (!active) return;
    const Four gamma = *(const Four*)(a.gamma + c), beta = *(const Four*)(a.beta + c);
    const Four rstd = {1.0f / sqrt(var.x), 1.0f / sqrt(var.y), 1.0f / sqrt(var.z), 1.0f / sqrt(var.w)};
#pragma unroll
    for (int i = 0; i < OWN; i++)
        *(Four*)(a.y + (threadIdx.y + i * WORKERS) * a.channels + c) = (x[i] - mean) * (gamma * rstd) + beta;
}

BNK_KERNEL(stages_three_reads, (Arguments), 32, 0, (three_reads))
BNK_KERNEL(stages_on_chip, (Arguments), 512, 0, (on_chip))
BNK_KERNEL(stages_vectors, (Arguments), 512, 0, (vectors))
